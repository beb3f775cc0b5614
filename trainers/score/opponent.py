"""Opponents: discriminators on features of a frozen network, players of their own.

An opponent's heads are trained, and nothing else of it. In the student's turn the features are
part of the graph, since the gradient flows through them to the sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.timesteps import Density, LogitNormal
from stepdistill.losses.adversarial import AdversarialLoss, Hinge
from stepdistill.losses.features import ImageFeatures, Projected, RandomConv, widths
from stepdistill.losses.heads import Discriminator, HeadPlug, Tokens
from stepdistill.run.errors import UserError
from stepdistill.run.player import Beta, OptimConfig
from stepdistill.run.plug import Plugged
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Pass
from stepdistill.trainers.score.reading import channels, modules, state
from stepdistill.trainers.settings import Section


class DiscriminatorOptim(OptimConfig):
    """A discriminator's optimizer: quick, and without momentum."""

    lr: float = Field(4e-4, gt=0, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.0, 0.99), description="AdamW's betas")


class OpponentConfig(Section):
    """A discriminator that is a player of its own."""

    head: Plugged[HeadPlug] = Field(default_factory=Tokens, description="the head on each feature")
    loss: Plugged[AdversarialLoss] = Field(
        default_factory=Hinge, description="what its logits cost both sides, added over the heads"
    )
    student: float = Field(1.0, ge=0, description="weight in the student's loss")
    r1: float = Field(0.0, ge=0, description="weight of the approximate R1 penalty; 0: none")
    r1_noise: float = Field(0.1, gt=0, description="spread of that penalty's noise")


class PictureConfig(OpponentConfig):
    """A discriminator on frozen features of the pictures themselves."""

    features: Plugged[ImageFeatures] = Field(
        default_factory=RandomConv, description="the frozen network on pictures in [-1, 1]"
    )
    project: int | None = Field(
        None, ge=1, description="channels of a random projection of the features; null: none"
    )


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


ON_STATES = {
    "features": "state",
    "head": "quadratic",
    "t": {"kind": "uniform", "low": 0.1, "high": 0.1},
    "same_noise": True,
    "r1": 4.0,
    "r1_noise": 0.5,
}
"""A proof's :class:`TeacherConfig`: what tells Gaussians apart, at states noised a little."""


class Opponent(ABC):
    """A discriminator: what it reads, and what it costs both sides."""

    config: OpponentConfig
    net: Discriminator

    @abstractmethod
    def read(
        self, x: Tensor, batch: Batch, rng: Rng, stream: str, near: float = 0.0
    ) -> Sequence[Tensor]:
        """Features of samples x [B, ...].

        Args:
            stream: name of the noise, where samples are noised first.
            near: spread of more noise on top, for the approximate R1 penalty.
        """

    def logits(
        self, x: Tensor, batch: Batch, rng: Rng, stream: str = "fake", near: float = 0.0
    ) -> Tensor:
        """Logits [B, K] of samples, high for data."""
        out: Tensor = self.net(self.read(x, batch, rng, stream, near), batch.cond.label)
        return out

    def against(self, x: Tensor, batch: Batch, rng: Rng) -> Tensor:
        """The student's weighted loss [B] on its samples x, which are part of the graph."""
        fake, real = self.logits(x, batch, rng), None
        if self.config.loss.compares:
            assert batch.x is not None
            with torch.no_grad():
                real = self.logits(batch.x, batch, rng, "real")
        loss: Tensor = self.config.loss.student(fake, real)
        return self.config.student * loss.sum(dim=1)

    def loss(
        self, made: Tensor, batch: Batch, rng: Rng, wrong: Batch | None = None
    ) -> dict[str, Tensor]:
        """The discriminator's own loss and its parts, on samples that have no graph.

        With ``wrong``, data under wrong conditions, half of the fake ones are those.
        """
        assert batch.x is not None
        fake = self.logits(made, batch, rng)
        real = self.logits(batch.x, batch, rng, "real")
        loss: Tensor = self.config.loss.critic(real, fake).sum(dim=1).mean()
        parts = {"real": real.mean(), "fake": fake.mean()}
        if wrong is not None:
            assert wrong.x is not None
            other = self.logits(wrong.x, wrong, rng, "wrong")
            loss = (loss + self.config.loss.critic(real, other).sum(dim=1).mean()) / 2
            parts["wrong"] = other.mean()
        if self.config.r1:
            near = self.logits(batch.x, batch, rng, "real", self.config.r1_noise)
            parts["r1"] = (real - near).square().sum(dim=1).mean()
            loss = loss + self.config.r1 * parts["r1"]
        return {"loss": loss, **parts}


class PictureOpponent(Opponent):
    """A discriminator on frozen features of pictures; its heads are told the class.

    Args:
        config: as above.
        teacher: tells shape and classes.
        seed: of heads and projections.

    Raises:
        UserError: features that cannot be had of such samples.
    """

    config: PictureConfig

    def __init__(self, config: PictureConfig, teacher: Denoiser, seed: int) -> None:
        self.config = config
        net = config.features.build(teacher.sample_shape).to(teacher.device)
        x = torch.zeros(1, *teacher.sample_shape, device=teacher.device)
        with torch.no_grad():
            channels = widths(net.eval()(x))
            if config.project is not None:
                net = Projected(net, channels, config.project, seed).to(teacher.device)
                channels = [config.project] * len(channels)
        self.features = net.eval().requires_grad_(False)
        self.net = heads(config.head, channels, seed, label_rows(teacher)).to(teacher.device)

    def read(
        self, x: Tensor, batch: Batch, rng: Rng, stream: str, near: float = 0.0
    ) -> Sequence[Tensor]:
        """See :meth:`Opponent.read`; only the R1 penalty's samples are noised."""
        if near:
            x = x + near * rng.normal("r1", batch.index, x.shape[1:])
        found: list[Tensor] = self.features(x)
        return found


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


def heads(head: HeadPlug, channels: Sequence[int], seed: int, rows: int) -> Discriminator:
    """The heads of a discriminator on frozen features.

    Raises:
        UserError: they have no weights, so that nothing would be trained.
    """
    net = Discriminator(head, channels, seed, rows)
    if next(net.parameters(), None) is None:
        raise UserError(
            f"head: {head.kind} has no weights of its own, and the features are frozen; "
            "take another, such as tokens"
        )
    return net


def label_rows(den: Denoiser) -> int:
    """Rows of a table of a network's labels, that of no class included; 0 if it has none."""
    return max(len(den.classes), den.null_label or 0) + 1 if den.classes else 0
