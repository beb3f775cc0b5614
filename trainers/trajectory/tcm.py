"""TCM: consistency tuning, and a second network for the noisier times alone.

The first stage is consistency along all of the path. The second trains a network at times above a
border only, so that none of it is spent on states that are nearly clean: below the border the first
stage's network says what its estimates are pulled to, most of all at the border itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser, Experts
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.timesteps import raised
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plugged
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Pass
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.trajectory.consistency import ConsistencyConfig, ConsistencyTrainer
from stepdistill.trainers.trajectory.pairs import Ect, Pairs

WHOLE, TRUNCATED = "student", "student_2"


class TCMConfig(ConsistencyConfig):
    """Settings of ``tcm``."""

    pairs: Plugged[Pairs] = Field(default_factory=Ect, description="always of the kind ect")
    boundary: float | None = Field(
        None,
        gt=0,
        description="time above which the second stage trains; null: where image and noise are as "
        "large as each other",
    )
    first_share: float = Field(0.5, gt=0, lt=1, description="share of the steps of the first stage")
    border_share: float = Field(
        0.25, gt=0, lt=1, description="share of the second stage's samples at the border itself"
    )
    border_weight: float = Field(
        0.1, gt=0, description="weight of their mean; that of all others counts 1"
    )


class TCMTrainer(ConsistencyTrainer):
    """Truncated consistency (Lee et al. 2024), spec M5, on consistency tuning as its first stage.

    Here: both stages in one run, the second beginning at the first's averaged weights; times above
    the border have the density of ``pairs``, moved up, where the paper has a heavy-tailed one; and
    the second stage's gap is that of the first's end. In several steps the first stage's network
    takes those that begin below the border.
    """

    Config = TCMConfig
    config: TCMConfig
    kept = ("steps",)  # the stages are parts of them
    phase = 0
    experts: ClassVar = True
    sizes: tuple[int, ...] = (1, 2, 4)
    proofs: ClassVar = {
        "two stages": Proof(
            ("gaussian", "gmm1d"),
            {"pairs": {"kind": "ect", "stages": 2, "t": {"kind": "uniform"}}, "metric": "l2"},
            effort=1.6,
        ),
    }

    def setup(self) -> None:
        """See :meth:`ConsistencyTrainer.setup`; the first stage.

        Raises:
            UserError: other pairs than ECT's, a border that is none, or a stage without a step.
        """
        super().setup()
        c = self.config
        if not isinstance(c.pairs, Ect):
            raise UserError("pairs: tcm takes those of kind ect; set pairs.kind=ect, or leave it")
        self.ect = c.pairs
        even = float(self.process.time_at(torch.zeros(1, dtype=torch.float64)))
        self.boundary = even if c.boundary is None else c.boundary
        if not self.process.t_min < self.boundary < self.top:
            raise UserError(
                f"boundary={self.boundary:g}: must lie between {self.process.t_min:g} and "
                f"{self.top:g}, where students start"
            )
        self.border = round(c.steps * c.first_share)
        if not 0 < self.border < c.steps:
            raise UserError(
                f"steps={c.steps} leaves a stage without a step; give more, or another first_share"
            )
        self.span = replace(self.span, steps=self.border)
        self.players[WHOLE].total = self.border

    def prepare(self, step: int) -> None:
        """See :meth:`Trainer.prepare`: the second network begins as the first stage ends."""
        if step < self.border or self.phase:
            return
        c, first = self.config, self.players[WHOLE]
        first.retire()
        self.phase = 1
        second = self.add_player(
            TRUNCATED, self.initial, c.optim, ema=True, total=c.steps - self.border
        )
        second.load_weights(first.denoiser)
        if self.target_net is not None:
            self.target_net.adopt(first.denoiser)

    @property
    def active(self) -> str:
        """See :attr:`ConsistencyTrainer.active`: the network in training."""
        return TRUNCATED if self.phase else WHOLE

    def best(self) -> Denoiser | Experts:
        """Both networks; before the second stage the first alone."""
        first = self.players[WHOLE].best
        if not self.phase:
            return first
        return Experts([self.players[TRUNCATED].best, first], [self.boundary])

    def times(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """The pair (t, r) of every sample [B]; in the second stage t at the border or above."""
        if not self.phase:
            return super().times(batch, rng)
        t = self.drawn(self.ect.t, rng.uniform("t", batch.index))
        t = raised(t, self.boundary, self.top, self.process)
        here = rng.uniform("border", batch.index) < self.config.border_share
        t = torch.where(here, torch.full_like(t, self.boundary), t)
        return t, self.ect.partner(t, self.ect.stages - 1, self.span)

    def aim(self, x_r: Tensor, r: Tensor, end: Tensor, batch: Batch) -> Tensor:
        """See :meth:`ConsistencyTrainer.aim`; in the second stage the first network's, below."""
        own = super().aim(x_r, r, end, batch)
        if not self.phase:
            return own
        first = self.jump(self.players[WHOLE].denoiser, x_r, r, end, batch)
        return torch.where(expand(r < self.boundary, own), first, own)

    def compared(self) -> list[Denoiser | None]:
        """See :meth:`ConsistencyTrainer.compared`; in the second stage the first network too."""
        return [*super().compared(), *self.finished]

    def worth(self, t: Tensor, r: Tensor) -> Tensor:
        """See :meth:`ConsistencyTrainer.worth`; samples at the border have a mean of their own."""
        own = super().worth(t, r)
        if not self.phase:
            return own
        share, weight = self.config.border_share, self.config.border_weight
        return own * torch.where(t <= self.boundary, weight / share, 1 / (1 - share))

    def passes(self) -> list[Pass]:
        """As ``consistency``; in the second stage the first network's besides."""
        return super().passes() + ([Pass("student", "forward")] if self.phase else [])

    @property
    def finished(self) -> list[Denoiser]:
        """See :attr:`Trainer.finished`: the first network, in the second stage."""
        return [self.players[WHOLE].denoiser] if self.phase else []


TRAINER = TCMTrainer
