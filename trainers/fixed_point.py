"""What theory says a method reaches: declared beside its code, held against runs by ``prove``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stepdistill.diffusion.process import Process
from stepdistill.diffusion.timesteps import Grid, grid_between
from stepdistill.oracles.mixture import Mixture
from stepdistill.run.plug import made
from stepdistill.trainers.solvers import Walk

STEADY = {"lr": 1e-2, "betas": (0.0, 0.99), "decay": "cosine", "clip": None}
"""A proof's optimizer: with momentum, a target that is a derivative of what is trained swings."""
FOLLOWED = 128  # steps of a walk that stands for the flow itself


def followed(t: float, process: Process) -> Grid:
    """Times from t to 0, so many that Heun's walk by them is the flow, without a solver's bias."""
    return grid_between(t, 0.0, FOLLOWED, process)


@dataclass(frozen=True)
class FixedPoint:
    """Where a converged student stands, on a teacher in closed form.

    Args:
        kind: "map": every noise has its own image, the end of the teacher's walk; "law": only the
            distribution of the images is given; "field": the network is the exact denoiser.
        follow: for maps, the times by which the teacher is walked from a time on, down to 0, or to
            where the student's step from that time leads. The student inherits the bias of these
            steps, whole.
        solver: of the walk; of one that draws noise, the mean.
        ends: the student is told where a step ends, and lands where that walk passes by.
        straight: the student's own paths are straight: one step lands where many do.
        joint: a walk of several of the student's steps ends where one step of the map leads.
        smooth: the student is compared by derivatives in time, or at all times at once, so that
            the small student of a proof is smooth in time.
        sampled: each sample's target is right on average alone, so that the student is known as far
            as a finite number of samples tells.
        tilt: from the law of the data to that whose teacher the student becomes, by a reward.
        pooled: only the moments of the images predicted at all steps of the grid together are
            given, since one fake score sees them as one; a step's own law may differ.
        levels: noise levels, beside 0, at which the student's states have the noised data's law.
        guided: the law is that of the guided teacher, where it is guided; else the data's own.
        covers: no mode of the data may be lost on the way there.
    """

    kind: Literal["map", "law", "field"]
    follow: Callable[[float], Grid] | None = None
    solver: Literal["euler", "heun"] | Walk = "euler"
    ends: bool = False
    straight: bool = False
    joint: bool = False
    smooth: bool = False
    sampled: bool = False
    tilt: Callable[[Mixture], Mixture] | None = None
    pooled: bool = False
    levels: tuple[float, ...] = ()
    guided: bool = True
    covers: bool = False

    @property
    def walk(self) -> Walk:
        """The solver itself."""
        return made(Walk, self.solver)  # type: ignore[type-abstract]


@dataclass(frozen=True)
class Proof:
    """A setting in which a method is proven.

    Args:
        teachers: closed-form teachers that ``prove`` takes where none is named.
        keys: config keys, over the recipe of the fixed point's kind.
        effort: training steps, as a multiple of that recipe's.
        batch: samples of a step, as a multiple of that recipe's.
    """

    teachers: tuple[str, ...]
    keys: Mapping[str, Any] = field(default_factory=dict)
    effort: float = 1.0
    batch: int = 1
