"""Progressive distillation: one step of the student for two of the teacher, stage after stage.

Each stage's student becomes the next one's teacher, so that the number of steps is halved from
stage to stage, down to the student's. The guidance of the first teacher is learnt by the first
student and stays in the others; with ``guidance_range`` all students are told its scale.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.sampler import move
from stepdistill.diffusion.timesteps import Grid, nearest, uniform_grid
from stepdistill.losses.consistency import SnrWeight, landing_estimate, snr_weight
from stepdistill.losses.regression import sum_square
from stepdistill.run.errors import UserError
from stepdistill.run.ratios import sample_parts
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Turn
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.trajectory.scales import Scales, ScalesConfig


class ProgressiveConfig(ScalesConfig):
    """Settings of ``progressive``."""

    first: int = Field(32, ge=2, description="steps of the teacher; halved from stage to stage")
    student_steps: int = Field(1, ge=1, description="steps of the last stage's student")
    snr_weight: SnrWeight = Field(
        "truncated",
        description="of the clean estimate's square: max(alpha^2 / sigma^2, 1), or 1 + that",
    )


class ProgressiveTrainer(Scales):
    """Progressive distillation (Salimans and Ho 2022), spec M1, in stages of equal length.

    Here: each stage has the whole schedule of the learning rate, warm-up included.
    """

    Config = ProgressiveConfig
    config: ProgressiveConfig
    needs = "data"
    clips = True
    kept = ("steps",)  # stages are parts of them
    stage = 0
    proofs: ClassVar = {
        "eight to one": Proof(("gaussian",), {"first": 8, "ema": {"decay": 0.99}}, effort=2.0),
        "told": Proof(
            ("classes",),
            {"first": 8, "ema": {"decay": 0.99}, "guidance_range": (1.0, 4.0)},
            effort=2.0,
        ),
        "eight to two": Proof(("gmm1d",), {"first": 8, "student_steps": 2}, effort=0.8),
    }

    def setup(self) -> None:
        """The first stage's student.

        Raises:
            UserError: numbers of steps of which one is not a power of two times the other, or
                fewer training steps than stages.
        """
        c = self.config
        self.sizes = (c.student_steps,)
        self.stages = (c.first // c.student_steps).bit_length() - 1
        if self.stages < 1 or c.student_steps << self.stages != c.first:
            halves = ", ".join(str(c.student_steps << k) for k in range(1, 7))
            raise UserError(
                f"first={c.first} is not student_steps={c.student_steps} doubled; "
                f"set first to one of {halves}, ..."
            )
        if c.steps < self.stages:
            raise UserError(
                f"steps={c.steps} leaves one of {self.stages} stages without a step; give more"
            )
        self.length = c.steps // self.stages  # the last stage has what is left
        self.grid, total = self._stage()
        first, copy = self.heeding(self.initial)
        self.add_player("student", first, c.optim, ema=True, total=total, copy=copy)

    @property
    def halved(self) -> Denoiser:
        """Whose two steps the student makes one of."""
        return self.denoiser("previous") if self.stage else self.teacher

    def _stage(self) -> tuple[Tensor, int]:
        """The stage's grid, of which the student skips every second time, and its steps."""
        c, last = self.config, self.stage == self.stages - 1
        grid = uniform_grid(self.process, c.first >> self.stage, self.start)
        steps = c.steps - self.length * self.stage if last else self.length
        return torch.tensor(grid, device=self.device), steps

    def prepare(self, step: int) -> None:
        """See :meth:`Trainer.prepare`: enter the stage of ``step``."""
        while self.stage < min(step // self.length, self.stages - 1):
            student = self.players["student"]
            if not self.stage:
                like, copy = self.heeding(self.initial)
                optim = self.config.optim
                self.add_player("previous", like, optim, ema=False, total=1, copy=copy)
            self.stage += 1
            self.players["previous"].load_weights(student.best)
            student.load_weights(student.best)
            student.reset_optimizer()
            self.grid, student.total = self._stage()

    @property
    def fixed_point(self) -> FixedPoint:
        """Euler's walk of the first teacher, whole, in every one of the student's steps."""
        return FixedPoint("map", follow=self.chain)

    def chain(self, t: float) -> Grid:
        """The teacher's times from t to where the student's step from there leads."""
        times = uniform_grid(self.process, self.config.first, self.start)
        place = nearest(times, t)
        stride = self.config.first // self.config.student_steps
        return times[place : place - place % stride + stride + 1]

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Land by one step where the stage's teacher does by two."""
        batch = self.telling(batch, rng)
        assert batch.x is not None
        count = (len(self.grid) - 1) // 2
        place = 2 * rng.integers("t", batch.index, count)
        t, half, end = (self.grid[place + k] for k in range(3))
        x_t = self.process.noise(batch.x, self.z(batch, rng), t)
        with torch.no_grad():
            target = landing_estimate(
                x_t, self.walk(x_t, t, half, end, batch, rng), t, end, self.process
            )
        estimate = self.denoiser("student")(x_t, t, batch.cond).x
        weight = snr_weight(t, self.process, self.config.snr_weight)
        loss = (weight * sum_square(estimate - target)).mean()
        return Loss(loss, {"loss": loss} | sample_parts(estimate))

    def walk(
        self, x_t: Tensor, t: Tensor, half: Tensor, end: Tensor, batch: Batch, rng: Rng
    ) -> Tensor:
        """Two steps of the stage's teacher, which is guided in the first stage."""
        scale = 1.0 if self.stage else self.scale(batch, rng)
        for level, below in ((t, half), (half, end)):
            pred = guided(self.halved, x_t, level, batch.cond, scale)
            if self.config.clip:
                pred.clip(self.config.clip)
            x_t = move(pred, self.process, below)
        return x_t

    def passes(self) -> list[Pass]:
        """Two steps of the stage's teacher, and the student."""
        size = 2 if self.config.guided and not self.stage else 1
        role = "previous" if self.stage else "teacher"
        return [Pass(role, "forward", 2, size), Pass("student", "train")]


TRAINER = ProgressiveTrainer
