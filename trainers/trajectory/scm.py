"""Continuous-time consistency (sCM): the clean estimate stays the same along the teacher's flow.

The student's velocity is pulled along the tangent of its own clean estimate, a total derivative in
time along the teacher's velocity (sCD) or along the line from image to noise (sCT), so that there
is no step whose size would matter.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Prediction
from stepdistill.diffusion.derivative import Way, rate
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.sampler import NoiseSource
from stepdistill.diffusion.timesteps import Density, Grid, LogitNormal
from stepdistill.losses.continuous import Angle, Normal, bounded, field, tangent
from stepdistill.losses.regression import mean_square
from stepdistill.run.errors import UserError
from stepdistill.run.ratios import sample_parts
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Turn
from stepdistill.trainers.by_output import ByOutput, ByOutputConfig
from stepdistill.trainers.derived import derived, known
from stepdistill.trainers.dropping import Dropping, DroppingConfig
from stepdistill.trainers.fixed_point import STEADY, FixedPoint, Proof, followed
from stepdistill.trainers.trajectory.scales import Scales, ScalesConfig
from stepdistill.trainers.trajectory.time_weight import TimeWeight

CALM = STEADY | {"lr": 3e-3}
UNIFORM = {"t": {"kind": "uniform"}, "derivative": "jvp", "warmup": 0}
PLAIN = {"normal": "none", "adaptive": False}
"""In one dimension a normalised tangent is a sign."""


class SCMConfig(ScalesConfig, DroppingConfig, ByOutputConfig):
    """Settings of ``scm``."""

    idle: ClassVar = {
        "difference_step": ("derivative=jvp",),
        "norm_floor": ("normal=clamp", "normal=none"),
    }

    t: Density | None = Field(
        None, description="density of times; null: lognormal noise as published, in sigma_data"
    )
    velocity: Literal["teacher", "data"] = Field(
        "teacher", description="the path: the teacher's flow (sCD), or image to noise (sCT)"
    )
    sigma_data: float | None = Field(
        None,
        gt=0,
        description="the data's standard deviation; null: 0.5, as of pixels, or as the process has "
        "it; latents scaled to unit variance have 1",
    )
    warmup: int | None = Field(
        None,
        ge=0,
        description="steps over which the derivative grows to its whole weight; null: a tenth of "
        "all, without which sCM tends to diverge early",
    )
    cosine: bool = Field(
        True, description="weigh the tangent by its angle's cosine (sCM), which is 0 at pure noise"
    )
    normal: Normal = Field("norm", description="how a tangent is kept small")
    norm_floor: float = Field(0.1, gt=0, description="added to the norm that it is divided by")
    adaptive: bool = Field(True, description="weigh times by a learned function of theirs")
    derivative: Way = Field(
        "upwind",
        description="how the derivative along the path is taken, see ``bench jvp``: upwind looks "
        "back in time and damps most of what its step does not resolve; forward mode is exact, "
        "fast waves of time embeddings included, and damps nothing",
    )
    difference_step: float = Field(
        0.05, gt=0, le=0.5, description="of the difference, in flow time; upwind takes two"
    )


class SCMTrainer(Scales, Dropping, ByOutput):
    """sCM (Lu and Song 2024): sCD, and with ``velocity: data`` sCT; spec M9.

    Here: in the network's own process and time, whatever they are, and without changes to it, but
    for ``guidance_range``; and with tangents of networks that predict noise in units of that noise
    (``by_output``). What makes it stable is a derivative that looks back in time (``derivative``),
    where the paper changes the network.
    """

    Config = SCMConfig
    config: SCMConfig
    needs: Literal["labels", "data", "pairs"] = "data"
    noise: NoiseSource = "fresh"
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    published: ClassVar = (math.log(2) - 1.0, 1.4)  # of ln tan tau, for pixels of deviation 0.5
    weigh: TimeWeight | None = None
    proofs: ClassVar = {
        "distillation": Proof(("gaussian", "classes"), UNIFORM | {"optim": CALM}, effort=0.8),
        "plain tangent": Proof(("gmm1d",), UNIFORM | PLAIN | {"optim": CALM}, effort=0.8),
        "looking back": Proof(
            ("gaussian",),
            UNIFORM | {"derivative": "upwind", "difference_step": 0.01, "optim": CALM},
            effort=0.8,
        ),
        "training": Proof(
            ("gaussian",),
            UNIFORM | PLAIN | {"cosine": False, "velocity": "data", "optim": CALM},
            effort=1.2,
            batch=4,
        ),
    }

    def setup(self) -> None:
        """The student, and a weight of times.

        Raises:
            UserError: guidance along the data's own path, or what dropout and ``by_output`` refuse.
        """
        c = self.config
        self.check_dropout()
        self.check_output()
        if c.velocity == "data" and c.guided:
            raise UserError(
                "guidance: velocity=data asks the teacher nothing that could be guided; set "
                "guidance=1 and no guidance_range"
            )
        if c.warmup is not None and c.warmup >= c.steps:
            raise UserError(
                f"warmup={c.warmup}: the derivative would never have its whole weight in "
                f"steps={c.steps}; lower it"
            )
        count = math.prod(self.teacher.sample_shape)  # a tangent of norm 1 has squares 1 / count
        first = count if c.normal == "norm" else 1
        self.weigh = TimeWeight.beside(c, self.device, first) if c.adaptive else None
        net, copy = self.heeding(self.initial)
        self.add_player(
            "student", net, c.optim, ema=True, total=c.steps, extra=self.weigh, copy=copy
        )
        self.data = c.sigma_data or self.process.sigma_data

    @property
    def fixed_point(self) -> FixedPoint:
        """The teacher's flow, followed to its end."""
        return FixedPoint(
            "map", follow=self.chain, solver="heun", smooth=True, sampled=self.by_samples
        )

    @property
    def by_samples(self) -> bool:
        """Whether a sample's target is right on average alone."""
        return self.config.velocity == "data"

    @cached_property
    def times(self) -> Density:
        """The density that times are drawn from."""
        return self.config.t or self.lognormal(*self.published)

    def lognormal(self, mean: float, std: float) -> LogitNormal:
        """Times at which ln(n / sigma_data) ~ N(mean, std^2), n the noise-to-signal ratio."""
        return LogitNormal(mean=mean + math.log(self.data), std=std)

    def chain(self, t: float) -> Grid:
        """Times from t to 0, so many that the walk is the flow."""
        return followed(t, self.process)

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        return [Turn("student", self.loss)]

    @property
    def warmup(self) -> int:
        """Steps before the derivative has its whole weight."""
        own = self.config.warmup
        return self.config.steps // 10 if own is None else own

    def warmth(self, step: int) -> float:
        """Weight of the derivative at a step."""
        return min(1.0, (step + 1) / (self.warmup + 1))

    def states(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States x_t at times t [B], and the clean and noise parts x, z of the path's velocity."""
        assert batch.x is not None
        t, z = self.drawn(self.times, rng.uniform("t", batch.index)), self.z(batch, rng)
        x_t = self.process.noise(batch.x, z, t)
        if self.config.velocity == "data":
            return x_t, t, batch.x, z
        with torch.no_grad():
            pred = guided(self.teacher, x_t, t, batch.cond, self.scale(batch, rng))
        return x_t, t, pred.x, pred.z

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Pull the student's velocity along the tangent."""
        batch = self.telling(batch, rng)
        return self.along(*self.states(batch, rng), batch, rng)

    def along(self, x_t: Tensor, t: Tensor, x: Tensor, z: Tensor, batch: Batch, rng: Rng) -> Loss:
        """The loss at states x_t [B, ...] and times t [B] of a path with parts x and z."""
        c, student = self.config, self.denoiser("student")
        at = Angle.of(self.process, t, self.data, cosine=c.cosine)
        k = self.process.coefs(t).expand(x_t)
        with self.dropping(batch, rng, student):
            pred = student(x_t, t, batch.cond)
            found = self.field(pred)
            slope = rate(
                student,
                x_t,
                t,
                batch.cond,
                k.d_alpha * x + k.d_sigma * z,
                self.field,
                way=c.derivative,
                step=c.difference_step,
                value=known(found, c),
            )
        own, real = found.detach(), field(x, z, k, self.data)
        raw = tangent(own, slope, real, x_t, at, self.warmth(rng.step))
        if c.normal != "norm":  # what is divided by its norm has no units
            raw = self.by_field(raw, t)
        pull = bounded(raw, c.normal, c.norm_floor)
        each = mean_square(self.by_field(found - own, t) - pull)
        logs = {"tangent": raw.flatten(1).norm(dim=1).mean()}
        if self.weigh is not None:
            each = self.weigh.weighed(each, torch.atan2(at.sin, at.cos))
        loss = each.mean()
        return Loss(loss, {"loss": loss} | logs | sample_parts(pred.x))

    def field(self, pred: Prediction) -> Tensor:
        """F of a prediction [B, ...]."""
        return field(pred.x, pred.z, pred.c, self.data)

    def by_field(self, delta: Tensor, t: Tensor) -> Tensor:
        """A difference in F [B, ...] at times t [B], see :meth:`ByOutput.evened`."""
        return self.evened(delta, t, lambda x, z: field(x, z, self.process.coefs(t), self.data))

    def passes(self) -> list[Pass]:
        """The teacher's velocity, the derivative, and the student."""
        c = self.config
        asked = [Pass("teacher", "forward", 1, 2 if c.guided else 1)]
        own = [*derived(c.derivative, config=c), Pass("student", "train")]
        return own if c.velocity == "data" else asked + own


TRAINER = SCMTrainer
