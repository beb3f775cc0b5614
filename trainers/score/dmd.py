"""DMD: distribution matching distillation, the score part of DMD2 with backward simulation.

Each update draws an exit j of the student's grid, walks there as inference would (without a
graph), predicts the clean image with a graph, and moves it along the gap between a fake score,
trained online on the student's images, and the teacher's.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from stepdistill.data.batch import Batch
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.sampler import full, sample
from stepdistill.losses.distribution import dmd_direction
from stepdistill.losses.regression import pull
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.score.engine import Sample, ScoreConfig, ScoreTrainer


class DMDConfig(ScoreConfig):
    """Settings of ``dmd``."""

    student_steps: int = Field(1, ge=1, description="steps of the student's grid")
    noise: Literal["fresh", "predicted"] = Field(
        "fresh", description="what the sampler's steps end with, in training and in the export"
    )


class DMDTrainer(ScoreTrainer):
    """The score part of DMD2 (Yin et al. 2024), spec 5.4; the adversarial part is not in it."""

    Config = DMDConfig
    config: DMDConfig
    clips = True
    proofs: ClassVar = {
        "one step": Proof(("gaussian", "gmm2d", "classes")),
        "two steps": Proof(("gaussian",), {"student_steps": 2}),
    }

    def setup(self) -> None:
        """See :meth:`ScoreTrainer.setup`."""
        super().setup()
        self.sizes = (self.config.student_steps,)
        self.noise = self.config.noise

    @property
    def fixed_point(self) -> FixedPoint:
        """The data's law: of the one step, or of the images at all exits of the grid together.

        The fake score is one for all exits, so it holds their mixture to the data and does not
        see where two of them miss it in opposite ways.
        """
        return FixedPoint("law", pooled=self.config.student_steps > 1)

    def generate(self, batch: Batch, rng: Rng, *, exact: bool) -> Sample:
        """The clean image predicted at one exit of the grid, the same on every process."""
        (grid,) = self.grids().values()
        exit_at = rng.integer("exit", self.config.student_steps)
        student = self.denoiser("student")
        with torch.no_grad():
            x_t = sample(
                student,
                self.z(batch, rng),
                grid,
                batch.cond,
                noise=self.noise,
                clip=self.config.clip,
                fresh=lambda i: self.z(batch, rng, f"fresh-{i}"),
                stop=exit_at,
            )
        x = self.shown(student(x_t, full(x_t, grid[exit_at]), batch.cond).x)
        return Sample(x, 0.0, x)

    def compare(self, made: Sample, batch: Batch, rng: Rng) -> Loss:
        """Pull the image along the normalised gap of the two clean estimates."""
        x = made.x.detach()
        t = self.times(self.config.student_t, made.level, batch, rng)
        x_t = self.process.noise(x, self.z(batch, rng, "e"), t)
        with torch.no_grad():
            fake = self.denoiser("critic")(x_t, t, batch.cond).x
            real = guided(self.teacher, x_t, t, batch.cond, self.config.guidance).x
        loss = pull(made.x, dmd_direction(fake, real, made.reference.detach())).mean()
        logs = {"gap": (fake - real).abs().mean(), "direction": loss}
        return Loss(loss, logs | self.vitals(made, fake, real, t))

    def passes(self) -> list[Pass]:
        """Those of the engine, and the walk to the exit."""
        walk = (self.config.student_steps - 1) / 2 * self.config.critic_steps
        return super().passes() + ([Pass("student", "forward", walk)] if walk else [])


TRAINER = DMDTrainer
