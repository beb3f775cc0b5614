"""What a trial must show: expected beside measured, with a tolerance and a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel
from torch import Tensor

from stepdistill.diffusion.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.process import Process
from stepdistill.diffusion.sampler import Sampled, full, heun_step, move, sample
from stepdistill.diffusion.timesteps import Grid
from stepdistill.oracles.mixture import Mixture
from stepdistill.proof import measure
from stepdistill.proof.trial import Trial

POINTS = 8192
STEPS = (1, 2, 4)  # student steps that are looked at, where the student has them
EXACT, SMALL = 1e-3, 2e-2  # affine students of maps; small networks, and laws learnt by samples
FEWEST = 0.75  # of a mode's weight


class Row(BaseModel):
    """A figure of a trial.

    Args:
        method: its name.
        setting: name of the method's setting.
        teacher: name or file of the closed-form teacher.
        student_steps: sampler steps; None where none is taken.
        quantity: what was measured.
        expected: what theory says.
        measured: what came out.
        tolerance: largest difference of the two.
        passed: the verdict.
        seconds: of training.
    """

    method: str
    setting: str
    teacher: str
    student_steps: int | None
    quantity: str
    expected: float
    measured: float | None
    tolerance: float
    passed: bool
    seconds: float


@dataclass
class Picture:
    """Samples of one trial to draw: from the same noise where ``expected`` is a map's.

    Args:
        steps: sampler steps.
        z: noise [N, D].
        x: the student's images [N, D].
        expected: theory's: images of the same noise, or samples of the law.
        law: of the images; None if it has no closed form.
        paired: whether x and expected belong together one by one.
    """

    steps: int
    z: Tensor
    x: Tensor
    expected: Tensor
    law: Mixture | None
    paired: bool


@dataclass
class Judge:
    """Collects the rows of a trial.

    Args:
        trial: what was trained.
        rows: so far.
        pictures: so far.
        notes: what cannot be judged, and why.
    """

    trial: Trial
    rows: list[Row] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(
        self,
        quantity: str,
        measured: float,
        tolerance: float,
        *,
        expected: float = 0.0,
        steps: int | None = None,
    ) -> None:
        """Hold a measured value against theory's."""
        case, finite = self.trial.case, math.isfinite(measured)
        self.rows.append(
            Row(
                method=case.method,
                setting=case.setting,
                teacher=case.teacher,
                student_steps=steps,
                quantity=quantity,
                expected=expected,
                measured=measured if finite else None,
                tolerance=tolerance,
                passed=finite and abs(measured - expected) <= tolerance,
                seconds=round(self.trial.seconds, 2),
            )
        )


class Ideal(Denoiser):
    """The fixed point of a map as a denoiser: the end of the teacher's walk from any state."""

    def __init__(self, trial: Trial) -> None:
        oracle = trial.teacher.oracle
        super().__init__(
            oracle.net,
            oracle.process,
            "x0",
            adapter=oracle.adapter,
            classes=oracle.classes,
            null_label=oracle.null_label,
        )
        self.trial = (trial,)

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Clean estimate [B, D] at one time for all."""
        (trial,) = self.trial
        assert trial.point.follow is not None
        return walk(trial, x_t, trial.point.follow(float(t[0])), cond)


def walk(trial: Trial, x_t: Tensor, times: Grid, cond: Cond) -> Tensor:
    """The teacher's walk from states at the first of the times to the last."""
    oracle, scale = trial.teacher.oracle, trial.trainer.config.guidance
    for t, r in zip(times, times[1:], strict=False):
        now, then = full(x_t, t), full(x_t, r)
        if trial.point.solver == "heun":
            x_t = heun_step(oracle, x_t, now, then, cond, scale)
        else:
            x_t = move(guided(oracle, x_t, now, cond, scale), oracle.process, then)
    return x_t


@torch.no_grad()
def judge(trial: Trial) -> Judge:
    """All that theory says of a trial's student, held against it."""
    made = Judge(trial)
    kinds = {"map": _map, "law": _law, "field": _field}
    kinds[trial.point.kind](made)
    return made


