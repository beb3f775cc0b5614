"""Diversity: what four-step students keep of a law with twenty-five modes.

All make as many student updates, from the same teacher. They differ in two things: whether the
steps are cut into phases, each with a law of its own to reach, and whether the fake score learns
the samples of whole rollouts or the images predicted at the drawn exits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.process import RF
from stepdistill.diffusion.sampler import NoiseSource, Sampled, full, sample
from stepdistill.diffusion.timesteps import Grid, uniform_grid
from stepdistill.oracles.mixture import Mixture
from stepdistill.oracles.named import Teacher, teacher_of
from stepdistill.proof import measure
from stepdistill.proof.rows import POINTS
from stepdistill.proof.trial import NETWORK, Case, run
from stepdistill.trainers.fixed_point import Proof

SIDE, WIDTH = 5, 0.05  # modes along an edge from -1 to 1; standard deviation of each
COVERED = 0.5  # of its weight that a mode must have
NEAR = 4.0  # standard deviations of a mode within which a sample is one of it
STEPS = 4


@dataclass(frozen=True)
class Entry:
    """A student that takes part.

    Args:
        name: in the table.
        method: its method.
        keys: of the method's config.
    """

    name: str
    method: str
    keys: Mapping[str, Any] = field(default_factory=dict)


def entries(shift: float = 1.0) -> list[Entry]:
    """The students, with steps at the times 1, 3/4, 1/2 and 1/4 warped by ``shift``."""
    grid = times(shift)
    exits, same = {"critic_rollout": False}, {"noise": "predicted"}
    dmd2 = {"student_steps": STEPS, "adversary": None}
    one = {"levels": (grid[0], 0.0), "phase_steps": STEPS}
    two = {"levels": (grid[0], grid[STEPS // 2], 0.0), "phase_steps": STEPS // 2}
    return [
        Entry("dmd2, fresh noise, fake score on exits", "dmd2", {**dmd2, **exits}),
        Entry("dmd2, predicted noise, fake score on exits", "dmd2", {**dmd2, **exits, **same}),
        Entry("dmd2, fresh noise", "dmd2", dmd2),
        Entry("dmd2, predicted noise", "dmd2", {**dmd2, **same}),
        Entry("phased_dmd, 1 phase of 4", "phased_dmd", one),
        Entry("phased_dmd, 2 phases of 2", "phased_dmd", two),
        Entry("phased_dmd, 2 phases of 2, fake score on exits", "phased_dmd", {**two, **exits}),
    ]


def times(shift: float) -> Grid:
    """The times of the steps, and 0; those inside a phase of ``phased_dmd`` are spread evenly."""
    return uniform_grid(RF(shift), STEPS)


@dataclass(frozen=True)
class Shares:
    """How samples spread over the modes of a law.

    Args:
        covered: modes with at least half of their weight.
        least: share of the most neglected mode, as a part of its weight.
        mass: total variation of the modes' shares from their weights; 0 to 1.
        sliced: sliced W1 to the law, in its standard deviations.
        near: share of samples within four standard deviations of a mode.
        seconds: of training; 0 for what is not trained.
        exits: of a student that has them, the mass error of the images predicted at each exit.
    """

    covered: int
    least: float
    mass: float
    sliced: float
    near: float
    seconds: float = 0.0
    exits: tuple[float, ...] = ()


def grid_teacher(shift: float = 1.0) -> Teacher:
    """Twenty-five equal modes on a square, by rectified flow with a time shift."""
    places = torch.linspace(-1, 1, SIDE, dtype=torch.float64).tolist()
    law = Mixture.of([[a, b] for a in places for b in places], stds=WIDTH)
    return teacher_of("grid", law, process=RF(shift))


def student_of(entry: Entry, seed: int, updates: int, shift: float = 1.0) -> Shares:
    """Train an entry and measure it.

    Args:
        entry: what to train.
        seed: of weights and noise.
        updates: of the student, over all phases.
        shift: of the times; below 1 they lie nearer to the images.
    """
    teacher = grid_teacher(shift)
    proof = Proof((), {**entry.keys, "seed": seed}, updates / NETWORK["law"]["steps"])
    trial = run(Case(entry.method, entry.name, teacher.name), teacher, proof=proof)
    made = trial.trainer
    grid, den = made.grids()[STEPS], made.best()
    with torch.no_grad():
        walked = walk(den, grid, made.noise)
        states = [walk(den, grid, made.noise, stop=place) for place in range(STEPS)]
        images = [
            den.at(t)(x, full(x, t), Cond(None)).x for t, x in zip(grid, states, strict=False)
        ]
    found = shares(walked, teacher.mixture, trial.seconds)
    return replace(found, exits=tuple(mass_error(x, teacher.mixture) for x in images))


def untrained(shift: float = 1.0) -> dict[str, Shares]:
    """What stands beside the students: the law's own samples, and the teacher in as few steps."""
    teacher = grid_teacher(shift)
    even = measure.even_normals(POINTS, 3, seed=5)
    own, _ = teacher.mixture.sample(even[:, :-1], torch.special.ndtr(even[:, -1]))
    grid = uniform_grid(teacher.oracle.process, STEPS)
    found = {"the law's own samples": shares(own, teacher.mixture)}
    sources: tuple[NoiseSource, ...] = ("fresh", "predicted")
    for noise in sources:
        x = walk(teacher.oracle, grid, noise)
        found[f"teacher, {noise} noise"] = shares(x, teacher.mixture)
    return found


@torch.no_grad()
def walk(den: Sampled, grid: Grid, noise: NoiseSource, stop: int | None = None) -> Tensor:
    """Samples [POINTS, 2] from evenly spread noise, at the end of a grid or on the way."""
    parts = measure.whitened(measure.even_normals(POINTS, 2 * STEPS)).float().split(2, dim=1)
    return sample(den, parts[0], grid, Cond(None), noise=noise, fresh=lambda i: parts[i], stop=stop)


def mass_error(x: Tensor, law: Mixture) -> float:
    """Total variation of the modes' shares among samples [N, D] from their weights; 0 to 1."""
    return float((law.shares(x.double()) - law.weights).abs().sum() / 2)


def shares(x: Tensor, law: Mixture, seconds: float = 0.0) -> Shares:
    """Measure samples [N, D] against a law."""
    x = x.double()
    part = law.shares(x)
    away = torch.cdist(x, law.means) / law.stds[:, 0]
    return Shares(
        covered=int((part >= COVERED * law.weights).sum()),
        least=measure.least_mode(x, law),
        mass=mass_error(x, law),
        sliced=measure.wasserstein1(x, law) / measure.scale(law),
        near=float((away.min(dim=1).values < NEAR).double().mean()),
        seconds=seconds,
    )
