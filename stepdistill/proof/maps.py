"""Maps: every noise has its own image, which the student must draw, solver bias and all."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.sampler import first_state, full
from stepdistill.diffusion.timesteps import Grid
from stepdistill.losses.consistency import landing_estimate
from stepdistill.oracles.mixture import Mixture
from stepdistill.proof.couplings import judge_coupling
from stepdistill.proof.rows import (
    EXACT,
    SMALL,
    Judge,
    Picture,
    conds,
    drawn,
    looked_at,
    worst,
)
from stepdistill.proof.trial import Trial
from stepdistill.trainers.solvers import Asked

NEAR = 1e-6  # times that are one and the same


class Ideal(Denoiser):
    """The fixed point of a map as a denoiser, by the end of the teacher's walk from any state.

    A walk that ends before 0 is where one step leads: what is then estimated is the clean image
    with which a step of the sampler lands there. It is told where steps end if the student is.
    """

    def __init__(self, trial: Trial) -> None:
        oracle = trial.oracle
        super().__init__(
            oracle.net,
            oracle.process,
            "x0",
            adapter=oracle.adapter,
            classes=oracle.classes,
            null_label=oracle.null_label,
        )
        self.trial = (trial,)

    @property
    def ends(self) -> bool:
        """See :attr:`Denoiser.ends`."""
        return self.trial[0].point.ends

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Clean estimate [B, D] at one time for all."""
        (trial,) = self.trial
        assert trial.point.follow is not None
        times = trial.point.follow(float(t[0]))
        if cond.end is not None:
            last = float(cond.end[0])
            times = (*(time for time in times if time > last + NEAR), last)
        end = walk(trial, x_t, times, cond)
        if times[-1] == 0:
            return end
        t, r = full(x_t, times[0]), full(x_t, times[-1])
        return landing_estimate(x_t, end, t, r, self.process)


def walk(trial: Trial, x_t: Tensor, times: Grid, cond: Cond) -> Tensor:
    """The teacher's walk from states at the first of the times to the last; a random one's mean."""
    solver = trial.point.walk
    teacher = Asked(trial.oracle, cond, trial.trainer.config.guidance)
    for t, r in zip(times, times[1:], strict=False):
        x_t = solver(teacher, x_t, full(x_t, t), full(x_t, r))
    return x_t


def judge_map(made: Judge) -> None:
    """Images against the ends of the teacher's walks, from the same noise."""
    trial = made.trial
    point = trial.point
    sampled = point.sampled or point.tilt is not None or point.walk.random  # learnt by samples
    exact = trial.affine and not sampled
    tolerance = EXACT if exact else SMALL
    ideal, student = Ideal(trial), trial.trainer.best()
    for steps in looked_at(trial):
        gaps, sizes = [], []
        for label, cond in conds(trial):
            z, x = drawn(trial, student, steps, cond)
            if point.straight or point.joint:  # one step of the ideal, from this very noise
                assert point.follow is not None
                top = point.follow(trial.trainer.top)[0]  # where the teacher's own walk begins
                x_ideal = ideal(first_state(ideal.process, z, top), full(z, top), cond).x
            else:
                _, x_ideal = drawn(trial, ideal, steps, cond)
            gaps.append((x - x_ideal).double())
            sizes.append(x_ideal.double())
            if label in (None, 0):
                law = trial.oracle.law(label, trial.trainer.config.guidance)
                made.pictures.append(Picture(steps, z, x, x_ideal, law, paired=True))
                if steps == 1 and law is not None and len(law) == 1:
                    _gain(made, law, z, x, tolerance)
        size = torch.stack([one.std(dim=0).square().mean() for one in sizes]).mean().sqrt()
        error = torch.cat(gaps).square().mean().sqrt() / size
        made.add("map error", float(error), tolerance, steps=steps)
        if trial.teacher.guidance != 1:
            ends = [(gap.mean(dim=0).norm() / size) for gap in gaps]
            made.add("guided mean", worst([float(end) for end in ends]), tolerance, steps=steps)
    if trial.point.straight:
        judge_coupling(made)


def _gain(made: Judge, law: Mixture, z: Tensor, x: Tensor, tolerance: float) -> None:
    """Slope of the one-step map along each axis, in units of the data's standard deviation.

    An Euler step multiplies by rho_r / rho_t cos(phi_t - phi_r), phi the angle of (alpha s, sigma)
    and rho its length, and the walk by the product: the solver's bias in closed form.
    """
    trial = made.trial
    assert trial.point.follow is not None
    times = trial.point.follow(trial.trainer.top)
    axes = torch.eye(law.dim).double() if law.axes is None else law.axes[0]
    flat_z, flat_x = z.double() @ axes, x.double() @ axes
    for k, std in enumerate(law.stds[0].tolist()):
        bias = gain(trial, times, std)
        if bias is None:
            return
        slope = float((flat_z[:, k] * (flat_x[:, k] - flat_x[:, k].mean())).mean())
        made.add(f"gain, axis {k + 1}", slope / std, tolerance, expected=bias, steps=1)


def gain(trial: Trial, times: Grid, std: float) -> float | None:
    """What the walk along the times makes of noise, over a standard deviation of the data.

    A step that keeps the share k of the noise has the mean alpha_r x + k sigma_r z, and multiplies
    by (alpha_r alpha_t s^2 + k sigma_r sigma_t) / rho_t^2. None for solvers of other steps.
    """
    solver, process = trial.point.walk, trial.trainer.process
    ends = [torch.tensor([t], dtype=torch.float64) for t in times]
    total = process.coefs(ends[0]).sigma / std
    for t, r in zip(ends, ends[1:], strict=False):
        path = solver.times(t, r, process)
        for now, then in zip(path, path[1:], strict=False):
            kept, a, b = solver.kept(process, now, then), process.coefs(now), process.coefs(then)
            if kept is None:
                return None
            up = b.alpha * a.alpha * std**2 + kept * b.sigma * a.sigma
            total = total * up / ((a.alpha * std) ** 2 + a.sigma**2)
    return float(total)
