"""LADD: latent adversarial distillation, heads on many blocks of the frozen teacher.

The student predicts clean samples from noised data; they are noised again, and the heads tell
them from the data by the teacher's features. Nothing else ties the student to the teacher. As
data, the teacher's own samples will do as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.timesteps import Density, LogitNormal
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Pass
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.opponent import Opponent, OpponentConfig, heads, label_rows
from stepdistill.trainers.score.opposing import LevelsConfig, LevelsTrainer
from stepdistill.trainers.score.reading import channels, modules, state
from stepdistill.trainers.settings import PairsConfig


class TeacherConfig(OpponentConfig):
    """A discriminator on the frozen teacher."""

    features: Literal["teacher", "state"] = Field(
        "teacher", description="what it reads; state: the noised sample and its time"
    )
    taps: tuple[str, ...] = Field(
        (), description="modules whose outputs are the features; empty: several blocks"
    )
    t: Density = Field(
        default_factory=lambda: LogitNormal(mean=1.0, std=1.0),
        description="times to which samples and data are noised before they are told apart",
    )
    same_noise: bool = Field(False, description="noise data and samples by the same noise")


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


class TeacherOpponent(Opponent):
    """A discriminator on features of the teacher at noised samples, which know time and class.

    Args:
        config: as above.
        teacher: the teacher.
        seed: of the heads.

    Raises:
        UserError: a module that the teacher does not have, or one without defaults.
    """

    config: TeacherConfig

    def __init__(self, config: TeacherConfig, teacher: Denoiser, seed: int) -> None:
        self.config, self.teacher = config, teacher
        self.names = modules(config.features, config.taps, teacher.adapter.blocks, teacher)
        rows = 0 if self.names else label_rows(teacher)
        found = channels(teacher, self.features)
        self.net = heads(config.head, found, seed, rows).to(teacher.device)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> Sequence[Tensor]:
        """Features of noised samples, or those themselves."""
        if self.names:
            return self.teacher.features(x_t, t, cond, self.names)
        return state(self.teacher.process, x_t, t)

    def read(
        self, x: Tensor, batch: Batch, rng: Rng, stream: str, near: float = 0.0
    ) -> Sequence[Tensor]:
        """See :meth:`Opponent.read`: noise to a drawn level, the same for data and samples."""
        process = self.teacher.process
        t = self.config.t.sample(rng.uniform("level", batch.index), process)
        name = "fake" if self.config.same_noise else stream
        x_t = process.noise(x, rng.normal(f"{name}-e", batch.index, x.shape[1:]), t)
        if near:
            x_t = x_t + near * rng.normal("r1", batch.index, x.shape[1:])
        return self.features(x_t, t, batch.cond)

    def passes(self, updates: int) -> list[Pass]:
        """Passes of the teacher, with so many updates of the discriminator a step."""
        if not self.names:
            return []
        seen = updates * (3 if self.config.r1 else 2) + (1 if self.config.loss.compares else 0)
        return [
            Pass("teacher", "input", 1, 1, "features", self.names),
            Pass("teacher", "forward", seen, 1, "features", self.names),
        ]


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
                "adversary": {
                    "features": "state",
                    "head": "quadratic",
                    "t": {"kind": "uniform", "low": 0.1, "high": 0.1},
                    "same_noise": True,
                    "r1": 4.0,
                    "r1_noise": 0.5,
                },
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
