"""DCM: two experts by noise level, each consistent along the teacher's path in its own range.

The semantic expert jumps from any state above a border to the border, the detail expert from below
it to the clean image; so two networks sample in two steps. They are trained one after the other,
the second from where the first one ends. Between frames of videos the semantic expert's differences
are held to those of its targets as well.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser, Experts
from stepdistill.diffusion.timesteps import Grid
from stepdistill.losses.consistency import frame_gap
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.opponent import TeacherConfig
from stepdistill.trainers.trajectory.pcm import NEAR
from stepdistill.trainers.trajectory.rival import Opposed, OpposedConfig
from stepdistill.trainers.trajectory.segments import SegmentsConfig, SegmentsTrainer

SEMANTIC, DETAIL = "student", "student_2"


class DCMConfig(SegmentsConfig, OpposedConfig):
    """Settings of ``dcm``."""

    idle: ClassVar = {**SegmentsConfig.idle, **OpposedConfig.idle}

    student_steps: Literal[2] = Field(2, description="steps of the student: one an expert")
    boundary: float | None = Field(
        None,
        gt=0,
        description="time of the border between the experts, one of the pairs' grid; null: that in "
        "the middle of the grid",
    )
    semantic_share: float = Field(
        0.6, gt=0, lt=1, description="share of the steps that train the semantic expert, the first"
    )
    temporal: float = Field(
        0.0,
        ge=0,
        description="weight of the differences between frames, of samples [C, F, H, W], in the "
        "semantic expert's loss; 0: none",
    )
    temporal_lag: int = Field(3, ge=1, description="frames between the two of a difference")
    adversary: TeacherConfig | None = Field(
        None, description="a discriminator of the detail expert's jumps and their targets; null"
    )


class DCMTrainer(Opposed, SegmentsTrainer):
    """Dual-expert consistency (Lv et al. 2025), spec M16, known from its code and from notes.

    Here: the detail expert is a network like the first (with ``lora`` an adapter on the teacher),
    and not an adapter on the semantic expert with embeddings and last layer of its own; its jumps
    end at the clean image, not at the grid's last time but one; both take one step each. The match
    of the discriminator's features is left out. For pictures no border is known to be good.
    """

    Config = DCMConfig
    config: DCMConfig
    kept = ("steps",)  # the experts' shares are parts of them
    phase = 0
    experts: ClassVar = True
    proofs: ClassVar = {
        "two experts": Proof(
            ("gaussian", "gmm1d"),
            {"pairs": {"kind": "grid", "steps": 8}, "metric": "l2", "boundary": 0.75},
            effort=1.5,
        ),
    }

    def setup(self) -> None:
        """See :meth:`SegmentsTrainer.setup`; the semantic expert.

        Raises:
            UserError: pairs on no grid, a border that is none of its times, an expert without a
                step, or frames that samples do not have.
        """
        c = self.config
        super().setup()
        self.table = c.pairs.grid(self.span)
        if self.table is None:
            raise UserError("pairs: experts learn at the times of a grid; set pairs.kind to grid")
        self.place = self.placed(self.table, c.boundary)
        self.boundary = float(self.table[self.place])
        self.milestones = self.table[[0, self.place, -1]]
        self.partners = torch.tensor(
            [c.pairs.chain(float(t), self.span)[1] for t in self.table[:-1]], device=self.device
        )
        self.border = round(c.steps * c.semantic_share)
        if not 0 < self.border < c.steps:
            raise UserError(
                f"steps={c.steps} leaves an expert without a step; give more, or another "
                "semantic_share"
            )
        self.players[SEMANTIC].total = self.border
        self._check_frames()

    def placed(self, table: Tensor, boundary: float | None) -> int:
        """The place of the border in the pairs' grid.

        Raises:
            UserError: it has none.
        """
        inner = table[1:-1]
        if not len(inner):
            raise UserError("pairs: a grid of one interval has no place for a border; give more")
        if boundary is None:
            return len(table) // 2
        place = int((inner - boundary).abs().argmin())
        if abs(float(inner[place]) - boundary) > NEAR * boundary:
            raise UserError(
                f"boundary={boundary:g} is none of the times that pairs compare; set it to "
                f"{float(inner[place]):.6g}, the nearest, or to null"
            )
        return place + 1

    def fit(self, key: str, segments: int) -> None:
        """See :meth:`PCMTrainer.fit`; the border need not be half way."""

    def _check_frames(self) -> None:
        c, shape = self.config, self.teacher.sample_shape
        if c.temporal and (len(shape) != 4 or shape[1] <= c.temporal_lag):
            raise UserError(
                f"temporal: samples are {list(shape)}, and not [channels, frames, height, width] "
                f"of more than temporal_lag={c.temporal_lag} frames; set temporal=0"
            )

    def grids(self) -> dict[int, Grid]:
        """Two steps: to the border, and from there."""
        return {2: (self.top, self.boundary, 0.0)}

    def prepare(self, step: int) -> None:
        """See :meth:`Trainer.prepare`: the detail expert begins as the semantic one ends."""
        if step < self.border or self.phase:
            return
        c, first = self.config, self.players[SEMANTIC]
        first.retire()
        self.phase, total = 1, c.steps - self.border
        second = self.add_player(DETAIL, self.initial, c.optim, ema=True, total=total)
        second.load_weights(first.denoiser)
        if self.target_net is not None:
            self.target_net.adopt(first.denoiser)
        self.oppose(total)

    @property
    def active(self) -> str:
        """See :attr:`ConsistencyTrainer.active`: the expert in training."""
        return DETAIL if self.phase else SEMANTIC

    def best(self) -> Denoiser | Experts:
        """Both experts; levels whose expert is still to come are the teacher's."""
        low: Denoiser = self.players[DETAIL].best if self.phase else self.teacher
        return Experts([self.players[SEMANTIC].best, low], [self.boundary])

    def times(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """The pair (t, r) of every sample [B], evenly over the expert's own times."""
        assert self.table is not None
        first, last = (self.place, len(self.table) - 1) if self.phase else (0, self.place)
        place = first + rng.integers("t", batch.index, last - first)
        t, r = self.table[place], self.partners[place]
        return t, torch.maximum(r, self.end(t))

    def beside(
        self, estimate: Tensor, target: Tensor, end: Tensor, batch: Batch, rng: Rng
    ) -> dict[str, Tensor]:
        """See :meth:`ConsistencyTrainer.beside`: frames at first, then the discriminator."""
        if self.config.temporal and not self.phase:
            gap = frame_gap(estimate - target, self.config.temporal_lag)
            return {"temporal": self.config.temporal * gap.mean()}
        return super().beside(estimate, target, end, batch, rng)

    @property
    def finished(self) -> list[Denoiser]:
        """See :attr:`Trainer.finished`: the first expert, in the second stage."""
        return [self.players[SEMANTIC].denoiser] if self.phase else []


TRAINER = DCMTrainer
