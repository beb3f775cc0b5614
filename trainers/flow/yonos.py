"""YONOS-SR: a super-resolution student for small pictures learns of a teacher for less small ones.

Teacher and student are asked about the same noised picture; the teacher sees it beside at twice the
size that the student sees. What the student is told is a function of what the teacher is told, so
that the mean of the teacher's estimates is its own best one, with less noise than the picture
itself would leave: it ends as the network that the pictures alone would make of it, sooner.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.data.batch import Batch
from stepdistill.data.degrade import DegradeConfig
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.timesteps import Density, Uniform
from stepdistill.losses.consistency import SnrWeight, snr_weight
from stepdistill.losses.regression import mean_square
from stepdistill.run.errors import UserError
from stepdistill.run.ratios import sample_parts
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Trainer, Turn
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.settings import TrainConfig


class YonosConfig(TrainConfig):
    """Settings of ``yonos``."""

    t: Density = Field(default_factory=Uniform, description="density of training times")
    snr_weight: SnrWeight = Field(
        "truncated", description="of clean estimates: max(snr, 1), or plus_one, snr + 1"
    )
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of labels replaced by none")
    teacher_factor: int | None = Field(
        None,
        ge=1,
        description="how many times smaller the teacher's pictures are; null: half as many as the "
        "student's, data.degrade.factor",
    )

    degrade_mend: ClassVar[str] = ", but for factor, twice as large, or teacher_factor"

    @property
    def teacher_sees(self) -> int:
        """How many times smaller the teacher's pictures are."""
        degrade = self.data.degrade
        half = 1 if degrade is None else degrade.factor // 2
        return half if self.teacher_factor is None else self.teacher_factor

    @property
    def taught_degrade(self) -> DegradeConfig | None:
        """See :attr:`TrainConfig.taught_degrade`."""
        degrade = self.data.degrade
        return degrade and degrade.model_copy(update={"factor": self.teacher_sees})


class YonosTrainer(Trainer):
    """Scale distillation of YONOS-SR (Noroozi et al. 2024), spec 8, which knows it from notes.

    A chain of runs: a teacher of ``denoising`` with ``data.degrade.factor=2``, then this with 4, of
    which the exported student is the teacher of 8. Weight and head are not published: the weight is
    the truncated one of progressive distillation. Here: pictures are pixels; the decoder's tuning
    is not made.
    """

    Config = YonosConfig
    config: YonosConfig
    needs = "data"
    shortens = False
    flows = True
    sizes = (1, 2, 4, 8)
    proofs: ClassVar = {
        "one picture": Proof(("gaussian",), {"t": {"kind": "uniform"}}),
    }

    def setup(self) -> None:
        """The student starts as the teacher.

        Raises:
            UserError: a teacher's size that is not on the way to the student's.
        """
        c, degrade = self.config, self.config.data.degrade
        own = c.teacher_sees
        if degrade is not None and (own >= degrade.factor or own & (own - 1)):
            raise UserError(
                f"teacher_factor={own}: pictures are halved on to data.degrade.factor="
                f"{degrade.factor}; set it to {degrade.factor // 2}, or another power of two below"
            )
        self.add_player("student", self.initial, c.optim, ema=True, total=c.steps)

    @property
    def fixed_point(self) -> FixedPoint:
        """The exact denoiser of what is seen."""
        return FixedPoint("field")

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Distance of the student's clean estimate to that of the teacher, who sees more."""
        assert batch.x is not None
        c = self.config
        t = self.drawn(c.t, rng.uniform("t", batch.index))
        x_t = self.process.noise(batch.x, self.z(batch, rng), t)
        cond = self.dropped(batch.cond, batch.index, rng)
        with torch.no_grad():
            target = guided(self.teacher, x_t, t, self.finer(cond, batch, rng), c.guidance).x
        estimate = self.denoiser("student")(x_t, t, cond).x
        gap = mean_square(estimate - target)
        loss = (snr_weight(t, self.process, c.snr_weight) * gap).mean()
        return Loss(loss, {"loss": loss, "gap": gap.mean()} | sample_parts(estimate))

    def dropped(self, cond: Cond, index: Tensor, rng: Rng) -> Cond:
        """The conditions, of which some lose their label."""
        if self.teacher.null_label is None:
            return cond
        lost = rng.uniform("drop", index) < self.config.label_dropout
        return cond.unlabelled(lost, self.teacher.null_label)

    def finer(self, cond: Cond, batch: Batch, rng: Rng) -> Cond:
        """The conditions with what the teacher sees."""
        if cond.image is None or batch.x is None:
            return cond
        return replace(
            cond, image=self.seen(batch.x, rng.step, batch.index, self.config.teacher_sees)
        )

    def passes(self) -> list[Pass]:
        """The teacher's estimate and the student's."""
        return [
            Pass("teacher", "forward", 1, 2 if self.config.guided else 1),
            Pass("student", "train"),
        ]


TRAINER = YonosTrainer
