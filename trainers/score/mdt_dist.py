"""MDT-dist: the student learns the average velocity of the teacher's flow, and matches its law.

Velocity matching, on noised data: with u the average velocity from t down to 0, v = u + t du/dt
along the teacher's flow. Velocity distillation, on the student's own images: the student's field
takes the place of a fake score, so no further network is held.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.derivative import Way, along, drift
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.sampler import first_state, full
from stepdistill.diffusion.timesteps import Density, Grid, LogitNormal
from stepdistill.losses.regression import mean_square
from stepdistill.run.errors import UserError
from stepdistill.run.ratios import sample_parts
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Trainer, Turn
from stepdistill.trainers.derived import derived
from stepdistill.trainers.fixed_point import STEADY, FixedPoint, Proof, followed
from stepdistill.trainers.settings import TrainConfig

NORM_FLOOR = 0.1  # added to the norm that ``d_norm`` divides by


class MDTDistConfig(TrainConfig):
    """Settings of ``mdt_dist``."""

    idle: ClassVar = {"difference_step": ("derivative=jvp",)}

    matching: float = Field(1.0, ge=0, description="weight of velocity matching; 0: none")
    distillation: float = Field(1.0, ge=0, description="weight of velocity distillation; 0: none")
    derivative: Way = Field(
        "jvp",
        description="how du/dt is taken: see ``bench jvp``; differences that look back damp most "
        "of what their step does not resolve, forward mode nothing",
    )
    difference_step: float = Field(
        0.01, ge=0.005, le=0.1, description="step of the difference, in flow time"
    )
    d_norm: bool = Field(
        False, description="divide du/dt by its norm + 0.1: steadier, but another fixed point"
    )
    t: Density = Field(
        default_factory=lambda: LogitNormal(mean=1.0), description="density of training times"
    )
    noise: Literal["predicted", "fresh"] = Field(
        "predicted", description="what the sampler's steps end with, where there are several"
    )


class MDTDistTrainer(Trainer):
    """MDT-dist (velocity matching and velocity distillation), spec 5.19.

    Stated in rectified flow's coordinates y = x_t / (alpha + sigma), s = sigma / (alpha + sigma),
    which other processes are taken to; there x = y - s u is where the student lands. Here both
    parts share a density of times and a guidance scale, and losses are means over entries.
    """

    Config = MDTDistConfig
    config: MDTDistConfig
    needs = "data"
    sizes = (1, 2)
    proofs: ClassVar = {
        "both": Proof(
            ("gaussian",), {"t": {"kind": "uniform"}, "optim": STEADY | {"betas": (0.0, 0.999)}}
        ),
    }

    def setup(self) -> None:
        """The student.

        Raises:
            UserError: neither part has a weight.
        """
        c = self.config
        if not (c.matching or c.distillation):
            raise UserError("matching: it and distillation are both 0; give one of them a weight")
        self.noise = c.noise
        self.add_player("student", self.initial, c.optim, ema=True, total=c.steps)

    @property
    def fixed_point(self) -> FixedPoint:
        """The end of the teacher's flow from any state, without a solver's bias."""
        return FixedPoint("map", follow=self.chain, solver="heun", smooth=True)

    def chain(self, t: float) -> Grid:
        """Times from t to 0, so many that the walk is the flow."""
        return followed(t, self.process)

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Both parts by their weights."""
        c, logs = self.config, {}
        value = torch.zeros((), device=self.device)
        if c.matching:
            part, estimate = self.match(batch, rng)
            logs["matching"], value = part, value + c.matching * part
        if c.distillation:
            part, estimate = self.distil(batch, rng)
            logs["distillation"], value = part, value + c.distillation * part
        return Loss(value, {"loss": value} | logs | sample_parts(estimate))

    def match(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """Velocity matching at noised data; and the student's clean estimate [B, ...]."""
        assert batch.x is not None
        t = self.drawn(self.config.t, rng.uniform("t", batch.index))
        x_t = self.process.noise(batch.x, self.z(batch, rng), t)
        _, target = self.target(x_t, t, batch)
        pred = self.denoiser("student")(x_t, t, batch.cond)
        return mean_square(drift(pred) - target).mean(), pred.x

    def distil(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """Velocity distillation at the student's own images; and these [B, ...].

        The gradient in the image is 2 (u* - u) / s, along the gap of the clean estimates.
        """
        z = self.z(batch, rng, "own-z")
        top = full(z, self.top)
        x_top = first_state(self.process, z, self.top)
        made = self.denoiser("student")(x_top, top, batch.cond)
        t = self.drawn(self.config.t, rng.uniform("own-t", batch.index))
        x_t = self.process.noise(made.x.detach(), self.z(batch, rng, "e"), t)
        own, target = self.target(x_t, t, batch)
        v = drift(made)
        return mean_square((own - target) + v - v.detach()).mean(), made.x

    @torch.no_grad()
    def target(self, x_t: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's u at states x_t and times t [B], and u* = v - s du/ds, each [B, ...]."""
        c = self.config
        real = guided(self.teacher, x_t, t, batch.cond, c.guidance)
        own, slope = along(
            self.denoiser("student"),
            x_t,
            t,
            batch.cond,
            real.velocity,
            drift,
            way=c.derivative,
            step=c.difference_step,
        )
        slope = slope / expand(self.process.flow_rate(t), slope)
        if c.d_norm:
            norm = slope.flatten(1).norm(dim=1)
            slope = slope / (expand(norm, slope) + NORM_FLOOR)
        return own, drift(real) - expand(self.process.flow_time(t), slope) * slope

    def passes(self) -> list[Pass]:
        """A trained pass, the teacher's, and those of the derivative, for each part."""
        c = self.config
        parts = int(c.matching > 0) + int(c.distillation > 0)
        here = [Pass("student", "forward", parts)] if c.derivative == "central" else []
        return [
            Pass("student", "train", parts),
            *derived(c.derivative, parts),
            *here,
            Pass("teacher", "forward", parts, 2 if c.guided else 1),
        ]


TRAINER = MDTDistTrainer
