"""Piecewise rectified flow: straighten the teacher's flow within windows of time, one step each.

The teacher is walked through one window only, from images noised to the window's noisy end, so
that there are no pairs to store and the steps of a window are few.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.timesteps import Grid, nearest, uniform_grid
from stepdistill.losses.reflow import PairMetric, pair_distance, window_line
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Trainer, Turn
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.flow.lines import refuse_singular
from stepdistill.trainers.settings import TrainConfig
from stepdistill.trainers.solvers import Asked, Euler, Solved, Walk


class PeRFlowConfig(TrainConfig):
    """Settings of ``perflow``."""

    windows: int = Field(4, ge=1, le=16, description="windows of time, even in progress")
    solver: Solved = Field(
        default_factory=lambda: Euler(substeps=8),
        description="the teacher's steps through a window; one that draws no noise",
    )
    points: int | None = Field(
        4,
        ge=1,
        le=64,
        description="even times of a window that are trained, its noisy end the first; null: all "
        "times, which blurs what two windows say of the border between them",
    )
    metric: PairMetric = Field("l2", description="l2 or huber, of the velocities")


class PeRFlowTrainer(Trainer):
    """Piecewise rectified flow (PeRFlow, Yan et al. 2024), from memory: spec 4 has plain reflow.

    Within a window, states on the line between its two ends have one velocity, which is regressed
    at equal weight. Here: the first window begins where the sampler does, at noise without an
    image, windows and times are drawn evenly in the process's progress, and the student keeps the
    teacher's output as it is, where the paper turns a noise predictor into one of a window's end.
    At a border the window below begins and the one above ends, with two velocities, and a network
    that is smooth in time and trained at all times (``points: null``) learns something in between:
    so the default trains a few times that lie apart.
    """

    Config = PeRFlowConfig
    config: PeRFlowConfig
    flows = True
    needs = "data"
    proofs: ClassVar = {
        "windows": Proof(
            ("gaussian", "classes"), {"solver": {"kind": "euler", "substeps": 4}}, effort=0.4
        ),
        "window starts": Proof(
            ("gmm1d",),
            {"solver": {"kind": "euler", "substeps": 4}, "points": 1},
            effort=0.4,
        ),
        "heun": Proof(
            ("gaussian",), {"solver": {"kind": "heun", "substeps": 2}, "points": 2}, effort=0.5
        ),
    }

    def setup(self) -> None:
        """The student starts as the teacher.

        Raises:
            UserError: a solver that does not ask the teacher or draws noise, or an output without
                a velocity at the clean end.
        """
        c = self.config
        if not isinstance(c.solver, Walk) or c.solver.random:
            raise UserError(
                f"solver={c.solver.kind}: lines lead to where the teacher's steps do, without "
                "chance; use euler, heun or dpm"
            )
        self.walk = c.solver
        refuse_singular(self)
        self.sizes = tuple(
            c.windows * parts for parts in (1, 2, 4) if not c.points or c.points % parts == 0
        )
        self.edges = uniform_grid(self.process, c.windows, self.start)
        self.levels = torch.tensor(self.edges, device=self.device, dtype=torch.float32)
        self.add_player("student", self.initial, c.optim, ema=True, total=c.steps)

    @property
    def fixed_point(self) -> FixedPoint:
        """At a window's noisy end, a step to the end of the teacher's walk through the window."""
        return FixedPoint("map", follow=self.through, solver=self.walk)

    def through(self, t: float) -> Grid:
        """The window that begins at a time, as the times of a walk."""
        place = nearest(self.edges[:-1], t)
        return self.edges[place], self.edges[place + 1]

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        return [Turn("student", self.loss)]

    def times(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """The ends of each sample's window, and its time in between, all [B]."""
        c = self.config
        place = rng.integers("window", batch.index, c.windows)
        high, low = self.levels[place], self.levels[place + 1]
        if c.points is None:
            part = rng.uniform("t", batch.index)
        else:
            part = rng.integers("point", batch.index, c.points) / c.points
        u, v = self.process.unwarp(high), self.process.unwarp(low)
        return high, low, torch.where(part > 0, self.process.warp(u + part * (v - u)), high)

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Velocity against the line from the window's noisy end to where the teacher leads."""
        assert batch.x is not None
        c, process = self.config, self.process
        high, low, t = self.times(batch, rng)
        z = self.z(batch, rng)
        a, b, at = (process.coefs(v).expand(z) for v in (high, low, t))
        with torch.no_grad():
            noisy = expand(high >= self.levels[0], z)
            first = torch.where(noisy, a.sigma * z, process.noise(batch.x, z, high))
            last = self.walk(Asked(self.teacher, batch.cond, c.guidance), first, high, low)
            x_t, v = window_line(first, last, a, b, at)
        pred = self.denoiser("student")(x_t, t, batch.cond)
        loss = pair_distance(pred.drift - v, c.metric).mean()
        return Loss(loss, {"loss": loss})

    def passes(self) -> list[Pass]:
        """The student, and the teacher's walk through a window."""
        size = 2 if self.config.guided else 1
        walk = Pass("teacher", "forward", self.walk.passes, batch=size)
        return [Pass("student", "train"), walk]


TRAINER = PeRFlowTrainer