def conds(trial: Trial) -> Iterator[tuple[int | None, Cond]]:
    """Every class with its condition for :data:`POINTS` samples; one None without classes."""
    classes = trial.teacher.oracle.classes
    for label in range(len(classes)) if classes else [None]:
        one = None if label is None else torch.full((POINTS,), label)
        yield label, Cond(one)


def drawn(
    trial: Trial, den: Sampled, steps: int, cond: Cond, stop: int | None = None
) -> tuple[Tensor, Tensor]:
    """Noise and samples in some steps, of evenly spread noise; for whoever predicts."""
    made, dim = trial.trainer, trial.teacher.mixture.dim
    grid = made.grids()[steps]
    z = measure.whitened(measure.even_normals(POINTS, dim * steps)).float()
    parts = z.split(dim, dim=1)
    return parts[0], sample(
        den, parts[0], grid, cond, noise=made.noise, fresh=lambda i: parts[i], stop=stop
    )


def looked_at(trial: Trial) -> list[int]:
    """Numbers of steps that are judged: some of those the student has, or all it has."""
    own = sorted(trial.trainer.grids())
    return [n for n in own if n in STEPS] or own


# Maps ---------------------------------------------------------------------------------------------


def _map(made: Judge) -> None:
    trial = made.trial
    tolerance = EXACT if trial.affine else SMALL
    ideal, student = Ideal(trial), trial.trainer.best()
    for steps in looked_at(trial):
        gaps, sizes = [], []
        for label, cond in conds(trial):
            z, x = drawn(trial, student, steps, cond)
            z_one, x_ideal = drawn(trial, ideal, 1 if trial.point.straight else steps, cond)
            if trial.point.straight:  # one step of the ideal, from this very noise
                x_ideal = ideal(start(trial, z), full(z, trial.trainer.top), cond).x
            gaps.append((x - x_ideal).double())
            sizes.append(x_ideal.double())
            if label in (None, 0):
                law = trial.teacher.oracle.law(label, trial.trainer.config.guidance)
                made.pictures.append(Picture(steps, z, x, x_ideal, law, paired=True))
                if steps == 1 and law is not None and len(law) == 1:
                    _gain(made, law, z, x, tolerance)
        size = torch.stack([one.std(dim=0).square().mean() for one in sizes]).mean().sqrt()
        error = torch.cat(gaps).square().mean().sqrt() / size
        made.add("map error", float(error), tolerance, steps=steps)
        if trial.teacher.guidance != 1:
            ends = [(gap.mean(dim=0).norm() / size) for gap in gaps]
            made.add("guided mean", float(torch.stack(ends).max()), tolerance, steps=steps)
    if trial.point.straight:
        _straight(made)


def start(trial: Trial, z: Tensor) -> Tensor:
    """The state that sampling begins with."""
    at = trial.trainer.process.coefs(full(z, trial.trainer.top)).expand(z)
    return at.sigma * z


def _gain(made: Judge, law: Mixture, z: Tensor, x: Tensor, tolerance: float) -> None:
    """Slope of the one-step map along each axis, in units of the exact map's.

    An Euler step multiplies by rho_r / rho_t cos(phi_t - phi_r), phi the angle of (alpha s, sigma),
    and the walk by the product: the solver's bias in closed form.
    """
    trial = made.trial
    assert trial.point.follow is not None
    if trial.point.solver != "euler":
        return
    times = trial.point.follow(trial.trainer.top)
    axes = torch.eye(law.dim).double() if law.axes is None else law.axes[0]
    flat_z, flat_x = z.double() @ axes, x.double() @ axes
    for k, std in enumerate(law.stds[0].tolist()):
        slope = float((flat_z[:, k] * (flat_x[:, k] - flat_x[:, k].mean())).mean())
        bias = 1.0
        for t, r in zip(times, times[1:], strict=False):
            bias *= math.cos(
                angle(trial.trainer.process, t, std) - angle(trial.trainer.process, r, std)
            )
        made.add(f"gain, axis {k + 1}", slope / std, tolerance, expected=bias, steps=1)


