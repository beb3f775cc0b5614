"""Adversarial methods without a fake score: a student and a discriminator take turns.

The student's turn comes first; the discriminator's all train on the very samples that it made.
The student predicts clean samples from noise, or from data noised to the levels of its grid.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.process import expand
from stepdistill.run.errors import UserError
from stepdistill.run.ratios import sample_parts
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Trainer, Turn
from stepdistill.trainers.fixed_point import FixedPoint
from stepdistill.trainers.score.opponent import DiscriminatorOptim, Opponent
from stepdistill.trainers.settings import TrainConfig


class OpposingConfig(TrainConfig):
    """Settings of methods without a fake score."""

    discriminator: DiscriminatorOptim = Field(
        default_factory=DiscriminatorOptim, description="the discriminator's optimizer"
    )
    discriminator_steps: int = Field(
        1, ge=1, description="discriminator updates a student update, on the same samples"
    )


class LevelsConfig(OpposingConfig):
    """Settings of students that train from noised data."""

    student_steps: int = Field(1, ge=1, description="steps of the student's grid")
    noise: Literal["fresh", "predicted"] = Field(
        "fresh", description="what the sampler's steps end with, in the export"
    )


class OpposingTrainer(Trainer):
    """Student and discriminator in turns; a method says what the discriminator reads."""

    config: OpposingConfig
    opponent: Opponent
    needs: Literal["labels", "data", "pairs"] = "data"
    clips = True
    asks = False  # whether the teacher is asked at all, which guidance needs
    made: Tensor | None = None

    def setup(self) -> None:
        """The student starts as the teacher; the discriminator is heads on a frozen network.

        Raises:
            UserError: guidance where no teacher is asked.
        """
        c = self.config
        if c.guided and not self.asks:
            raise UserError(
                f"guidance: {c.method} does not ask the teacher for an image; set guidance=1"
            )
        self.add_player(
            "student", self.initial, c.optim, ema=True, total=c.steps, fixed=self.fixed()
        )
        self.opponent = self.opposed()
        total = c.steps * c.discriminator_steps
        heads, base = self.opponent.net, self.teacher
        self.add_player(
            "discriminator", base, c.discriminator, ema=False, total=total, extra=heads, frozen=True
        )

    @abstractmethod
    def opposed(self) -> Opponent:
        """The discriminator."""

    def fixed(self) -> Iterable[str]:
        """Names of the student's parameters that are not trained."""
        return ()

    @abstractmethod
    def generate(self, batch: Batch, rng: Rng) -> Tensor:
        """Clean samples of the student, part of the graph."""

    def beside(self, made: Tensor, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """What the student's samples cost beside the discriminator [B], by name."""
        return {}

    def turns(self, step: int) -> list[Turn]:
        """The student once, then the discriminator ``discriminator_steps`` times."""
        own = [Turn("discriminator", self.discriminator_loss)] * self.config.discriminator_steps
        return [Turn("student", self.student_loss), *own]

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        """Make samples, and leave them for the discriminator."""
        x = self.generate(batch, rng)
        self.made = x.detach()
        parts = {"adversarial": self.opponent.against(x, batch, rng), **self.beside(x, batch, rng)}
        loss = torch.stack([part.mean() for part in parts.values()]).sum()
        logs = {name: part.mean() for name, part in parts.items()}
        return Loss(loss, {"loss": loss, **logs, **sample_parts(self.made)})

    def discriminator_loss(self, batch: Batch, rng: Rng) -> Loss:
        """Tell the student's samples of this step from the data."""
        assert self.made is not None
        parts = self.opponent.loss(self.made, batch, rng)
        return Loss(parts["loss"], parts)

    def passes(self) -> list[Pass]:
        """The student's own; frozen networks on pictures are not among them."""
        return [Pass("student", "train")]


class LevelsTrainer(OpposingTrainer):
    """A student that predicts clean samples from data noised to a level of its grid."""

    config: LevelsConfig

    def setup(self) -> None:
        """See :meth:`OpposingTrainer.setup`."""
        self.sizes, self.noise = (self.config.student_steps,), self.config.noise
        (grid,) = self.grids().values()
        self.levels = torch.tensor(grid[:-1], device=self.device)
        super().setup()

    @property
    def fixed_point(self) -> FixedPoint:
        """The data's law: of the one step, or of the images at all levels together.

        The discriminator does not see which level an image was predicted at.
        """
        return FixedPoint("law", pooled=self.config.student_steps > 1)

    def generate(self, batch: Batch, rng: Rng) -> Tensor:
        """The clean samples predicted at a level drawn for each; the noisiest has no data in it.

        There the student is given what a sampler begins with.
        """
        assert batch.x is not None
        z, place = self.z(batch, rng), rng.integers("exit", batch.index, len(self.levels))
        t = self.levels[place]
        x = batch.x.masked_fill(expand(place == 0, batch.x), 0.0)
        return self.shown(self.denoiser("student")(self.process.noise(x, z, t), t, batch.cond).x)
