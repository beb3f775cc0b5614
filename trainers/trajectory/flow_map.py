"""Flow maps: one network for the flow's step from any time to any other, taught by the flow.

The student's average velocity u(x_t, t, r) must satisfy one of three conditions, each of which is
the flow's alone: where its step lands moves with r as the field says there (Lagrangian), stays
where it is when the start moves along the field (Eulerian), or is where two steps lead
(progressive). Where r = t, u is the field: the teacher's, or that of the images.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.derivative import drift, slope
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.sampler import move
from stepdistill.losses.flow_map import eulerian_gap, lagrangian_gap, two_steps
from stepdistill.losses.regression import sum_square
from stepdistill.run.errors import UserError
from stepdistill.run.ratios import sample_parts
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Turn
from stepdistill.trainers.derived import derived
from stepdistill.trainers.fixed_point import STEADY, Proof
from stepdistill.trainers.trajectory.jumps import CORNERS, Draw, JumpConfig, JumpTrainer
from stepdistill.trainers.trajectory.time_weight import TimeWeight

IMAGES = {"velocity": "data", "diagonal": 0.75}
SHORT = 1e-3  # ways below it are as even in flow time as in the process's own


class FlowMapConfig(JumpConfig):
    """Settings of ``flow_map``."""

    idle: ClassVar = {**JumpConfig.idle, "gradient": ("form=psd_m", "form=psd_u")}

    form: Literal["lsd", "esd", "psd_m", "psd_u"] = Field(
        "lsd",
        description="the condition: Lagrangian, Eulerian, or two steps for one, divided in the "
        "middle or anywhere",
    )
    gradient: Literal["through", "semi"] = Field(
        "through",
        description="of lsd and esd: differentiate the student's derivative in time, as published, "
        "or hold it constant, which is cheaper",
    )
    adaptive: bool = Field(False, description="weigh pairs of times by a learned function of them")


class FlowMapTrainer(JumpTrainer):
    """Flow map matching and self-distillation (Boffi et al. 2024, 2025), spec M13.

    With ``velocity: data`` LSD, ESD, PSD-M and PSD-U; of a teacher their kin LMD and EMD, in which
    its field stands wherever the student's own would. Here: the learned weight (``adaptive``) is
    linear in waves of both times, a teacher's field is asked once a sample, at the place that
    the condition names, and the units of ``by_output`` are u's, where in esd by ``through`` the
    derivative moves by more.
    """

    Config = FlowMapConfig
    config: FlowMapConfig
    proofs: ClassVar = {
        name: Proof(
            teachers,
            {"diagonal": 0.25, "t": CORNERS, "optim": STEADY, **keys},
            effort=effort,
            batch=4,
        )
        for name, teachers, effort, keys in (
            ("lsd", ("gaussian",), 1.25, {"form": "lsd"}),
            ("lsd, semi", ("gmm1d",), 0.8, {"form": "lsd", "gradient": "semi"}),
            ("esd, semi", ("gaussian",), 0.5, {"form": "esd", "gradient": "semi"}),
            ("psd_m", ("gmm1d",), 0.8, {"form": "psd_m"}),
            ("images alone", ("gaussian",), 0.6, {"form": "lsd", "gradient": "semi"} | IMAGES),
        )
    }

    def setup(self) -> None:
        """See :meth:`JumpTrainer.setup`.

        Raises:
            UserError: nothing would tell the student the field, or settings that have no effect.
        """
        c = self.config
        if c.diagonal == 0 and (c.velocity == "data" or c.form.startswith("psd")):
            raise UserError(
                "diagonal: without steps of no length nothing tells this student the field; set "
                "diagonal=0.75"
            )
        if c.velocity == "data" and c.guided:
            raise UserError(
                "guidance: velocity=data asks the teacher nothing that could be guided; set "
                "guidance=1 and no guidance_range, or use method=mean_flow, which guides itself"
            )
        if c.derivative != "jvp" and (c.form, c.gradient) != ("esd", "semi"):
            raise UserError(
                f"derivative={c.derivative}: form={c.form} with gradient={c.gradient} takes none "
                "along the flow but in forward mode; set derivative=jvp"
            )
        if self.through and c.compile:
            raise UserError(
                "compile: a derivative that is differentiated is not compiled; set compile=false "
                "or gradient=semi"
            )
        if self.through and c.gradient_checkpointing:
            raise UserError(
                "gradient_checkpointing: a derivative that is differentiated cannot be recomputed; "
                "set gradient_checkpointing=false or gradient=semi"
            )
        self.weigh = TimeWeight.beside(c, self.device, times=2) if c.adaptive else None
        super().setup()

    @property
    def through(self) -> bool:
        """See :attr:`JumpTrainer.through`."""
        return self.config.gradient == "through" and not self.config.form.startswith("psd")

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """The square of what the condition misses."""
        draw = self.draw_steps(batch, rng)
        if self.config.form == "lsd":
            u, gap = self.lagrangian(draw)
        elif self.config.form == "esd":
            u, gap = self.eulerian(draw)
        else:
            half = torch.full_like(draw.t, 0.5)
            anywhere = self.config.form == "psd_u"
            place = rng.uniform("middle", batch.index) if anywhere else half
            u, gap = self.progressive(draw, place)
        each = sum_square(self.by_drift(gap, draw.t))
        loss, logs = each.mean(), {}
        if self.weigh is not None:
            logs = {"gap": loss}
            angles = (math.pi / 2 * self.process.flow_time(t) for t in (draw.t, draw.r))
            loss = self.weigh.weighed(each / gap[0].numel(), *angles).mean()
        x, _ = self.parts(u, draw.x_t, draw.t)
        return Loss(loss, {"loss": loss} | logs | sample_parts(x))

    def lagrangian(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """The student's u, and the gap of LSD; the field where it lands is held constant."""
        d_end = 1 / self.process.flow_rate(draw.r)
        with torch.set_grad_enabled(self.through):
            u, u_r = slope(self.student, draw.x_t, draw.t, draw.told, drift, d_end=d_end)
        if not self.through:
            u = self.student(draw.x_t, draw.t, draw.told).drift
        with torch.no_grad():
            landed = self.landed(u, draw.x_t, draw.t, draw.r)
            landed = torch.where(draw.same, draw.x_t, landed)
            v = self.field(landed, draw.r, draw)
        return u, lagrangian_gap(u, u_r, v, draw.way)

    def eulerian(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """The student's u, and the gap of ESD; what the field carries along is held constant."""
        v = self.field(draw.x_t, draw.t, draw)
        if not self.through:
            u = self.student(draw.x_t, draw.t, draw.told).drift
            u_s = self.whole_slope(draw, v, u)
            return u, eulerian_gap(u, u_s, v, draw.way)
        speed = self.speed(v, draw.x_t, draw.t)
        with torch.no_grad():
            _, carried = slope(self.student, draw.x_t, draw.t, draw.told, drift, d_x=speed)
        one = torch.ones_like(draw.t)
        u, in_time = slope(self.student, draw.x_t, draw.t, draw.told, drift, d_t=one)
        rate = expand(self.process.flow_rate(draw.t), u)
        return u, eulerian_gap(u, (in_time + carried) / rate, v, draw.way)

    def progressive(self, draw: Draw, place: Tensor) -> tuple[Tensor, Tensor]:
        """The student's u, and the gap of PSD with the middle at ``place`` [B] from r to t."""
        t, r = draw.t, draw.r
        m = torch.lerp(r, t, place)
        with torch.no_grad():
            first = self.student(draw.x_t, t, draw.cond.ending(m))
            second = self.student(move(first, self.process, m), m, draw.told).drift
            below = expand(self.process.flow_time(m) - self.process.flow_time(r), second)
            long = draw.way > SHORT
            share = torch.where(long, below / draw.way.clamp_min(SHORT), expand(place, second))
            target = two_steps(first.drift, second, share)
            at_rest = draw.straight
            if self.config.velocity == "teacher":
                at_rest = self.taught(draw.x_t, t, draw.cond)
            target = torch.where(draw.same, at_rest, target)
        u = self.student(draw.x_t, t, draw.told).drift
        return u, u - target

    @torch.no_grad()
    def field(self, x_t: Tensor, t: Tensor, draw: Draw) -> Tensor:
        """The field at states x_t and times t [B]: the teacher's, or what the student says of it,
        and that of the images themselves where steps have no length."""
        if self.config.velocity == "teacher":
            return self.taught(x_t, t, draw.cond)
        own = self.student(x_t, t.clamp_min(self.process.t_min), draw.cond).drift
        return torch.where(draw.same, draw.straight, own)

    def passes(self) -> list[Pass]:
        """A trained pass; the derivative's, where it is another; and whoever says the field."""
        c = self.config
        taught = c.velocity == "teacher"
        own: list[Pass] = []
        if c.form.startswith("psd"):
            own = [Pass("student", "forward", 2)]
        elif c.form == "esd":
            own = derived("jvp" if self.through else c.derivative, config=c)
        elif not self.through:
            own = derived("jvp")
        if not (taught or c.form.startswith("psd")):
            own.append(Pass("student", "forward"))
        asked = [Pass("teacher", "forward", 1, 2 if c.guided else 1)] if taught else []
        return [Pass("student", "train"), *own, *asked]


TRAINER = FlowMapTrainer
