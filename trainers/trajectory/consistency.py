"""Consistency distillation: the student's clean estimates agree along the teacher's paths.

A noisy image at time t is taken by one teacher step to an earlier time r; the student's estimate
at t is pulled to its own (or its average's) estimate at r, which is exact at r = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.sampler import heun_step, move
from stepdistill.diffusion.timesteps import Density, LogitNormal, uniform_grid
from stepdistill.losses.consistency import Weight, ect_partner, pair_weight
from stepdistill.losses.regression import Metric, distance, huber_constant
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Trainer, Turn
from stepdistill.trainers.settings import Section, TrainConfig


class ECTPairs(Section):
    """Pairs r = t (1 - q^-(stage + 1)), whose gap shrinks from stage to stage."""

    kind: Literal["ect"] = "ect"
    q: float = Field(2.0, gt=1, description="base of the gap")
    stages: int = Field(8, ge=1, description="stages of equal length over the run")
    first: int = Field(0, ge=0, description="number of the first stage")
    t: Density = Field(default_factory=LogitNormal, description="density of t")


class GridPairs(Section):
    """Neighbours on a grid of ``steps`` intervals, ``skip`` of them apart (LCM)."""

    kind: Literal["grid"] = "grid"
    steps: int = Field(32, ge=1, description="intervals of the teacher's grid")
    skip: int = Field(1, ge=1, description="intervals between t and r")


class ConsistencyConfig(TrainConfig):
    """Settings of ``consistency``."""

    pairs: Annotated[ECTPairs | GridPairs, Field(discriminator="kind")] = Field(
        default_factory=ECTPairs, description="which times are compared"
    )
    solver: Literal["euler", "heun"] = Field("euler", description="the teacher's step")
    target: Literal["stop_gradient", "ema"] = Field(
        "stop_gradient", description="whose estimate at r is the target"
    )
    target_decay: float = Field(0.95, ge=0, lt=1, description="decay of the ema target")
    metric: Metric = Field("pseudo_huber", description="distance of the two estimates")
    huber_scale: float = Field(0.00054, gt=0, description="c = huber_scale sqrt(dimensions)")
    weight: Weight = Field("inverse_gap", description="one, or 1 / (t - r)")
    guidance_range: tuple[float, float] | None = Field(
        None, description="guidance drawn uniformly a sample, instead of the constant one"
    )


class ConsistencyTrainer(Trainer):
    """Discrete consistency distillation (Song et al. 2023; LCM; ECT's pairs), specs M2, M3, M5."""

    Config = ConsistencyConfig
    config: ConsistencyConfig
    needs = "data"
    noise = "fresh"
    sizes = (1, 2, 4, 8)

    def setup(self) -> None:
        """The student, and an average of it as the target where one is asked for."""
        c = self.config
        self.add_player("student", self.teacher, c.optim, ema=True, total=c.steps)
        self.target_net: Denoiser | None = None
        if c.target == "ema":
            self.target_net = self.teacher.clone()
            self.target_net.net.requires_grad_(False)
        if isinstance(c.pairs, GridPairs):
            grid = torch.tensor(uniform_grid(self.process, c.pairs.steps), device=self.device)
            self.grid = grid.float()

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        return [Turn("student", self.loss)]

    def times(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """The pair (t, r) of every sample [B], r < t."""
        pairs = self.config.pairs
        if isinstance(pairs, GridPairs):
            place = rng.integers("t", batch.index, pairs.steps)
            return self.grid[place], self.grid[(place + pairs.skip).clamp_max(pairs.steps)]
        t = pairs.t.sample(rng.uniform("t", batch.index), self.process)
        stage = pairs.first + rng.step * pairs.stages // self.config.steps
        return t, ect_partner(t, stage, pairs.q)

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Distance between the estimates at t and, one teacher step on, at r."""
        c = self.config
        assert batch.x is not None
        student = self.denoiser("student")
        t, r = self.times(batch, rng)
        x_t = self.process.noise(batch.x, self.z(batch, rng), t)
        scale: float | Tensor = c.guidance
        if c.guidance_range is not None:
            low, high = c.guidance_range
            scale = low + (high - low) * rng.uniform("guidance", batch.index)
        with torch.no_grad():
            if c.solver == "heun":
                x_r = heun_step(self.teacher, x_t, t, r, batch.cond, scale)
            else:
                x_r = move(guided(self.teacher, x_t, t, batch.cond, scale), self.process, r)
            target = self.clean(self.target_net or student, x_r, r, batch)
        delta = self.clean(student, x_t, t, batch) - target
        c_huber = huber_constant(delta.shape, c.huber_scale)
        loss = (pair_weight(t, r, c.weight) * distance(delta, c.metric, c_huber)).mean()
        return Loss(loss, {"loss": loss, "distance": delta.abs().mean()})

    def clean(self, den: Denoiser, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """The estimate of the clean image; at t = 0 the state itself."""
        estimate = den(x_t, t.clamp_min(self.process.t_min), batch.cond).x
        at_end = (t <= 0).reshape(-1, *(1,) * (x_t.dim() - 1))
        return torch.where(at_end, x_t, estimate)

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`Trainer.step`; then the ema target follows."""
        logs = super().step(step, batch)
        if self.target_net is not None:
            torch._foreach_lerp_(
                list(self.target_net.net.parameters()),
                self.players["student"].params,
                1 - self.config.target_decay,
            )
        return logs

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See :meth:`Trainer.state`; with the ema target."""
        out = super().state()
        if self.target_net is not None:
            out["target"] = dict(self.target_net.net.state_dict())
        return out

    def load_state(
        self, step: int, tensors: Mapping[str, dict[str, Tensor]], updates: Mapping[str, int]
    ) -> None:
        """See :meth:`Trainer.load_state`."""
        super().load_state(step, tensors, updates)
        if self.target_net is not None:
            self.target_net.net.load_state_dict(tensors["target"])

    def passes(self) -> list[Pass]:
        """Teacher's step, target, student."""
        c = self.config
        guided_batch = 1 if c.guidance == 1 and c.guidance_range is None else 2
        calls = 2 if c.solver == "heun" else 1
        return [
            Pass("teacher", "forward", calls, guided_batch),
            Pass("student", "forward"),
            Pass("student", "train"),
        ]


TRAINER = ConsistencyTrainer
