"""Knowledge distillation on pairs: regress the teacher's image from its noise, in a step or a few.

With the student of ``reflow`` as its teacher it is InstaFlow's second stage.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field

from stepdistill.data.batch import Batch
from stepdistill.diffusion.timesteps import Grid, uniform_grid
from stepdistill.losses.reflow import PairMetric, pair_distance
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.flow.lines import (
    LineConfig,
    LineTrainer,
    PerceptualConfig,
)


class KDConfig(LineConfig):
    """Settings of ``kd``."""

    student_steps: int = Field(
        1,
        ge=1,
        le=16,
        description="student steps; with more than one, states lie on the lines of pairs, which "
        "are those of its walk for straight flows alone",
    )
    metric: PairMetric = Field("l2", description="l2 or huber, of the images")
    perceptual: PerceptualConfig | None = Field(
        None, description="a distance of features beside it; null: none"
    )


class KDTrainer(LineTrainer):
    """Direct distillation of noise to image (Luhman and Luhman 2021), spec 3; InstaFlow's, spec 5.

    A step from noise learns the image of that very noise. With several steps the states are
    (1 - s) x + s z at the grid's times, as in rectified flow's k-step distillation; those of a
    stored path of the teacher are not made. LPIPS is of whatever frozen network the config names.
    """

    Config = KDConfig
    config: KDConfig
    proofs: ClassVar = {
        "one step": Proof(("gaussian", "gmm1d", "classes")),
        "two steps": Proof(("gaussian",), {"student_steps": 2}, effort=0.5),
    }

    def setup(self) -> None:
        """See :meth:`LineTrainer.setup`; the student's grid is the one it is trained on."""
        super().setup()
        c = self.config
        self.sizes = (c.student_steps,)
        self.perceptual = self.look(c.perceptual)
        self.levels = torch.tensor(self.grid[:-1], device=self.device, dtype=torch.float32)

    @property
    def grid(self) -> Grid:
        """The student's own."""
        return uniform_grid(self.process, self.config.student_steps, self.start)

    @property
    def fixed_point(self) -> FixedPoint:
        """The end of the teacher's walk, whose line the student's own walk does not leave."""
        return replace(super().fixed_point, joint=True)

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Distance of the student's clean estimate to the pair's image."""
        c = self.config
        x, z = self.pair(batch)
        z = self.line(x, z)
        t = self.levels[rng.integers("level", batch.index, c.student_steps)]
        guess = self.denoiser("student")(self.process.noise(x, z, t), t, batch.cond).x
        loss = pair_distance(guess - x, c.metric).mean()
        if self.perceptual is None:
            return Loss(loss, {"loss": loss})
        looks = self.perceptual(guess, x).mean()
        return Loss(loss + looks, {"loss": loss + looks, "pixels": loss, "perceptual": looks})

    def passes(self) -> list[Pass]:
        """The student alone."""
        return [Pass("student", "train")]


TRAINER = KDTrainer
