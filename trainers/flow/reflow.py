"""Reflow: straighten a flow by regressing its velocity on its own pairs of noise and image.

Any diffusion model is a flow up to scale and time, so that teachers which predict noise, v or EDM's
output will do as well. A student is again a flow: its exported pipeline is the teacher of the next
round.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from stepdistill.data.batch import Batch
from stepdistill.diffusion.sampler import twice
from stepdistill.diffusion.timesteps import Density, Grid, UShaped, uniform_grid
from stepdistill.losses.reflow import ReflowMetric, velocity_loss
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.flow.lines import (
    LineConfig,
    LineTrainer,
    PerceptualConfig,
)

LEAST_TIME = 1e-5  # by which a perceptual distance is divided at most


class FlowPerceptualConfig(PerceptualConfig):
    """LPIPS's distance beside the velocity's, as in 2-rectified flow++."""

    divided: bool = Field(
        True, description="divide it by the flow's time (small images), or not (ImageNet's recipe)"
    )


class ReflowConfig(LineConfig):
    """Settings of ``reflow``."""

    t: Density = Field(default_factory=UShaped, description="density of training times")
    metric: ReflowMetric = Field("huber", description="l2, huber, or faded_huber (1 - t)")
    perceptual: FlowPerceptualConfig | None = Field(
        None, description="a distance of features beside it, with faded_huber; null: none"
    )
    update: Literal["predicted", "initial", "heun"] | None = Field(
        None,
        description="the sampler's steps: predicted noise, which is Euler's step; the initial one, "
        "rf++'s new update, for flows from pure noise; or heun, Euler's and a second pass where it "
        "leads, so that there are 1, 3, 5 or 7 passes; null: predicted",
    )


class ReflowTrainer(LineTrainer):
    """One reflow round with rf++'s density and premetrics (Lee et al. 2024), specs 4 and 6.

    2-rectified flow++ is ``metric: faded_huber`` with ``perceptual``, of any of these teachers
    (``rfpp-digits``). Here: LPIPS is of whatever frozen network the config names; times are drawn
    one by one, where the paper draws t and 1 - t jointly; and a noise predictor's paths begin a
    little below pure noise (``start``), its velocity being singular there.
    """

    Config = ReflowConfig
    config: ReflowConfig
    flows = True
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    proofs: ClassVar = {
        "pairs": Proof(("gaussian", "gmm1d", "gmm2d", "classes"), {"metric": "l2"}),
        "pairs by Heun": Proof(
            ("gaussian", "gmm1d", "gmm2d"),
            {"metric": "l2", "pairs": {"solver": "heun", "steps": 32}},
        ),
        "pairs by DPM-Solver++": Proof(
            ("gaussian", "gmm1d"), {"metric": "l2", "pairs": {"solver": "dpm", "steps": 64}}
        ),
        "huber": Proof(("gaussian",), {"metric": "huber"}),
        "rf++": Proof(
            ("gaussian",),
            {"metric": "faded_huber", "perceptual": {"weight": 0.1}, "update": "initial"},
        ),
    }

    def setup(self) -> None:
        """See :meth:`LineTrainer.setup`.

        Raises:
            UserError: a perceptual distance beside a velocity's that leaves it no room, or the
                initial noise where paths do not begin at pure noise.
        """
        super().setup()
        c = self.config
        if c.perceptual is not None and c.metric != "faded_huber":
            raise UserError(
                f"perceptual: 2-rectified flow++ has it beside metric=faded_huber, and not "
                f"{c.metric}; set that, or perceptual=null"
            )
        if c.update == "initial" and (self.process.name != "rf" or self.start != 1):
            raise UserError(
                "update=initial: paths from another state than pure noise have another noise than "
                "the initial; set update=null, or take a flow teacher and start=null"
            )
        self.noise = c.update or "predicted"
        self.sizes = (1, 3, 5, 7) if c.update == "heun" else self.sizes
        self.perceptual = self.look(c.perceptual)

    def grids(self) -> dict[int, Grid]:
        """See :meth:`Trainer.grids`; by Heun of so many passes."""
        if self.config.update != "heun":
            return super().grids()
        return {n: twice(uniform_grid(self.process, (n + 1) // 2, self.start)) for n in self.sizes}

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Velocity against the pair's straight path, and the images beside it."""
        c = self.config
        x, z = self.pair(batch)
        z = self.line(x, z)
        t = self.drawn(c.t, rng.uniform("t", batch.index))
        pred = self.denoiser("student")(self.process.noise(x, z, t), t, batch.cond)
        s = self.process.flow_time(t)
        per_sample = velocity_loss(self.velocity(pred), x, z, s, c.metric)
        if self.perceptual is None or c.perceptual is None:
            loss = per_sample.mean()
            return Loss(loss, {"loss": loss})
        seen = self.perceptual(pred.x, x)
        if c.perceptual.divided:
            seen = seen / s.clamp_min(LEAST_TIME)
        loss, looks = per_sample.mean(), seen.mean()
        return Loss(loss + looks, {"loss": loss + looks, "velocity": loss, "perceptual": looks})

    def passes(self) -> list[Pass]:
        """The student alone."""
        return [Pass("student", "train")]


TRAINER = ReflowTrainer
