"""TLCM: phased consistency without images, then few-step consistency at the segments' ends.

In the first stage the student learns the segments of phased consistency, at states of the teacher's
own walk from pure noise (``states: data`` takes the data's). In the second it makes clean samples
itself, in a few steps; these are noised to the milestones between segments alone, and the estimates
at a milestone and, by the teacher's steps, at the next are pulled together. So a student of many
segments samples in fewer steps, each from one milestone to another.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.sampler import sample
from stepdistill.diffusion.timesteps import Grid, nearest, uniform_grid
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Pass
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.settings import Section
from stepdistill.trainers.solvers import Euler, Solver
from stepdistill.trainers.trajectory.segments import SegmentsConfig, SegmentsTrainer


class MilestonesConfig(Section):
    """The second stage."""

    share: float = Field(0.15, gt=0, lt=1, description="share of the training steps, at the end")
    own_steps: int | None = Field(
        None,
        ge=1,
        description="steps of the student's own samples; null: 4, or fewer that divide them",
    )
    substeps: int = Field(3, ge=1, description="steps of the teacher between milestones")
    pace: float = Field(0.1, gt=0, description="learning rate, as a multiple of the first stage's")


class TLCMConfig(SegmentsConfig):
    """Settings of ``tlcm``."""

    student_steps: int = Field(8, ge=1, description="segments, and most steps of the student")
    states: Literal["data", "teacher"] = Field(
        "teacher", description="noisy states of the data, or of the teacher's walk from pure noise"
    )
    milestones: MilestonesConfig | None = Field(
        default_factory=MilestonesConfig,
        description="the second stage; null: none, which is pcm, or consistency where there is one "
        "segment, without data",
    )


class TLCMTrainer(SegmentsTrainer):
    """TLCM (Xie et al. 2024) on the segments of MLCM, spec M6: the stages A and B.

    Here: each stage has the whole schedule of the learning rate, and distances are the config's
    ``metric``, not latent LPIPS. Its stages C (rewards) and D (a distribution's gradient with a
    discriminator) are runs of their own, of ``dmd2`` with ``terms`` and ``student``.
    MLCM's segments alone are ``milestones: null`` with ``states: data``; how it goes on from there
    to fewer steps is not verified.
    """

    Config = TLCMConfig
    config: TLCMConfig
    kept = ("steps",)  # the second stage is a share of them
    stage = 0
    proofs: ClassVar = {
        "segments without data": Proof(
            ("gaussian", "gmm1d"),
            {"student_steps": 2, "pairs": {"kind": "grid", "steps": 8}, "metric": "l2"}
            | {"milestones": None},
            effort=0.6,
        ),
        "milestones": Proof(
            ("gaussian", "classes"),
            {"student_steps": 4, "pairs": {"kind": "grid", "steps": 8}, "metric": "l2"}
            | {"milestones": {"share": 0.5, "own_steps": 2, "substeps": 2, "pace": 1.0}},
        ),
    }

    def setup(self) -> None:
        """See :meth:`SegmentsTrainer.setup`.

        Raises:
            UserError: steps of the student's samples that lead elsewhere than to milestones, or a
                stage without a step.
        """
        super().setup()
        c, second = self.config, self.config.milestones
        self.border = c.steps
        if second is None:
            return
        few = [n for n in (4, 3, 2, 1) if c.student_steps % n == 0]
        self.own_steps = second.own_steps or few[0]
        if c.student_steps % self.own_steps:
            raise UserError(
                f"milestones.own_steps={self.own_steps} is no divisor of student_steps="
                f"{c.student_steps}, so that its steps miss the milestones; set it to one"
            )
        self.border = round(c.steps * (1 - second.share))
        if not 0 < self.border < c.steps:
            raise UserError(
                f"steps={c.steps} leaves a stage without a step; give more, or another "
                "milestones.share"
            )
        self.players["student"].total = self.border
        self.noise = "fresh"
        self.sizes = tuple(n for n in range(1, c.student_steps + 1) if c.student_steps % n == 0)
        self.own_grid = uniform_grid(self.process, self.own_steps, self.start)

    def prepare(self, step: int) -> None:
        """See :meth:`Trainer.prepare`: enter the stage of ``step``."""
        if step < self.border or self.stage:
            return
        assert self.config.milestones is not None
        self.stage, student = 1, self.players["student"]
        lr = self.config.optim.lr * self.config.milestones.pace
        student.config = self.config.optim.model_copy(update={"lr": lr})
        student.total = self.config.steps - self.border
        student.reset_optimizer()

    @property
    def fixed_point(self) -> FixedPoint:
        """The teacher's walk inside a segment; after the second stage, from milestones to 0."""
        if self.config.milestones is None:
            return super().fixed_point
        solver = Euler(substeps=self.config.milestones.substeps)
        return FixedPoint("map", follow=self.down, solver=solver)

    def down(self, t: float) -> Grid:
        """The milestones from the one nearest to t to 0."""
        times = uniform_grid(self.process, self.config.student_steps, self.start)
        return times[nearest(times, t) :]

    @property
    def solver(self) -> Solver:
        """See :attr:`ConsistencyTrainer.solver`."""
        second = self.config.milestones
        return Euler(substeps=second.substeps) if second and self.stage else super().solver

    def times(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """The pair (t, r) of every sample [B]; in the second stage neighbouring milestones."""
        if not self.stage:
            return super().times(batch, rng)
        place = rng.integers("t", batch.index, self.config.student_steps)
        return self.milestones[place], self.milestones[place + 1]

    def end(self, t: Tensor) -> Tensor:
        """The lower end of a segment; in the second stage 0."""
        return torch.zeros_like(t) if self.stage else super().end(t)

    def noised(self, t: Tensor, batch: Batch, rng: Rng) -> Tensor:
        """See :meth:`SegmentsTrainer.noised`; in the second stage of the student's own samples."""
        if not self.stage:
            return super().noised(t, batch, rng)
        own = sample(
            self.denoiser("student"),
            self.z(batch, rng, "own"),
            self.own_grid,
            batch.cond,
            noise="fresh",
            fresh=partial(self._own_fresh, batch, rng),
            clip=self.config.clip,
        )
        return self.process.noise(own, self.z(batch, rng), t)

    def _own_fresh(self, batch: Batch, rng: Rng, step: int) -> Tensor:
        return self.z(batch, rng, f"own-{step}")

    def passes(self) -> list[Pass]:
        """As ``pcm`` with walks of the teacher, then with those of the student."""
        second = self.config.milestones
        if not (second and self.stage):
            return super().passes()
        teacher = Pass("teacher", "forward", second.substeps, 2 if self.config.guided else 1)
        own = Pass("student", "forward", self.own_steps + 1)
        return [teacher, own, Pass("student", "train")]


TRAINER = TLCMTrainer
