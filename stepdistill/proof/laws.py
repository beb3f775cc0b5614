"""Laws: only the distribution of the images is given, and of the states at some levels."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.sampler import full
from stepdistill.oracles.mixture import Mixture
from stepdistill.proof import measure
from stepdistill.proof.rows import (
    FEWEST,
    POINTS,
    SHAPE,
    SMALL,
    Judge,
    Picture,
    conds,
    drawn,
    looked_at,
    worst,
)
from stepdistill.proof.trial import Trial

SHAPES = ("W1", "sliced W1", "distribution function")
MOMENTS = ("mean", "spread", "W2", "mode shares")  # what pooled laws are held to


def judge_law(made: Judge) -> None:
    """The distribution of images against the data's, whichever noise each came from."""
    trial = made.trial
    student = trial.trainer.best()
    scale = trial.trainer.config.guidance if trial.point.guided else 1.0
    for steps in looked_at(trial):
        found: list[dict[str, float]] = []
        for label, cond in conds(trial):
            law = trial.teacher.oracle.law(label, scale)
            if law is None:
                made.notes.append(
                    f"class {label}: guided by {scale:g}, this law has no closed form to judge by"
                )
                continue
            z, x = drawn(trial, student, steps, cond)
            if trial.point.pooled:
                x = _pooled(trial, steps, cond)
            found.append(_law_figures(x, law))
            if label in (None, 0):
                y = _samples_of(law)
                made.pictures.append(Picture(steps, z, x, y.float(), law, paired=False))
            found[-1] |= _level_figures(trial, law, steps, cond)
        _add_worst(made, found, steps)


def _pooled(trial: Trial, steps: int, cond: Cond) -> Tensor:
    """Images predicted at all steps of the grid, of every step as many: [steps POINTS, D]."""
    grid, den, parts = trial.trainer.grids()[steps], trial.trainer.best(), []
    for place in range(steps):
        _, state = drawn(trial, den, steps, cond, stop=place)
        parts.append(den.at(grid[place])(state, full(state, grid[place]), cond).x)
    return torch.cat(parts)


def _law_figures(x: Tensor, law: Mixture) -> dict[str, float]:
    """Figures of samples against a law, in units of its standard deviation."""
    unit = measure.scale(law)
    kind = "W1" if law.dim == 1 else "sliced W1"
    out = {kind: measure.wasserstein1(x, law) / unit}
    out["distribution function"] = measure.cdf_gap(x, law)
    out["mean"] = float((x.double().mean(dim=0) - law.mean()).norm()) / unit
    spread = x.double().var(dim=0, correction=0).sum() / law.covariance().trace()
    out["spread"] = float(spread.sqrt())
    if len(law) == 1:
        out["W2"] = measure.gaussian_w2(x, law) / unit
    else:
        out["mode shares"] = measure.mode_gap(x, law)
        out["least mode"] = measure.least_mode(x, law)
    if law.dim > 1:
        y = _samples_of(law)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        value, error = measure.energy(x.double()[order] / unit, y / unit)
        out["energy"], out["energy error"] = value, error
    return out


def _samples_of(law: Mixture) -> Tensor:
    even = measure.even_normals(POINTS, law.dim + 1, seed=5)
    x, _ = law.sample(even[:, :-1], torch.special.ndtr(even[:, -1]))
    return x[torch.randperm(POINTS, generator=torch.Generator().manual_seed(1))]


def _level_figures(trial: Trial, law: Mixture, steps: int, cond: Cond) -> dict[str, float]:
    """The states on the way, at the levels where their law is known too."""
    out, grid = {}, trial.trainer.grids()[steps]
    for level in trial.point.levels:
        stop = min(range(len(grid)), key=lambda i: abs(grid[i] - level))
        _, x = drawn(trial, trial.trainer.best(), steps, cond, stop=stop)
        c = trial.trainer.process.coefs(torch.tensor([grid[stop]], dtype=torch.float64))
        noised = law.noised(float(c.alpha), float(c.sigma))
        unit = measure.scale(noised)
        out[f"W1 at level {level:g}"] = measure.wasserstein1(x, noised) / unit
        gap = (x.double().mean(dim=0) - noised.mean()).norm()
        out[f"mean at level {level:g}"] = float(gap) / unit
    return out


def _add_worst(made: Judge, found: list[dict[str, float]], steps: int) -> None:
    """The worst class of every figure."""
    trial = made.trial
    for name in dict.fromkeys(name for one in found for name in one):
        values = [one[name] for one in found if name in one]
        if name == "energy error" or (trial.point.pooled and name not in MOMENTS):
            continue
        if name == "energy":
            slack = 3 * max(one["energy error"] for one in found if "energy error" in one)
            made.add(name, worst(values), 2e-3 + slack, steps=steps)
        elif name == "spread":
            gap = worst([abs(value - 1) for value in values])
            far = next((v for v in values if abs(v - 1) == gap), gap)
            made.add(name, far, SMALL, expected=1.0, steps=steps)
        elif name == "least mode":
            if trial.point.covers:
                made.add(name, -worst([-v for v in values]), 1 - FEWEST, expected=1.0, steps=steps)
        else:
            guided_by = trial.point.guided and trial.teacher.guidance != 1 and name == "mean"
            tolerance = SHAPE if name.startswith(SHAPES) and not trial.affine else SMALL
            made.add("guided mean" if guided_by else name, worst(values), tolerance, steps=steps)
