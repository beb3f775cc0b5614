"""SIM: score implicit matching; the gradient flows through teacher and fake score.

The fake score learns the one-step student's own distribution; the student minimises a distance
between the two scores, by the theorem that makes its gradient computable.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from stepdistill.data.batch import Batch
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.sampler import full
from stepdistill.losses.implicit import Form, Space, sim_loss
from stepdistill.losses.regression import huber_constant
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.score.engine import Sample, ScoreConfig, ScoreTrainer


class SIMConfig(ScoreConfig):
    """Settings of ``sim``."""

    distance: Literal["pseudo_huber", "l2"] = Field(
        "pseudo_huber", description="distance between the two scores"
    )
    huber_scale: float = Field(0.00054, gt=0, description="c = huber_scale sqrt(dimensions)")
    space: Space = Field("x0", description="where the scores are compared")
    form: Form = Field("score", description="score: SIM; full: the total derivative")
    detach_norm: bool = Field(False, description="hold the distance's normaliser constant")


class SIMTrainer(ScoreTrainer):
    """Score implicit matching (Luo et al. 2024), spec 5.6, with a two-stage backward."""

    Config = SIMConfig
    config: SIMConfig
    clips = True
    proofs: ClassVar = {
        "score": Proof(("gaussian", "gmm2d", "classes"), {"huber_scale": 0.5}),
        "full": Proof(("gaussian",), {"huber_scale": 0.5, "form": "full"}),
    }

    @property
    def fixed_point(self) -> FixedPoint:
        """The data's law: a distance of scores at every noise level sees a lost mode."""
        return FixedPoint("law", covers=True)

    def generate(self, batch: Batch, rng: Rng, *, exact: bool) -> Sample:
        """One step from pure noise."""
        student = self.denoiser("student")
        z = self.z(batch, rng)
        t = full(z, self.grids()[1][0])
        scale = self.process.coefs(t).expand(z).sigma
        x = self.shown(student(scale * z, t, batch.cond).x)
        return Sample(x, 0.0, x)

    def compare(self, made: Sample, batch: Batch, rng: Rng) -> Loss:
        """The gradient in the image first, its own graph freed, then through the student."""
        c = self.config
        leaf = made.x.detach().requires_grad_()
        t = self.times(c.student_t, made.level, batch, rng)
        x_t = self.process.noise(leaf, self.z(batch, rng, "e"), t)
        fake = self.denoiser("critic")(x_t, t, batch.cond).x
        real = guided(self.teacher, x_t, t, batch.cond, c.guidance).x
        loss = sim_loss(
            leaf,
            fake,
            real,
            self.process.coefs(t).expand(leaf),
            distance=c.distance,
            c=huber_constant(leaf.shape, c.huber_scale),
            space=c.space,
            form=c.form,
            detach_norm=c.detach_norm,
        ).mean()
        (direction,) = torch.autograd.grad(loss, leaf)
        # Where the scores are one, as in the first step, the rest is rounding, which Adam would
        # blow up to a full step.
        one = (fake == real).flatten(1).all(dim=1)
        direction = direction.masked_fill(expand(one, direction), 0.0)
        logs = {"loss": loss, "gap": (fake - real).abs().mean()}
        return Loss((made.x * direction).sum(), logs | self.vitals(made, fake, real, t))

    def passes(self) -> list[Pass]:
        """As the engine's, but the comparison is differentiated in its input."""
        through = {("critic", "forward"), ("teacher", "forward")}
        return [
            Pass(p.role, "input", p.count, p.batch) if (p.role, p.kind) in through else p
            for p in super().passes()
        ]


TRAINER = SIMTrainer
