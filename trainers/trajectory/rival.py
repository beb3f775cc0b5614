"""A discriminator beside a consistency loss: it reads the frozen teacher at states noised further.

The student's estimates of states at some time, clean or not, are told from others of the same time:
the data, or what they are pulled to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.process import Process
from stepdistill.losses.distribution import Renoise
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Trainer, Turn
from stepdistill.trainers.score.opponent import (
    DiscriminatorOptim,
    Opponent,
    TeacherConfig,
    TeacherOpponent,
)
from stepdistill.trainers.trajectory.consistency import ConsistencyConfig, ConsistencyTrainer

PLAYER = "discriminator"


class Further(Opponent):
    """An opponent that reads states of the path, which it takes to noisier times.

    Args:
        opponent: whose features and heads these are.
        end: times [B] of the states; its density's times lie above them, evenly in progress.
    """

    config: TeacherConfig

    def __init__(self, opponent: TeacherOpponent, end: Tensor) -> None:
        self.config, self.net, self.base, self.end = opponent.config, opponent.net, opponent, end

    def read(
        self, x: Tensor, batch: Batch, rng: Rng, stream: str, near: float = 0.0
    ) -> Sequence[Tensor]:
        """See :meth:`Opponent.read`."""
        process = self.base.teacher.process
        t = lifted(
            self.config.t.sample(rng.uniform("level", batch.index), process), self.end, process
        )
        name = "fake" if self.config.same_noise else stream
        e = rng.normal(f"{name}-e", batch.index, x.shape[1:])
        kernel = Renoise(process.coefs(self.end).expand(x), process.coefs(t).expand(x))
        x_t = kernel.state(x, e)
        if near:
            x_t = x_t + near * rng.normal("r1", batch.index, x.shape[1:])
        return self.base.features(x_t, t, batch.cond)


class Rival:
    """The discriminator of a trainer whose student learns to agree along a path.

    Args:
        trainer: to which a player is added, with new heads.
        config: what it reads and what it costs.
        optim: of its heads.
        total: updates that its learning rate's schedule spans.

    Raises:
        UserError: features that cannot be had of the teacher.
    """

    def __init__(
        self, trainer: Trainer, config: TeacherConfig, optim: DiscriminatorOptim, total: int
    ) -> None:
        self.opponent = TeacherOpponent(config, trainer.teacher, trainer.config.seed)
        self.seen: tuple[Tensor, Tensor, Further] | None = None
        trainer.add_player(
            PLAYER,
            trainer.teacher,
            optim,
            ema=False,
            total=total,
            extra=self.opponent.net,
            frozen=True,
        )

    @property
    def turn(self) -> Turn:
        """Its own update, on the states that the student's left it."""
        return Turn(PLAYER, self.loss)

    def against(
        self, made: Tensor, real: Tensor, end: Tensor, batch: Batch, rng: Rng
    ) -> dict[str, Tensor]:
        """The student's part of its loss, as {"adversarial": value}.

        Args:
            made: the student's states [B, C, *S] at times ``end`` [B], part of the graph.
            real: what they are told from, at the same times.
        """
        further = Further(self.opponent, end)
        self.seen = made.detach(), real, further
        return {"adversarial": further.against(made, replace(batch, x=real), rng).mean()}

    def loss(self, batch: Batch, rng: Rng, wrong: Batch | None = None) -> Loss:
        """Tell the student's states of this step from the others; see :meth:`Opponent.loss`."""
        assert self.seen is not None
        made, real, further = self.seen
        parts = further.loss(made, replace(batch, x=real), rng, wrong)
        return Loss(parts["loss"], parts)

    def passes(self) -> list[Pass]:
        """Passes of the teacher for features, in both turns."""
        return self.opponent.passes(1)


def lifted(t: Tensor, low: Tensor, process: Process) -> Tensor:
    """Times [B] of (0, t_max) moved into those above ``low`` [B], evenly in progress."""
    bottom = process.unwarp(low)
    u = process.unwarp(t)
    return process.warp(bottom + u * (1 - bottom)).clamp_max(process.t_max)


class OpposedConfig(ConsistencyConfig):
    """Settings of a student of consistency with a discriminator beside."""

    idle: ClassVar = {**ConsistencyConfig.idle, "discriminator": ("adversary=null",)}

    adversary: TeacherConfig | None = Field(
        None, description="a discriminator of jumps and their targets; null: none"
    )
    discriminator: DiscriminatorOptim = Field(
        default_factory=DiscriminatorOptim, description="the discriminator's optimizer"
    )


class Opposed(ConsistencyTrainer):
    """A student of consistency, and a discriminator of its jumps and what they are pulled to."""

    config: OpposedConfig
    rival: Rival | None = None

    def oppose(self, steps: int) -> None:
        """Make the discriminator, if the config has one, for as many updates."""
        c = self.config
        self.rival = Rival(self, c.adversary, c.discriminator, steps) if c.adversary else None

    def turns(self, step: int) -> list[Turn]:
        """The student, then the discriminator where there is one."""
        return [*super().turns(step), *([self.rival.turn] if self.rival else [])]

    def beside(
        self, estimate: Tensor, target: Tensor, end: Tensor, batch: Batch, rng: Rng
    ) -> dict[str, Tensor]:
        """See :meth:`ConsistencyTrainer.beside`: jumps against what they are pulled to."""
        return self.rival.against(estimate, target, end, batch, rng) if self.rival else {}

    def passes(self) -> list[Pass]:
        """See :meth:`ConsistencyTrainer.passes`; and the teacher's for features."""
        return super().passes() + (self.rival.passes() if self.rival else [])
