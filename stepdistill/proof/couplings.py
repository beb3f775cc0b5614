"""Couplings: what a straight flow owes to the pairs that it has learnt, beside where they lead."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.sampler import Sampled, first_state, full
from stepdistill.eval.straightness import STEPS, flow_path, straightness
from stepdistill.losses.reflow import velocity_loss
from stepdistill.oracles.flow import flow_map
from stepdistill.oracles.mixture import Mixture
from stepdistill.proof import measure
from stepdistill.proof.rows import POINTS, SMALL, Judge, Walks, conds, drawn, worst
from stepdistill.proof.trial import Trial
from stepdistill.trainers.flow.lines import LineTrainer
from stepdistill.trainers.solvers import Euler

WALKS = 32  # paths of a picture
TIMES = 64  # even times of a mean over them
FINE = 512  # Euler steps of a path that stands for the flow itself


def judge_coupling(made: Judge) -> None:
    """Straightness, the loss on pairs and on shuffled ones; and where the pairs' solver has no
    noticeable bias, the modes' masses, the flow's own map and the transport that is saved."""
    trial = made.trial
    assert isinstance(trial.trainer, LineTrainer)
    _straightness(made)
    exact = not isinstance(trial.point.walk, Euler)
    shares, losses, gaps, saved = [], [], [], []
    for label, cond in conds(trial):
        law = trial.oracle.law(label, trial.teacher.guidance)
        z, x = drawn(trial, trial.trainer.best(), 1, cond)
        if exact and law is not None and len(law) > 1:
            shares.append(measure.mode_gap(x, law))
        losses.append(_loss(trial, x, z, cond) / _loss(trial, x.roll(1, 0), z, cond))
        if exact and law is not None:
            gaps.append(_gap(trial, law, x, z, cond))
        if exact and law is not None and trial.teacher.guidance == 1:
            saved.append(_saved(trial, law, x, z, cond))
    if shares:
        made.add("mode shares", worst(shares), SMALL, steps=1)
    made.add("loss on pairs, of that on shuffled ones", worst(losses), SMALL)
    if gaps:
        made.add("error to the flow itself", worst(gaps), SMALL, steps=1)
    if saved:
        far = max(saved, key=lambda value: abs(value - 1))
        made.add("transport saved, of straightness and loss floor", far, SMALL, expected=1.0)


def _straightness(made: Judge) -> None:
    """Of the student's paths in 32 even steps, over that of the teacher's."""
    trial, found = made.trial, list[float]()
    for whose, den, scale in (
        ("student", trial.trainer.best(), 1.0),
        ("teacher", trial.teacher.oracle, trial.teacher.guidance),
    ):
        total = 0.0
        for label, cond in conds(trial):
            z = measure.even_normals(POINTS, trial.teacher.mixture.dim).float()
            path, times = flow_path(den, z, trial.trainer.top, cond, guidance=scale)
            total += straightness(path, times)
            if not label:  # the first class, or none
                made.walks.append(Walks(whose, times, torch.stack(path)[:, :WALKS]))
        found.append(total)
    made.add("straightness, of the teacher's", found[0] / found[1], 0.1, steps=STEPS)


@torch.no_grad()
def _loss(trial: Trial, x: Tensor, z: Tensor, cond: Cond, den: Sampled | None = None) -> float:
    """Mean squared error of the velocity along the lines between x and z, the student's if none."""
    trainer = trial.trainer
    assert isinstance(trainer, LineTrainer)
    whose: Sampled = den or trainer.best()
    z, total = trainer.line(x, z), 0.0
    top = float(trainer.process.flow_time(torch.tensor([trainer.top], dtype=torch.float64)))
    s = top * (torch.arange(TIMES, dtype=torch.float64) + 0.5) / TIMES
    for t in trainer.process.time_of_flow(s).tolist():
        here = full(x, t)
        pred = whose.at(t)(trainer.process.noise(x, z, here), here, cond)
        total += float(velocity_loss(trainer.velocity(pred), x, z, here).mean()) / TIMES
    return total


def _gap(trial: Trial, law: Mixture, x: Tensor, z: Tensor, cond: Cond) -> float:
    """Error of images to the ends of the flow from their noise, in units of the law's spread."""
    oracle, top = trial.oracle, trial.trainer.top
    start = first_state(oracle.process, z, top)
    ends = flow_map(oracle, start, top, 0.0, cond, trial.teacher.guidance)
    return float((x.double() - ends).square().mean().sqrt()) / measure.scale(law)


def _saved(trial: Trial, law: Mixture, x: Tensor, z: Tensor, cond: Cond) -> float:
    """How much less noise is moved to its image than to any, over what theory says it is: the
    straightness of the teacher's paths and the least loss on independent pairs, in their sum.

    Source: methods-reflow spec 1.5; rectified flow (Liu et al. 2022), in the flow's coordinates.
    """
    dim = law.dim
    even = measure.even_normals(POINTS, 2 * dim + 1, seed=3)
    other, _ = law.sample(even[:, dim : 2 * dim], torch.special.ndtr(even[:, -1]))
    free = even[:, :dim].float()
    path, times = flow_path(trial.oracle, z, trial.trainer.top, cond, steps=FINE)
    floor = _loss(trial, other.float(), free, cond, trial.oracle)
    before = 1 + float(law.covariance().trace() + law.mean().square().sum()) / dim
    after = float((z - x).square().mean())
    return (before - after) / (straightness(path, times) + floor)