def angle(process: Process, t: float, std: float) -> float:
    """atan2(sigma, alpha std) at a time."""
    c = process.coefs(torch.tensor([t], dtype=torch.float64))
    return math.atan2(float(c.sigma), float(c.alpha) * std)


def _straight(made: Judge) -> None:
    """Straightness of the student's paths in 32 even steps, over that of the teacher's."""
    trial = made.trial
    found = []
    for den, scale in ((trial.trainer.best(), 1.0), (trial.teacher.oracle, trial.teacher.guidance)):
        total = 0.0
        for _, cond in conds(trial):
            z = measure.even_normals(POINTS, trial.teacher.mixture.dim).float()
            times = tuple(trial.trainer.top * (1 - i / 32) for i in range(33))
            path = [start(trial, z)]
            for t, r in zip(times, times[1:], strict=False):
                pred = guided(den.at(t), path[-1], full(z, t), cond, scale)
                path.append(move(pred, trial.trainer.process, full(z, r)))
            total += measure.straightness(path)
        found.append(total)
    made.add("straightness, of the teacher's", found[0] / found[1], 0.1, steps=32)


# Laws ---------------------------------------------------------------------------------------------


def _law(made: Judge) -> None:
    trial = made.trial
    student, scale = trial.trainer.best(), trial.trainer.config.guidance
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
            found.append(_law_figures(x, law))
            if label in (None, 0):
                y = _samples_of(law)
                made.pictures.append(Picture(steps, z, x, y.float(), law, paired=False))
            found[-1] |= _level_figures(trial, law, steps, cond)
        _add_worst(made, found, steps)


def _law_figures(x: Tensor, law: Mixture) -> dict[str, float]:
    """Figures of samples against a law, in units of its standard deviation."""
    unit = measure.scale(law)
    kind = "W1" if law.dim == 1 else "sliced W1"
    out = {kind: measure.wasserstein1(x, law) / unit}
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
    for name in dict.fromkeys(name for one in found for name in one):
        values = [one[name] for one in found if name in one]
        if name == "energy error":
            continue
        if name == "energy":
            slack = 3 * max(one["energy error"] for one in found if "energy error" in one)
            made.add(name, max(values), 2e-3 + slack, steps=steps)
        elif name == "spread":
            worst = max(values, key=lambda v: abs(v - 1))
            made.add(name, worst, SMALL, expected=1.0, steps=steps)
        elif name == "least mode":
            if made.trial.point.covers:
                made.add(name, min(values), 1 - FEWEST, expected=1.0, steps=steps)
        else:
            guided_by = made.trial.teacher.guidance != 1 and name == "mean"
            made.add("guided mean" if guided_by else name, max(values), SMALL, steps=steps)


# Fields -------------------------------------------------------------------------------------------


def _field(made: Judge) -> None:
    """The network against the exact denoiser, over states of the data at even times."""
    trial = made.trial
    teacher, process = trial.teacher, trial.trainer.process
    even = measure.even_normals(POINTS, 2 * teacher.mixture.dim + 2, seed=3)
    dim = teacher.mixture.dim
    x, component = teacher.mixture.sample(even[:, :dim], torch.special.ndtr(even[:, -1]))
    z = even[:, dim : 2 * dim].float()
    t = torch.special.ndtr(even[:, -2]).float() * process.t_max
    label = None
    if teacher.oracle.classes:
        places = {one: k for k, one in enumerate(teacher.mixture.classes)}
        label = torch.tensor([places[one] for one in teacher.mixture.labels])[component]
    cond = Cond(label)
    x_t = process.noise(x.float(), z, t)
    exact, own = (
        teacher.oracle(x_t, t, cond).velocity,
        trial.trainer.best().at(1.0)(x_t, t, cond).velocity,
    )
    c = process.coefs(t).expand(x_t)
    target = c.d_alpha * x.float() + c.d_sigma * z
    error = (own - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    made.add("velocity error", float(error), SMALL)
    floor, loss = ((one - target).square().mean() for one in (exact, own))
    made.add("loss", float(loss), SMALL * float(floor), expected=float(floor))
