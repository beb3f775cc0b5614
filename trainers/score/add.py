"""ADD: adversarial diffusion distillation, a discriminator on pictures and the teacher's estimate.

The student predicts clean samples from noised data. A discriminator on features of a frozen
network tells them from the data, and a distillation term draws them to what the teacher makes of
them, noised again.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.timesteps import Density, Uniform
from stepdistill.losses.regression import sum_square
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Pass
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.opponent import PictureConfig, PictureOpponent
from stepdistill.trainers.score.opposing import LevelsConfig, LevelsTrainer
from stepdistill.trainers.settings import Section


class DistilConfig(Section):
    """The distillation term of ADD."""

    weight: float = Field(2.5, ge=0, description="weight of the whole term; 0: it is not asked")
    c: Literal["alpha", "alpha_sigma", "one"] = Field(
        "alpha", description="c(t): alpha, alpha sigma, or 1 at all times"
    )
    t: Density = Field(
        default_factory=lambda: Uniform(low=0.02, high=0.98),
        description="times to which the samples are noised for the teacher",
    )


class ADDConfig(LevelsConfig):
    """Settings of ``add``."""

    adversary: PictureConfig = Field(
        default_factory=PictureConfig, description="the discriminator, on pictures"
    )
    distil: DistilConfig = Field(
        default_factory=DistilConfig, description="the term that draws to the teacher's estimate"
    )


class ADDTrainer(LevelsTrainer):
    """ADD (Sauer et al. 2023), spec 5.16; its settings are from memory, none read in its code.

    Here: levels of the grid are drawn evenly, R1 is the approximate one, the heads are told the
    class alone, and the features are whatever frozen network the config names.
    """

    Config = ADDConfig
    config: ADDConfig
    proofs: ClassVar = {
        "adversarial alone": Proof(
            ("gaussian",),
            {
                "distil": {"weight": 0.0},
                "adversary": {
                    "features": {"kind": "random_conv", "widths": (16,)},
                    "head": "mlp",
                    "r1": 4.0,
                    "r1_noise": 0.5,
                },
            },
            effort=0.8,
            batch=4,
        ),
    }
    # The law is the fixed point of the discriminator alone: the distillation term is a regression
    # to a mean estimate, and draws the samples closer together than the data are.

    def setup(self) -> None:
        """See :meth:`OpposingTrainer.setup`; the distillation term asks the teacher."""
        self.asks = self.config.distil.weight > 0
        super().setup()

    def opposed(self) -> PictureOpponent:
        """See :meth:`OpposingTrainer.opposed`."""
        return PictureOpponent(self.config.adversary, self.teacher, self.config.seed)

    def beside(self, made: Tensor, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """The term weight c(t) ||x - D_T(noised x)||^2 of each sample, the estimate held."""
        c = self.config.distil
        if not c.weight:
            return {}
        t = self.drawn(c.t, rng.uniform("t", batch.index))
        with torch.no_grad():
            x_t = self.process.noise(made.detach(), self.z(batch, rng, "e"), t)
            aim = self.shown(guided(self.teacher, x_t, t, batch.cond, self.config.guidance).x)
        k = self.process.coefs(t)
        factor = {"alpha": k.alpha, "alpha_sigma": k.alpha * k.sigma}.get(c.c, torch.ones_like(t))
        return {"distance": c.weight * factor * sum_square(made - aim)}

    def passes(self) -> list[Pass]:
        """The student's, and the teacher's where the distillation term is on."""
        own = super().passes()
        if not self.config.distil.weight:
            return own
        return [*own, Pass("teacher", "forward", 1, 2 if self.config.guided else 1)]


TRAINER = ADDTrainer
