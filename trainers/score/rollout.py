"""Students that walk a fixed grid: one step, or several by backward simulation (DMD2)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.sampler import full, sample
from stepdistill.run.rng import Rng
from stepdistill.trainers.fixed_point import FixedPoint
from stepdistill.trainers.score.engine import Sample, ScoreConfig, ScoreTrainer


class GridConfig(ScoreConfig):
    """Settings of a student on a grid."""

    student_steps: int = Field(1, ge=1, description="steps of the student's grid")
    noise: Literal["fresh", "predicted"] = Field(
        "fresh", description="what the sampler's steps end with, in training and in the export"
    )
    critic_rollout: bool = Field(
        True,
        description="in several steps, train fake score and head on what the sampler makes; false: "
        "on images predicted at drawn exits, which the student is compared by (DMD2)",
    )


class GridTrainer(ScoreTrainer):
    """A student whose samples are the clean images predicted at a drawn exit of its grid.

    With ``critic_rollout`` fake score and head know the sampler's last step alone. Training rests
    where that has the data's law; until then they pull earlier exits too, whose own law they do
    not know, so that no divergence of it is lowered and no density ratio is exact there.
    """

    config: GridConfig
    covers: ClassVar[bool] = False  # whether no mode of the data may be lost on the way

    def setup(self) -> None:
        """See :meth:`ScoreTrainer.setup`."""
        super().setup()
        self.sizes = (self.config.student_steps,)
        self.noise = self.config.noise

    @property
    def fixed_point(self) -> FixedPoint:
        """The data's law; with a fake score of exits, that of the images at all exits together.

        A fake score of exits is one for all of them: it holds their mixture to the data and does
        not see where two miss it in opposite ways. One of whole rollouts sees what is sampled.
        """
        return FixedPoint(
            "law",
            pooled=self.config.student_steps > 1 and not self.whole,
            guided=self.config.guide.leads,
            covers=self.covers,
        )

    @property
    def exits(self) -> int:
        """How many steps of the grid, from the noisiest, are exits."""
        return self.config.student_steps

    @property
    def whole(self) -> bool:
        """See :attr:`ScoreTrainer.whole`."""
        return self.config.critic_rollout and self.config.student_steps > 1

    def walk(self, batch: Batch, rng: Rng, stop: int | None) -> Tensor:
        """The state after ``stop`` steps of the sampler from pure noise; its images if None."""
        (grid,) = self.grids().values()
        return sample(
            self.denoiser(self.active),
            self.z(batch, rng),
            grid,
            batch.cond,
            noise=self.noise,
            clip=self.config.clip,
            fresh=lambda i: self.z(batch, rng, f"fresh-{i}"),
            stop=stop,
        )

    def generate(self, batch: Batch, rng: Rng, *, exact: bool) -> Sample:
        """The clean image predicted at one exit of the grid, the same on every process."""
        (grid,) = self.grids().values()
        last = self.config.student_steps - 1
        exit_at = last if exact else rng.integer("exit", self.exits)
        with torch.no_grad():
            x_t = self.walk(batch, rng, exit_at)
        t = full(x_t, grid[exit_at])
        x = self.shown(self.denoiser(self.active)(x_t, t, batch.cond).x)
        return Sample(x, 0.0, x, known=not self.whole or exit_at == last)

    @property
    def rollout(self) -> tuple[float, float]:
        """See :attr:`ScoreTrainer.rollout`; exits are drawn evenly."""
        steps = self.config.student_steps
        return (steps - 1) / 2, steps if self.whole else (steps + 1) / 2
