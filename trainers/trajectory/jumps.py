"""What flow maps and mean flow share: a student that is told where its step ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.derivative import Way, drift, rate
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.sampler import NoiseSource
from stepdistill.diffusion.timesteps import Density, Grid, Uniform
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.beginning import renewed
from stepdistill.trainers.by_output import ByOutput, ByOutputConfig, of_drift
from stepdistill.trainers.derived import known
from stepdistill.trainers.fixed_point import FixedPoint, followed
from stepdistill.trainers.trajectory.scales import Scales, ScalesConfig
from stepdistill.trainers.trajectory.time_weight import TimeWeight

CORNERS = {"kind": "u_shaped", "a": 4.0}
"""A proof's density of times: the longest steps, which are judged, are drawn as often as others."""


class JumpConfig(ScalesConfig, ByOutputConfig):
    """Settings of methods whose student is told where its step ends."""

    idle: ClassVar[Mapping[str, tuple[str, ...]]] = {"difference_step": ("derivative=jvp",)}

    velocity: Literal["teacher", "data"] = Field(
        "teacher", description="whose flow is learnt: the teacher's, or z - x of the images alone"
    )
    scratch: bool = Field(
        False, description="begin with fresh weights, and not the teacher's; with velocity=data"
    )
    t: Density = Field(
        default_factory=Uniform,
        description="density of which two times are drawn: the noisier one begins a step",
    )
    diagonal: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of samples whose step has no length, the field itself; null: 0.25 of a "
        "teacher's, as which the student begins, 0.75 of data",
    )
    derivative: Way = Field(
        "jvp",
        description="how derivatives along the flow are taken, see ``bench jvp``",
    )
    difference_step: float = Field(
        0.05, ge=0.001, le=0.1, description="of the difference, in flow time; upwind takes two"
    )


@dataclass(frozen=True)
class Draw:
    """What a loss is taken on.

    Args:
        x_t: states [B, ...] of images.
        t: their times [B].
        r: where steps end [B], no later than t.
        same: where they have no length on purpose, expanded.
        straight: z - x of the images [B, ...].
        way: the steps' length in flow time, expanded.
        cond: the conditions, without an end.
    """

    x_t: Tensor
    t: Tensor
    r: Tensor
    same: Tensor
    straight: Tensor
    way: Tensor
    cond: Cond

    @property
    def told(self) -> Cond:
        """The conditions with the steps' end."""
        return self.cond.ending(self.r)

    @property
    def still(self) -> Cond:
        """The conditions of steps without length."""
        return self.cond.ending(self.t)


class JumpTrainer(Scales, ByOutput):
    """Base of methods that learn the average velocity u(x_t, t, r) of a step from t to r.

    All is stated in rectified flow's coordinates y = x_t / (alpha + sigma) and
    s = sigma / (alpha + sigma), which other processes are taken to; a step of the sampler lands at
    y - (s_t - s_r) u in every process. What u misses is compared in units of the noise where a
    network predicts that (``by_output``), and logged so.
    """

    config: JumpConfig
    needs: Literal["labels", "data", "pairs"] = "data"
    noise: NoiseSource = "predicted"
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    further: ClassVar[Mapping[str, str]] = {"end": ""}  # what the student is told
    weigh: TimeWeight | None = None

    def setup(self) -> None:
        """The student, which is told where its step ends.

        Raises:
            UserError: a beginning that is not to be had, or an output that ``by_output`` is not of.
        """
        c = self.config
        self.check_output()
        if c.scratch and c.velocity == "teacher":
            raise UserError("scratch: a teacher's flow begins as the teacher; set scratch=false")
        first = renewed(self.initial, c) if c.scratch else self.initial
        own, _ = self.heeding(first, **self.further)
        self.add_player(
            "student",
            own,
            c.optim,
            ema=True,
            total=c.steps,
            copy=False,
            bare=self.through,
            extra=self.weigh,
        )

    @property
    def through(self) -> bool:
        """Whether a derivative of the student's is itself differentiated."""
        return False

    @property
    def resting(self) -> float:
        """Share of samples whose step has no length."""
        own, taught = self.config.diagonal, self.config.velocity == "teacher"
        return own if own is not None else 0.25 if taught else 0.75

    @property
    def student(self) -> Denoiser:
        """The network in training."""
        return self.denoiser("student")

    @property
    def fixed_point(self) -> FixedPoint:
        """The flow's own end of every step, without a solver's bias."""
        sampled = self.config.velocity == "data"
        return FixedPoint("map", follow=self.chain, solver="heun", ends=True, sampled=sampled)

    def chain(self, t: float) -> Grid:
        """Times from t to 0, so many that the walk is the flow."""
        return followed(t, self.process)

    def draw_steps(self, batch: Batch, rng: Rng) -> Draw:
        """Two times a sample, the noisier one the image's own, and the same twice for a share."""
        batch = self.telling(batch, rng)
        assert batch.x is not None
        one, two = (self.drawn(self.config.t, rng.uniform(k, batch.index)) for k in ("t", "r"))
        same = rng.uniform("diagonal", batch.index) < self.resting
        t = torch.where(same, one, torch.maximum(one, two))
        r = torch.where(same, one, torch.minimum(one, two))
        z = self.z(batch, rng)
        x_t = self.process.noise(batch.x, z, t)
        way = expand(self.process.flow_time(t) - self.process.flow_time(r), x_t)
        return Draw(x_t, t, r, expand(same, x_t), z - batch.x, way, batch.cond)

    @torch.no_grad()
    def taught(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The teacher's field, guided as the config says, in flow coordinates."""
        scale = self.config.guidance if cond.guidance is None else cond.guidance
        return guided(self.teacher, x_t, t.clamp_min(self.process.t_min), cond, scale).drift

    def parts(self, u: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The clean part x and the noise z of states, of which z - x is u."""
        c = self.process.coefs(t).expand(x_t)
        x = (x_t - c.sigma * u) / (c.alpha + c.sigma)
        return x, x + u

    def landed(self, u: Tensor, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The state at times r that steps with average velocity u lead to."""
        x, z = self.parts(u, x_t, t)
        c = self.process.coefs(r).expand(x_t)
        return c.alpha * x + c.sigma * z

    def speed(self, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt in the process's own time, where the field in flow coordinates is v."""
        x, z = self.parts(v, x_t, t)
        c = self.process.coefs(t).expand(x_t)
        return c.d_alpha * x + c.d_sigma * z

    def by_drift(self, delta: Tensor, t: Tensor) -> Tensor:
        """A difference in u [B, ...] at times t [B], see :meth:`ByOutput.evened`."""
        return self.evened(delta, t, of_drift)

    def whole_slope(self, draw: Draw, v: Tensor, u: Tensor) -> Tensor:
        """The derivative of the student's u in flow time, along the field v, without a graph."""
        c = self.config
        found = rate(
            self.student,
            draw.x_t,
            draw.t,
            draw.told,
            self.speed(v, draw.x_t, draw.t),
            drift,
            way=c.derivative,
            step=c.difference_step,
            value=known(u, c),
        )
        return found / expand(self.process.flow_rate(draw.t), found)
