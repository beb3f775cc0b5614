"""Diff-Instruct: the gap of fake score and teacher, as it is, moves a one-step student.

The integral over noise levels of KL(student || data), each level weighted so that the gap of the
two clean estimates counts alike at all of them, without a normaliser.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stepdistill.diffusion.timesteps import Density, LogitNormal
from stepdistill.losses.gap import Weight
from stepdistill.run.plug import Plugged
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.matching import Matching, MatchingConfig
from stepdistill.trainers.score.rollout import GridConfig, GridTrainer


class DiffInstructConfig(GridConfig, MatchingConfig):
    """Settings of ``diff_instruct``; its two laws of noise levels are EDM's, as its code has."""

    weights: tuple[Plugged[Weight], ...] = Field(
        (), description="factors of the direction, multiplied; none: the bare gap"
    )
    student_t: Density = Field(
        default_factory=lambda: LogitNormal(mean=-1.2, std=1.2),
        description="times at which student and teacher are compared",
    )
    critic_t: Density = Field(
        default_factory=lambda: LogitNormal(mean=-1.2, std=1.2),
        description="times at which the fake score trains",
    )


class DiffInstructTrainer(Matching, GridTrainer):
    """Diff-Instruct (Luo et al. 2023), spec 5.1.

    Here: both losses as the engine has them, in its heads' own targets, and a grid of several steps
    if asked for.
    """

    Config = DiffInstructConfig
    config: DiffInstructConfig
    clips = True
    proofs: ClassVar = {"one step": Proof(("gaussian",))}


TRAINER = DiffInstructTrainer
