"""Reflow: straighten a flow by regressing its velocity on its own pairs of noise and image."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stepdistill.data.batch import Batch
from stepdistill.diffusion.timesteps import Density, UShaped, uniform_grid
from stepdistill.losses.reflow import ReflowMetric, velocity_loss
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Trainer, Turn
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.settings import PairsConfig, TrainConfig


class ReflowConfig(TrainConfig):
    """Settings of ``reflow``."""

    pairs: PairsConfig = Field(default_factory=PairsConfig, description="noise and its images")
    t: Density = Field(default_factory=UShaped, description="density of training times")
    metric: ReflowMetric = Field("huber", description="l2, huber, or faded_huber (1 - t)")

    @property
    def pair_store(self) -> PairsConfig:
        """See :attr:`TrainConfig.pair_store`."""
        return self.pairs


class ReflowTrainer(Trainer):
    """One reflow round with rf++'s density and premetric (Lee et al. 2024), specs 4 and 6."""

    Config = ReflowConfig
    config: ReflowConfig
    needs = "pairs"
    sizes = (1, 2, 4, 8)
    proofs: ClassVar = {
        "pairs": Proof(("gaussian", "gmm1d", "gmm2d", "classes"), {"metric": "l2"}),
        "huber": Proof(("gaussian",), {"metric": "huber"}),
    }

    def setup(self) -> None:
        """The student starts as the teacher; straight paths need a flow's velocity."""
        if self.process.name != "rf" or self.teacher.head.name != "velocity":
            raise UserError(
                f"teacher: reflow straightens flow models, and this one is {self.process.name} "
                f"with a {self.teacher.head.name} head; use a FlowMatch teacher such as digits-dit"
            )
        total = self.config.steps
        self.add_player("student", self.initial, self.config.optim, ema=True, total=total)

    @property
    def fixed_point(self) -> FixedPoint:
        """Straight paths that end where the pairs do: at the end of the teacher's own walk."""
        grid = uniform_grid(self.process, self.config.pairs.steps)
        solver = self.config.pairs.walk
        if solver is None:
            return FixedPoint("map", follow=lambda t: grid, straight=True)
        whole = solver.model_copy(update={"substeps": self.config.pairs.steps})
        ends = (grid[0], grid[-1])  # of one walk: some solvers remember the step before
        return FixedPoint("map", follow=lambda t: ends, solver=whole, straight=True)

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Velocity against the pair's straight path."""
        assert batch.x is not None and batch.z is not None
        t = self.config.t.sample(rng.uniform("t", batch.index), self.process)
        x_t = self.process.noise(batch.x, batch.z, t)
        v = self.denoiser("student")(x_t, t, batch.cond).h
        per_sample = velocity_loss(v, batch.x, batch.z, t, self.config.metric)
        loss = per_sample.mean()
        return Loss(loss, {"loss": loss})

    def passes(self) -> list[Pass]:
        """The student alone."""
        return [Pass("student", "train")]


TRAINER = ReflowTrainer
