"""What a trial must show: expected beside measured, with a tolerance and a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.sampler import Sampled, sample
from stepdistill.oracles.mixture import Mixture
from stepdistill.proof import measure
from stepdistill.proof.trial import Trial

POINTS = 8192
STEPS = (1, 2, 4)  # student steps that are looked at, where the student has them
EXACT, SMALL = 1e-3, 2e-2  # affine students of maps; small networks, and laws learnt by samples
SHAPE = 6e-2  # shapes of small networks' laws: their fake score is a small network as well
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


@dataclass(frozen=True)
class Walks:
    """Paths of one trial to draw, of the same noises, in rectified flow's coordinates.

    Args:
        whose: "teacher" or "student".
        times: flow times, falling [T].
        states: at these [T, N, D].
    """

    whose: str
    times: Tensor
    states: Tensor


@dataclass
class Judge:
    """Collects the rows of a trial.

    Args:
        trial: what was trained.
        rows: so far.
        pictures: so far.
        walks: so far.
        notes: what cannot be judged, and why.
    """

    trial: Trial
    rows: list[Row] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    walks: list[Walks] = field(default_factory=list)
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


def worst(values: Sequence[float]) -> float:
    """The largest value; not finite if one is not."""
    bad = [value for value in values if not math.isfinite(value)]
    return bad[0] if bad else max(values)
