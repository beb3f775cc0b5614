"""SANA-Sprint: continuous-time consistency and a discriminator on the frozen teacher together.

The tangent keeps the student to the teacher's flow; heads on the teacher's features tell its
estimates from the data, half of them from pure noise, where the tangent vanishes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Prediction
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.timesteps import Density
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Turn
from stepdistill.trainers.by_output import of_clean
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.opponent import ON_STATES, DiscriminatorOptim, TeacherConfig
from stepdistill.trainers.trajectory.rival import PLAYER, Rival
from stepdistill.trainers.trajectory.scm import CALM, PLAIN, UNIFORM, SCMConfig, SCMTrainer


class SprintOpponent(TeacherConfig):
    """The discriminator of ``sana_sprint``."""

    t: Density | None = Field(  # type: ignore[assignment]
        None,
        description="times to which samples and data are noised before they are told apart; null: "
        "lognormal noise as published, in sigma_data",
    )
    student: float = Field(0.5, ge=0, description="weight in the student's loss")


class SanaSprintConfig(SCMConfig):
    """Settings of ``sana_sprint``."""

    adversary: SprintOpponent = Field(
        default_factory=SprintOpponent, description="the discriminator, which reads the teacher"
    )
    discriminator: DiscriminatorOptim = Field(
        default_factory=DiscriminatorOptim, description="the discriminator's optimizer"
    )
    from_noise: float = Field(
        0.5, ge=0, le=1, description="share of adversarial samples that begin as pure noise"
    )
    mismatched: bool = Field(
        True, description="data under a wrong class counts as fake too, where there are classes"
    )


class SanaSprintTrainer(SCMTrainer):
    """SANA-Sprint (Chen et al. 2025), spec M10, after its published code.

    Here: times have no weight but the learned one; student and discriminator take turns within a
    step; data under wrong classes are drawn, not shifted; the tangent is taken in the
    teacher's own process, with no conversion, and the network is left as it is (its authors first
    tune it for normed queries and keys), but that the units of ``by_output`` are the heads' too.
    """

    Config = SanaSprintConfig
    config: SanaSprintConfig
    published: ClassVar = (math.log(2) + 0.2, 1.6)
    published_level: ClassVar = (math.log(2) - 0.6, 1.0)
    proofs: ClassVar = {
        "both": Proof(
            ("gaussian",),
            UNIFORM
            | {
                "optim": CALM,
                "adversary": ON_STATES,
            },
            effort=0.5,
            batch=4,
        ),
        "both, plain tangent": Proof(
            ("gmm1d",),
            UNIFORM | PLAIN | {"optim": CALM, "adversary": ON_STATES},
            effort=0.8,
        ),
    }

    def setup(self) -> None:
        """The student, and heads on the frozen teacher."""
        super().setup()
        c = self.config
        level = c.adversary.t or self.lognormal(*self.published_level)
        told = c.adversary.model_copy(update={"t": level})
        self.rival = Rival(self, told, c.discriminator, c.steps)

    @property
    def by_samples(self) -> bool:
        """See :attr:`SCMTrainer.by_samples`; the heads learn of samples."""
        return True

    def turns(self, step: int) -> list[Turn]:
        """The student, then the discriminator."""
        return [Turn("student", self.both), Turn(PLAYER, self.discriminator_loss)]

    def both(self, batch: Batch, rng: Rng) -> Loss:
        """The tangent's loss, and the discriminator's on other estimates."""
        batch = self.telling(batch, rng)
        own, x = self.loss(batch, rng), self.estimate(batch, rng)
        assert batch.x is not None
        clean = torch.zeros(len(x), device=x.device)
        part = self.rival.against(x, batch.x, clean, batch, rng)
        loss = own.value + part["adversarial"]
        return Loss(loss, own.logs | {"loss": loss} | part)

    def estimate(self, batch: Batch, rng: Rng) -> Tensor:
        """The student's clean estimates of noised data, or of pure noise [B, ...]."""
        assert batch.x is not None
        t = self.drawn(self.times, rng.uniform("adversarial-t", batch.index))
        noisiest = rng.uniform("noisiest", batch.index) < self.config.from_noise
        t = torch.where(noisiest, torch.full_like(t, self.top), t)
        x = torch.where(expand(noisiest, batch.x), 0, batch.x)
        x_t = self.process.noise(x, self.z(batch, rng, "adversarial-z"), t)
        pred: Prediction = self.denoiser("student")(x_t, t, batch.cond)
        return self.eased(pred.x, t, of_clean)

    def discriminator_loss(self, batch: Batch, rng: Rng) -> Loss:
        """Tell the step's estimates from the data, and the data from itself mislabelled."""
        other = self.mislabelled(batch, rng) if self.mismatches else None
        return self.rival.loss(batch, rng, other)

    @property
    def mismatches(self) -> bool:
        """Whether the discriminator is shown data under other classes."""
        return self.config.mismatched and len(self.teacher.classes) > 1

    def mislabelled(self, batch: Batch, rng: Rng) -> Batch:
        """The batch with another class for each sample, drawn evenly from the rest."""
        count = len(self.teacher.classes)
        by = 1 + rng.integers("mislabelled", batch.index, count - 1)
        assert batch.cond.label is not None
        return replace(batch, cond=replace(batch.cond, label=(batch.cond.label + by) % count))

    def passes(self) -> list[Pass]:
        """The tangent's, the adversarial estimate, and the teacher's for features."""
        own = [*super().passes(), Pass("student", "train"), *self.rival.passes()]
        taps = self.rival.opponent.names
        if self.mismatches and taps:
            own.append(Pass("teacher", "forward", 1, 1, "features", taps))
        return own


TRAINER = SanaSprintTrainer
