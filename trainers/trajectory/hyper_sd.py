"""Hyper-SD: consistency in fewer and fewer segments, stage after stage, in one student.

The path is cut into segments, in each of which the student's jumps agree along the teacher's path.
From stage to stage two segments become one; in the last stages a discriminator tells the jumps from
those that they are pulled to. The student of the last stage takes as many steps as it has segments
or, with one, any few: each predicts the clean image, which is noised to the next time, or, told of
this time, leads there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.score.opponent import TeacherConfig
from stepdistill.trainers.trajectory.rival import Opposed, OpposedConfig
from stepdistill.trainers.trajectory.segments import SegmentsConfig, SegmentsTrainer


class HyperSDConfig(SegmentsConfig, OpposedConfig):
    """Settings of ``hyper_sd``."""

    idle: ClassVar = {**SegmentsConfig.idle, **OpposedConfig.idle}

    first: int = Field(8, ge=1, description="segments of the first stage; halved stage by stage")
    student_steps: int = Field(1, ge=1, description="segments of the last stage")
    end: Literal["fixed", "random", "told"] = Field(
        "fixed",
        description="where jumps lead: to their segment's lower end; or anywhere from there to r, "
        "of which a network that is not told learns a compromise; or to any of the pairs' times "
        "between, which the network is told",
    )
    target: Literal["stop_gradient", "ema"] = Field(
        "ema", description="whose estimate at r is the target"
    )
    adversary: TeacherConfig | None = Field(
        default_factory=lambda: TeacherConfig(student=0.1),
        description="a discriminator of jumps and their targets; null: none",
    )
    adversary_segments: int = Field(
        2, ge=1, description="most segments of a stage in which the discriminator takes part"
    )

    def without_effect(self) -> list[str]:
        """See :meth:`TrainConfig.without_effect`; a discriminator of no stage."""
        least, most = self.student_steps, self.adversary_segments
        idle = self.adversary is not None and least > most
        own = [f"adversary: does nothing in stages of {least} segments and more"] if idle else []
        return own + super().without_effect()


class HyperSDTrainer(Opposed, SegmentsTrainer):
    """Trajectory-segmented consistency of Hyper-SD (Ren et al. 2024), spec M7, in equal stages.

    The paper's jumps have random ends (``end: random``); where the network is told them (``end:
    told``) steps lead to wherever the sampler goes next. Its weights of distance and discriminator,
    its range of guidance and the strength of its noise perturbation are not published: the weight
    here is ours, the distance stays beside it, and states are not perturbed. Also here: each stage
    begins at the averaged weights, with the whole schedule of the learning rate and new heads. Its
    human feedback and its one-step score part are runs of their own, of ``dmd`` with ``terms`` and
    ``student``, for ends that are not told. The fixed point is that without a discriminator, and of
    fixed or told ends.
    """

    Config = HyperSDConfig
    config: HyperSDConfig
    kept = ("steps",)  # stages are parts of them
    stage = 0
    proofs: ClassVar = {
        "four to one": Proof(
            ("gaussian",),
            {"first": 4, "pairs": {"kind": "grid", "steps": 16}, "metric": "l2", "adversary": None},
            effort=2.0,
        ),
        "eight to two": Proof(
            ("gaussian", "gmm1d"),
            {"first": 8, "student_steps": 2, "pairs": {"kind": "grid", "steps": 16}}
            | {"metric": "l2", "adversary": None},
            effort=1.0,
        ),
        "told ends": Proof(
            ("gaussian",),
            {"first": 2, "end": "told", "pairs": {"kind": "grid", "steps": 8}, "metric": "l2"}
            | {"adversary": None},
            effort=2.0,
        ),
    }

    def setup(self) -> None:
        """See :meth:`SegmentsTrainer.setup`; the first stage.

        Raises:
            UserError: numbers of segments of which one is not a power of two times the other,
                fewer training steps than stages, or ends to be told of pairs on no grid.
        """
        c = self.config
        super().setup()
        self.count = (c.first // c.student_steps).bit_length()
        if self.count < 1 or c.student_steps << (self.count - 1) != c.first:
            halves = ", ".join(str(c.student_steps << k) for k in range(4))
            raise UserError(
                f"first={c.first} is not student_steps={c.student_steps}, doubled or not; set "
                f"first to one of {halves}, ..."
            )
        if c.steps < self.count:
            raise UserError(
                f"steps={c.steps} leaves one of {self.count} stages without a step; give more"
            )
        self.fit("first", c.first)
        table = c.pairs.grid(self.span)
        if c.end == "told" and table is None:
            raise UserError("end: told ends are times of a grid; set pairs.kind to grid")
        self.table = table
        if c.student_steps == 1:  # fixed jumps of the last stage end at the clean image
            self.noise = "predicted" if c.end == "told" else "fresh"
            self.sizes = tuple(c.first >> k for k in reversed(range(self.count)))
        self.length = c.steps // self.count  # the last stage has what is left
        self._begin()

    @property
    def further(self) -> Mapping[str, str]:
        """See :attr:`ConsistencyTrainer.further`: where jumps end."""
        return {"end": "end=fixed"} if self.config.end == "told" else {}

    @property
    def fixed_point(self) -> FixedPoint:
        """See :attr:`ConsistencyTrainer.fixed_point`; told ends are where the chain passes by."""
        return replace(super().fixed_point, ends=self.config.end == "told")

    @property
    def segments(self) -> int:
        """Of the present stage."""
        return self.config.first >> self.stage

    def _begin(self) -> None:
        """Cut the path for the present stage, and make its discriminator."""
        c, last = self.config, self.stage == self.count - 1
        steps = c.steps - self.length * self.stage if last else self.length
        self.milestones = self.span.grid(self.segments)
        self.players["student"].total = steps
        self.rival = None
        if self.segments <= c.adversary_segments:
            self.oppose(steps)

    def prepare(self, step: int) -> None:
        """See :meth:`Trainer.prepare`: enter the stage of ``step``."""
        while self.stage < min(step // self.length, self.count - 1):
            self.stage += 1
            student = self.players["student"]
            student.load_weights(student.best)
            student.reset_optimizer()
            if self.target_net is not None:
                self.target_net.adopt(student.denoiser)
            self._begin()

    def ends(self, t: Tensor, r: Tensor, batch: Batch, rng: Rng) -> Tensor:
        """See :meth:`ConsistencyTrainer.ends`; a random end is even in progress, a told one on the
        pairs' grid."""
        end = self.end(t)
        if self.config.end == "fixed":
            return end
        low, high = self.process.unwarp(end), self.process.unwarp(r)
        drawn = self.process.warp(low + rng.uniform("end", batch.index) * (high - low))
        if self.config.end == "told":
            assert self.table is not None
            drawn = self.table[(self.table - drawn[:, None]).abs().argmin(dim=1)]
        return torch.minimum(torch.maximum(drawn, end), r)

    def jump(self, den: Denoiser, x_t: Tensor, t: Tensor, end: Tensor, batch: Batch) -> Tensor:
        """See :meth:`ConsistencyTrainer.jump`; the network is told the end where it can be."""
        if self.config.end == "told":
            batch = replace(batch, cond=batch.cond.ending(end))
        return super().jump(den, x_t, t, end, batch)


TRAINER = HyperSDTrainer
