"""Mean flow: the student's average velocity keeps the identity that ties it to the flow's own.

With u the average velocity of the step from t to r, u = v - (t - r) du/dt along the flow, where v
is the velocity of the image's own straight path, or the teacher's. The right side is held constant.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.derivative import Way
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.timesteps import Density, LogitNormal
from stepdistill.losses.flow_map import eulerian_gap, mixed_velocity, power_weighted
from stepdistill.losses.regression import sum_square
from stepdistill.run.errors import UserError
from stepdistill.run.ratios import sample_parts
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Turn
from stepdistill.trainers.derived import derived
from stepdistill.trainers.fixed_point import STEADY, Proof
from stepdistill.trainers.trajectory.jumps import CORNERS, Draw, JumpConfig, JumpTrainer

Share = Annotated[float, Field(ge=0, le=1)]
GUIDING = ("kappa", "guided_times", "label_drop")  # keys of a student that guides itself


class MeanFlowConfig(JumpConfig):
    """Settings of ``mean_flow``."""

    idle: ClassVar = {**JumpConfig.idle, "power_floor": ("power=0",)}

    t: Density = Field(
        default_factory=lambda: LogitNormal(mean=-0.4),
        description="density of which two times are drawn: the noisier one begins a step",
    )
    derivative: Way = Field(
        "upwind",
        description="how the derivative along the flow is taken, see ``bench jvp``: upwind looks "
        "back in time and damps most of what its step does not resolve; forward mode (published) "
        "is exact, fast waves of time embeddings included, and damps nothing",
    )
    power: float = Field(
        1.0, ge=0, le=1, description="losses are divided by (loss + power_floor)^power; 0: plain"
    )
    power_floor: float = Field(0.01, gt=0, description="floor of the losses in that power")
    kappa: float = Field(
        0.92,
        ge=0,
        lt=1,
        description="of velocity=data with guidance: weight of the student's own field in the "
        "target, of which 1 - kappa times guidance is the image's",
    )
    guided_times: tuple[Share, Share] = Field(
        (0.0, 0.75), description="of velocity=data: times, as progress, at which it is guided"
    )
    label_drop: float = Field(
        0.1, ge=0, lt=1, description="of velocity=data with guidance: share of images without label"
    )


class MeanFlowTrainer(JumpTrainer):
    """MeanFlow (Geng et al. 2025), spec M14, from data or as distillation.

    Here: the share of samples whose step has no length is drawn a sample, and the derivative is
    taken for all, by default looking back in time, where the paper's is exact.
    """

    Config = MeanFlowConfig
    config: MeanFlowConfig
    proofs: ClassVar = {
        name: Proof(
            (teacher,),
            {"diagonal": 0.25, "t": CORNERS, "power": 0.0, "derivative": "jvp", "optim": STEADY},
            effort=effort,
            batch=4,
        )
        for name, teacher, effort in (("gains", "gaussian", 0.5), ("teacher", "gmm1d", 0.8))
    }

    def setup(self) -> None:
        """See :meth:`JumpTrainer.setup`.

        Raises:
            UserError: times in the wrong order, or settings that have no effect.
        """
        low, high = self.config.guided_times
        if low > high:
            raise UserError("guided_times: the first must not be above the second")
        fields = MeanFlowConfig.model_fields
        idle = [key for key in GUIDING if getattr(self.config, key) != fields[key].default]
        if idle and not self.mixes:
            raise UserError(
                f"{idle[0]}: is of students that guide themselves; set velocity=data and a "
                "guidance other than 1, or leave it out"
            )
        super().setup()

    @property
    def mixes(self) -> bool:
        """Whether the student's own fields guide it."""
        return self.config.velocity == "data" and self.config.guided

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """The weighted square of what the identity misses."""
        c = self.config
        draw = self.draw_steps(self.dropped(batch, rng), rng)
        v = self.field(draw)
        u = self.student(draw.x_t, draw.t, draw.told).drift
        u_s = self.whole_slope(draw, v, u)
        square = sum_square(self.by_drift(eulerian_gap(u, u_s, v, draw.way), draw.t))
        loss = power_weighted(square, c.power, c.power_floor).mean()
        x, _ = self.parts(u, draw.x_t, draw.t)
        return Loss(loss, {"loss": loss, "gap": square.mean()} | sample_parts(x))

    def dropped(self, batch: Batch, rng: Rng) -> Batch:
        """The batch, of which some lose their labels where the student guides itself."""
        if not self.mixes:
            return batch
        lost = rng.uniform("drop", batch.index) < self.config.label_drop
        return replace(batch, cond=batch.cond.unlabelled(lost, int(self.teacher.null_label or 0)))

    @torch.no_grad()
    def field(self, draw: Draw) -> Tensor:
        """The velocity in flow coordinates at the states: the teacher's or the image's own, which
        the student's own fields may guide."""
        c = self.config
        if c.velocity == "teacher":
            return self.taught(draw.x_t, draw.t, draw.cond)
        label = draw.cond.label
        if not self.mixes or label is None:
            return draw.straight
        null = torch.full_like(label, int(self.teacher.null_label or 0))
        both = draw.still.stack(replace(draw.still, label=null))
        x_t, t = torch.cat([draw.x_t, draw.x_t]), torch.cat([draw.t, draw.t])
        own, free = self.student(x_t, t, both).drift.chunk(2)
        scale = c.guidance if draw.cond.guidance is None else expand(draw.cond.guidance, own)
        omega = scale * (1 - c.kappa)
        mixed = mixed_velocity(draw.straight, free, own, omega, c.kappa)
        progress = self.process.unwarp(draw.t)
        low, high = c.guided_times
        here = (progress >= low) & (progress <= high) & (label != null)
        return torch.where(expand(here, mixed), mixed, draw.straight)

    def passes(self) -> list[Pass]:
        """A trained pass, the derivative's, and whoever says the velocity."""
        c = self.config
        own = [Pass("student", "train"), *derived(c.derivative, config=c)]
        if c.velocity == "teacher":
            return [*own, Pass("teacher", "forward", 1, 2 if c.guided else 1)]
        return [*own, Pass("student", "forward", 1, 2)] if self.mixes else own


TRAINER = MeanFlowTrainer
