"""TwinFlow: few-step flows that are their own critic, by a field for the student's own images.

One network is told a step's end, and whether its state comes from an image or from one of its own.
A quarter of the batch each: whole steps from pure noise, short ones, steps of any length, and the
field of own images. Whole steps are moved by what this field and the images' differ by, as a fake
score and a teacher would move them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.data.batch import Batch
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.sampler import first_state, full
from stepdistill.losses.regression import mean_square
from stepdistill.losses.twin_flow import barron_weighted, recursive_target, span_weight
from stepdistill.run.errors import UserError
from stepdistill.run.ratios import sample_parts
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Turn
from stepdistill.trainers.by_output import of_drift
from stepdistill.trainers.fixed_point import STEADY, FixedPoint, Proof
from stepdistill.trainers.trajectory.jumps import JumpConfig, JumpTrainer

PARTS = 4  # of a batch: whole, short, any, own
NEAR = 0.95  # of a short step's time, where it ends at the least
BOUND = 1.0  # of residuals
LEAST = 1e-3  # flow time at which a step begins


class TwinFlowConfig(JumpConfig):
    """Settings of ``twin_flow``."""

    t: None = Field(None, description="always null: times are even in flow time")  # type: ignore[assignment]
    diagonal: None = Field(None, description="always null: steps are of four kinds")
    derivative: None = Field(None, description="always null: none is taken")  # type: ignore[assignment]
    difference_step: None = Field(None, description="always null: none is taken")  # type: ignore[assignment]
    short: float = Field(
        0.01, gt=0, le=0.2, description="of each step, the length in flow time that is the field's"
    )
    parts: int = Field(2, ge=1, description="steps in which the student goes the rest of it")
    rectify: float = Field(
        0.5, ge=0, description="weight of the pull between the two fields, on whole steps"
    )
    images: bool = Field(
        True, description="learn from images; false: from the student's own, by velocity=teacher"
    )
    c: float = Field(1e-3, gt=0, description="root mean square below which losses are squares")


class TwinFlowTrainer(JumpTrainer):
    """TwinFlow, spec M15, from its published code and paper.

    Here: four neighbours of a batch have all kinds, turned about from step to step; the sign of
    time is a number of its own; times are even in flow time; the network in training is its own
    reference; passes whose differences a target divides by ``short`` are in fp32; and the teacher
    alone is guided.
    """

    Config = TwinFlowConfig
    config: TwinFlowConfig
    further: ClassVar = {"end": "", "twin": ""}
    proofs: ClassVar = {
        "teacher": Proof(
            ("gaussian",),
            {"optim": STEADY | {"lr": 3e-3}, "c": 0.1, "short": 0.005},
            effort=0.75,
            batch=4,
        ),
    }

    def setup(self) -> None:
        """See :meth:`JumpTrainer.setup`.

        Raises:
            UserError: neither images nor a teacher, or guidance without one.
        """
        c = self.config
        if c.velocity == "data" and c.guided:
            raise UserError(
                "guidance: velocity=data asks the teacher nothing that could be guided; set "
                "guidance=1 and no guidance_range, or use method=mean_flow, which guides itself"
            )
        if not c.images and c.velocity == "data":
            raise UserError("images=false: only a teacher knows the flow then; velocity=teacher")
        self.needs = "data" if c.images else "labels"
        super().setup()

    @property
    def fixed_point(self) -> FixedPoint:
        """The flow's own end of every step, but for Euler's bias in steps of ``short``."""
        return FixedPoint("map", follow=self.chain, solver="heun", ends=True, sampled=True)

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        return [Turn("student", self.loss)]

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """The flow times of the process's cleanest and of the student's noisiest time."""
        low, top = self.process.flow_time(torch.tensor([self.process.t_min, self.top])).tolist()
        return low, top

    def times(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """Each sample's kind, and the flow times s and r at which its step begins and ends [B]."""
        kind = (batch.index + rng.integer("kinds", PARTS)) % PARTS
        low, top = self.bounds
        s = (top * rng.uniform("t", batch.index)).clamp_min(max(low, LEAST))
        s = torch.where(kind == 0, torch.full_like(s, top), s)
        u = rng.uniform("r", batch.index)
        lower = (torch.zeros_like(s), s * (NEAR + (1 - NEAR) * u), s * (1 - u), s)
        return kind, s, torch.stack(lower).gather(0, kind[None])[0]

    def rows(self, kind: int, rng: Rng) -> slice:
        """This process's samples of a kind, of which it has none where its batch is small."""
        first = self.rank * (self.config.batch_size // self.world) + rng.integer("kinds", PARTS)
        return slice((kind - first) % PARTS, None, PARTS)

    def placed(self, s: Tensor) -> Tensor:
        """The process's times of flow times [B]."""
        if self.process.name == "rf":
            return s
        inside = self.process.time_at(-2 * torch.logit(s.clamp(1e-6, 1 - 1e-6)))
        return torch.where(s > 0, inside.clamp_max(self.top), torch.zeros_like(s))

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """The four kinds together, and the pull between the fields on the first."""
        with torch.autocast(self.device.type, enabled=False):
            return self.exact_loss(batch, rng)

    def exact_loss(self, batch: Batch, rng: Rng) -> Loss:
        """The loss, in fp32 but for own images and the fields at them."""
        c, batch = self.config, self.telling(batch, rng)
        kind, s, r = self.times(batch, rng)
        t, own = self.placed(s), kind == PARTS - 1
        z = self.z(batch, rng)
        x = self.images(batch, rng)
        seen = torch.where(expand(kind == 0, x), 0, x) if c.velocity == "teacher" else x
        x_t = self.process.noise(seen, z, t)
        told = replace(batch.cond, end=self.placed(r), twin=own.to(s))
        u = self.student(x_t, t, told).drift
        with torch.no_grad():
            v = self.taught(x_t, t, batch.cond) if c.velocity == "teacher" else z - x
            short = expand(torch.minimum(s - r, torch.full_like(s, c.short)), u).clamp_min(1e-6)
            rest = self.rest(x_t, s, r, short, v, batch.cond)
            way = torch.maximum(expand(s - r, u), short)  # a step without length is the field
            target = recursive_target(u, v, rest, way, short, BOUND)
            target = torch.where(expand(own, u), z - x, target)
        weight = torch.where(own, torch.ones_like(s), span_weight(s - r))
        off = mean_square(self.by_drift(u - target, t))
        loss = (weight * barron_weighted(off, c.c)).mean()
        logs = {"loss": loss, "distance": (u - target).abs().mean()}
        estimate, _ = self.parts(u, x_t, t)
        if c.rectify:
            whole = self.rows(0, rng)
            pull = self.pull(u[whole], estimate[whole], batch.rows(whole), rng) / len(batch)
            loss = loss + c.rectify * pull
            logs |= {"loss": loss, "pull": pull}
        return Loss(loss, logs | sample_parts(estimate))

    def images(self, batch: Batch, rng: Rng) -> Tensor:
        """The clean images [B, ...]: the student's own for samples of that kind, or for all."""
        if batch.x is None:
            return self.images_of_its_own(batch, rng)
        x, own = batch.x.clone(), self.rows(PARTS - 1, rng)
        if len(batch.index[own]):
            x[own] = self.images_of_its_own(batch.rows(own), rng).to(x)
        return x

    @torch.no_grad()
    def images_of_its_own(self, batch: Batch, rng: Rng) -> Tensor:
        """The student's images in one step [B, ...]."""
        z = self.z(batch, rng, "own-z")
        t, x_t = full(z, self.top), first_state(self.process, z, self.top)
        with self.autocast():
            made: Tensor = self.student(x_t, t, batch.cond.ending(torch.zeros_like(t))).x
        return made

    def rest(
        self, x_t: Tensor, s: Tensor, r: Tensor, short: Tensor, v: Tensor, cond: Cond
    ) -> Tensor:
        """The student's way from the end of the field's part on to r, in ``parts`` steps."""
        count = self.config.parts
        at = s - short.flatten(1)[:, 0]
        step = (at - r).clamp_min(0) / count
        state = self.landed(v, x_t, self.placed(s), self.placed(at))
        total = torch.zeros_like(v)
        for place in range(1, count + 1):
            now, end = self.placed(at), at - step
            then = self.placed(end.clamp_min(0) if place < count else torch.minimum(r, at))
            u = self.student(state, now.clamp_min(self.process.t_min), cond.ending(then)).drift
            total = total + expand(step, u) * u
            state, at = self.landed(u, state, now, then), end
        return total

    def pull(self, u: Tensor, x: Tensor, batch: Batch, rng: Rng) -> Tensor:
        """What moves whole steps along the gap of the two fields at their own images noised: its
        sum, as often as there are kinds.

        Their drift goes down by the gap, own less real, and with it the image up.
        """
        if not len(batch):
            return u.sum()
        t = self.placed((self.bounds[1] * rng.uniform("own-t", batch.index)).clamp_min(LEAST))
        x_t = self.process.noise(x.detach(), self.z(batch, rng, "own-e"), t)
        with torch.no_grad(), self.autocast():
            both = [
                self.student(x_t, t, replace(batch.cond, end=t, twin=torch.full_like(t, one))).drift
                for one in (1.0, 0.0)
            ]
            aim = u - (both[0] - both[1]).clamp(-BOUND, BOUND)
        own = self.eased(u, full(u, self.top), of_drift)
        return PARTS * barron_weighted(mean_square(own - aim.detach()), self.config.c).sum()

    def passes(self) -> list[Pass]:
        """A trained pass; own images, the rest of a step, and the two fields."""
        c = self.config
        made = Pass("student", "forward", 1, 1 / PARTS if c.images else 1)
        own = [Pass("student", "train"), Pass("student", "forward", c.parts), made]
        own += [Pass("student", "forward", 2, 1 / PARTS)] if c.rectify else []
        asked = Pass("teacher", "forward", 1, 2 if c.guided else 1)
        return [*own, asked] if c.velocity == "teacher" else own


TRAINER = TwinFlowTrainer
