"""What methods made of segments share: states from the data, or from the teacher's own walk."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.sampler import first_state, full, move
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Pass
from stepdistill.trainers.solvers import Data
from stepdistill.trainers.trajectory.pcm import NEAR, PCMConfig, PCMTrainer


class SegmentsConfig(PCMConfig):
    """Settings of methods made of segments."""

    idle: ClassVar = {**PCMConfig.idle, "walk_steps": ("states=data",)}

    states: Literal["data", "teacher"] = Field(
        "data", description="noisy states of the data, or of the teacher's walk from pure noise"
    )
    walk_steps: int = Field(
        8,
        ge=1,
        description="least steps of the teacher's whole walk; one a segment if these are more",
    )


class SegmentsTrainer(PCMTrainer):
    """A trainer of segments whose states may come without any data.

    The path is cut into even parts, one a segment or more; the teacher's walk to a time takes as
    many even steps as there are parts from the noisiest down to the time's own, so that cleaner
    states come of more steps (TLCM).
    """

    config: SegmentsConfig

    def setup(self) -> None:
        """See :meth:`PCMTrainer.setup`.

        Raises:
            UserError: a solver that needs data where there is none.
        """
        if self.config.states == "teacher":
            if isinstance(self.config.solver, Data):
                raise UserError(
                    "solver=data takes states of images, and states=teacher has none; set "
                    "solver=euler or states=data"
                )
            self.needs = "labels"
        super().setup()

    def noised(self, t: Tensor, batch: Batch, rng: Rng) -> Tensor:
        """See :meth:`ConsistencyTrainer.noised`; or the teacher's own states."""
        if self.config.states == "data":
            return super().noised(t, batch, rng)
        return self.reached(t, batch, rng)

    def reached(self, t: Tensor, batch: Batch, rng: Rng) -> Tensor:
        """States at times t [B] on the teacher's walks from pure noise.

        All samples are walked by as many steps as the longest; those that have arrived stay.
        """
        z, asked, process = self.z(batch, rng), self.asked(batch, rng), self.process
        now = full(z, self.top)
        x = first_state(process, z, self.top)
        first, last = process.unwarp(now), process.unwarp(t)
        done = (first - last) / first * self.walk  # parts above t; at a border, t is the lower's
        steps = ((done + NEAR).floor() + 1).clamp_max(self.walk)
        for k in range(1, self.walk + 1):
            part = (k / steps).clamp_max(1)
            then = torch.where(part < 1, process.warp(first + part * (last - first)), t)
            x = torch.where(expand(k <= steps, x), move(asked(x, now), process, then), x)
            now = then
        return x

    @property
    def walk(self) -> int:
        """Steps of the teacher's whole walk."""
        return max(self.config.walk_steps, len(self.milestones) - 1)

    def walk_passes(self) -> list[Pass]:
        """Passes of the teacher for states."""
        if self.config.states == "data":
            return []
        size = 2 if self.config.guided else 1
        return [Pass("teacher", "forward", self.walk, size)]

    def passes(self) -> list[Pass]:
        """See :meth:`ConsistencyTrainer.passes`; and the teacher's for states."""
        return super().passes() + self.walk_passes()
