"""LADD: latent adversarial distillation, heads on many blocks of the frozen teacher.

The student predicts clean samples from noised data; they are noised again, and the heads tell
them from the data by the teacher's features. Nothing else ties the student to the teacher. As
data, the teacher's own samples will do as well.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stepdistill.trainers.base import Pass
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.opponent import ON_STATES, TeacherConfig, TeacherOpponent
from stepdistill.trainers.score.opposing import LevelsConfig, LevelsTrainer
from stepdistill.trainers.settings import PairsConfig


class LADDConfig(LevelsConfig):
    """Settings of ``ladd``."""

    adversary: TeacherConfig = Field(
        default_factory=TeacherConfig, description="the discriminator, which reads the teacher"
    )
    pairs: PairsConfig | None = Field(
        None, description="samples of the teacher, guided if it is, in place of data; null: data"
    )

    @property
    def pair_store(self) -> PairsConfig | None:
        """See :attr:`TrainConfig.pair_store`."""
        return self.pairs


class LADDTrainer(LevelsTrainer):
    """LADD (Sauer et al. 2024), spec 5.16: its hinge form as SANA-Sprint restates it.

    Here: each sample draws its level of the grid evenly, R1 is the approximate one, and heads are
    told neither time nor class, which the teacher's features know.
    """

    Config = LADDConfig
    config: LADDConfig
    opponent: TeacherOpponent
    proofs: ClassVar = {
        "state": Proof(
            ("gaussian",),
            {
                "adversary": ON_STATES,
            },
            effort=0.8,
            batch=4,
        ),
    }

    def setup(self) -> None:
        """See :meth:`OpposingTrainer.setup`; guidance is for the teacher's own samples."""
        if self.config.pairs is not None:
            self.needs, self.asks = "pairs", True
        super().setup()

    def opposed(self) -> TeacherOpponent:
        """See :meth:`OpposingTrainer.opposed`."""
        return TeacherOpponent(self.config.adversary, self.teacher, self.config.seed)

    def passes(self) -> list[Pass]:
        """The student's, and the teacher's for features."""
        return super().passes() + self.opponent.passes(self.config.discriminator_steps)


TRAINER = LADDTrainer
