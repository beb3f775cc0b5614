"""What the score-distillation methods share: a student, a fake score, and how they take turns.

The student's turn comes first; the fake score's first turn trains on the very samples that it
made (as DMD2 does), any further ones on fresh samples.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.heads import HEADS
from stepdistill.diffusion.sampler import full
from stepdistill.diffusion.timesteps import Density, LogitNormal, Uniform
from stepdistill.losses.distribution import Renoise
from stepdistill.run.player import OptimConfig
from stepdistill.run.ratios import gap_parts, sample_parts
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Trainer, Turn
from stepdistill.trainers.settings import TrainConfig


class ScoreConfig(TrainConfig):
    """Settings of the score-distillation family."""

    critic: OptimConfig = Field(
        default_factory=lambda: OptimConfig(lr=4e-4, betas=(0.0, 0.999)),
        description="the fake score's optimizer",
    )
    critic_steps: int = Field(1, ge=1, description="fake-score updates a student update")
    student_t: Density = Field(
        default_factory=lambda: Uniform(low=0.02, high=0.98),
        description="times at which student and teacher are compared",
    )
    critic_t: Density = Field(
        default_factory=LogitNormal, description="times at which the fake score trains"
    )
    critic_weight: Literal["ratio", "clamp", "none"] = Field(
        "ratio", description="weight of the fake score's loss near the sample's own level"
    )


@dataclass(frozen=True)
class Sample:
    """A student's sample.

    Args:
        x: the sample [B, C, *S], at noise level ``level``.
        level: time of the sample; 0 is clean.
        reference: the clean estimate that it came from, for normalisers.
    """

    x: Tensor
    level: float
    reference: Tensor


class ScoreTrainer(Trainer):
    """Student and fake score in turns; a method adds ``generate`` and ``compare``."""

    config: ScoreConfig
    shared: Sample | None = None

    def setup(self) -> None:
        """Student and fake score both start as the teacher."""
        c = self.config
        self.add_player("student", self.initial, c.optim, ema=True, total=c.steps)
        self.add_player("critic", self.initial, c.critic, ema=False, total=c.steps * c.critic_steps)

    def turns(self, step: int) -> list[Turn]:
        """The student once, then the fake score ``critic_steps`` times."""
        critic = [Turn("critic", self.critic_loss)] * self.config.critic_steps
        return [Turn(self.active, self.student_loss), *critic]

    @property
    def active(self) -> str:
        """Name of the player that is the student at present."""
        return "student"

    @abstractmethod
    def generate(self, batch: Batch, rng: Rng, *, exact: bool) -> Sample:
        """A sample of the student; ``exact`` asks for the one that inference would make."""

    @abstractmethod
    def compare(self, made: Sample, batch: Batch, rng: Rng) -> Loss:
        """The student's loss on its sample."""

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        """Generate with a graph, compare, and leave the sample for the fake score."""
        made = self.generate(batch, rng, exact=False)
        self.shared = self.hand_over(made)
        return self.compare(made, batch, rng)

    def hand_over(self, made: Sample) -> Sample | None:
        """The student's sample as the fake score may train on it, or None to make another."""
        return Sample(made.x.detach(), made.level, made.reference.detach())

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        """Denoising score matching on the student's samples."""
        made, self.shared = self.shared, None
        if made is None:
            with torch.no_grad():
                made = self.generate(batch, rng, exact=True)
        critic = self.denoiser("critic")
        t = self.times(self.config.critic_t, made.level, batch, rng)
        kernel = self.kernel(made.x, made.level, t)
        e = self.z(batch, rng, "critic-e")
        h = critic.raw(kernel.state(made.x, e), t, batch.cond)
        target = kernel.target(critic.head, made.x, e, self.process.sigma_data)
        error = kernel.weight(self.config.critic_weight) * (h - target) ** 2
        loss = error.mean()
        return Loss(loss, {"loss": loss})

    def vitals(
        self, made: Sample, fake: Tensor, real: Tensor, t: Tensor, e: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What tells whether the run is well, from the estimates that a comparison has anyway.

        Args:
            made: the student's sample.
            fake: the fake score's clean estimate at times t, of the sample noised by e.
            real: the teacher's.
            t: times [B].
            e: the noise; a clean sample needs none.
        """
        x, weight = made.x.detach(), None
        if made.level > 0 and e is not None:
            kernel = self.kernel(x, made.level, t)
            x, weight = kernel.target(HEADS["x0"], x, e), kernel.weight("ratio")
        return gap_parts(fake, real, x, made.reference, weight) | sample_parts(made.reference)

    def times(self, density: Density, level: float, batch: Batch, rng: Rng) -> Tensor:
        """Times [B] from a density, moved into the range from the sample's level to the top."""
        t = density.sample(rng.uniform("t", batch.index), self.process)
        return level + t * ((self.top - level) / self.process.t_max)

    def kernel(self, x: Tensor, level: float, t: Tensor) -> Renoise:
        """The way from a sample's level up to times t [B]."""
        at_s = self.process.coefs(full(x, level)).expand(x)
        return Renoise(at_s, self.process.coefs(t).expand(x))

    def passes(self) -> list[Pass]:
        """One-step generation, two frozen passes of the comparison, and the fake score's own."""
        c = self.config
        more = [Pass("student", "forward", c.critic_steps - 1)] if c.critic_steps > 1 else []
        return [
            Pass("student", "train"),
            Pass("critic", "forward"),
            Pass("teacher", "forward", 1, 2 if c.guided else 1),
            Pass("critic", "train", c.critic_steps),
            *more,
        ]
