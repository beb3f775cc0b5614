"""The adversarial part of a score trainer: a discriminator on features of its networks.

It reads features of the fake score (DMD2), of the teacher (LADD), or the noised state itself. The
fake sample's features come from the pass that the scores need anyway, cut off behind the last
tapped module where no more of it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.losses.adversarial import AdversarialLoss, NonSaturating
from stepdistill.losses.heads import Discriminator, HeadPlug, Tokens
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plugged
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Pass
from stepdistill.trainers.score.opponent import heads, label_rows
from stepdistill.trainers.score.reading import channels, modules, state
from stepdistill.trainers.settings import Section

MOST_LOG_RATIO = 10.0


class AdversaryConfig(Section):
    """An adversarial head."""

    features: Literal["critic", "teacher", "state"] = Field(
        "critic",
        description="whose features it reads; state: the noised sample, its time and class",
    )
    taps: tuple[str, ...] = Field(
        (), description="modules whose outputs are the features; empty: half way through"
    )
    head: Plugged[HeadPlug] = Field(default_factory=Tokens, description="the head on each feature")
    loss: Plugged[AdversarialLoss] = Field(
        default_factory=NonSaturating, description="what its logits cost both sides"
    )
    student: float = Field(3e-3, ge=0, description="weight in the student's loss, for each entry")
    critic: float = Field(1e-2, ge=0, description="weight in the fake score's loss")
    pace: float = Field(
        1.0, gt=0, description="learning rate of the heads, as a multiple of the fake score's"
    )
    r1: float = Field(0.0, ge=0, description="weight of the approximate R1 penalty; 0: none")
    r1_noise: float = Field(0.1, gt=0, description="spread of that penalty's noise")
    from_step: int = Field(0, ge=0, description="step from which it takes part")
    same_noise: bool = Field(False, description="noise data and samples by the same noise")


class Adversary:
    """A discriminator and what it reads.

    Args:
        config: as above.
        teacher: the teacher.
        critic: a network like the fake score.
        seed: of the heads' weights.

    Raises:
        UserError: a module that the network does not have, or one whose network has no default.
    """

    def __init__(
        self, config: AdversaryConfig, teacher: Denoiser, critic: Denoiser, seed: int
    ) -> None:
        self.config, self.teacher, self.process = config, teacher, teacher.process
        den = critic if config.features == "critic" else teacher
        self.names = modules(config.features, config.taps, den.adapter.taps, den)
        found = channels(den, lambda x, t, cond: self.features(x, t, den, cond))
        rows = label_rows(teacher) if config.features == "state" else 0
        made = Discriminator if config.features == "critic" else heads  # the critic itself learns
        self.net = made(config.head, found, seed, rows).to(den.device)

    def taps(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Modules of fake score and teacher that are read."""
        own = self.config.features == "critic"
        return (self.names, ()) if own else ((), self.names)

    def read(self, x_t: Tensor, t: Tensor, *kept: Mapping[str, Tensor]) -> list[Tensor]:
        """The features, of what the networks' passes kept or of the state itself."""
        if self.config.features != "state":
            features = {name: value for one in kept for name, value in one.items()}
            return [features[name] for name in self.names]
        return state(self.process, x_t, t)

    def oppose(
        self,
        features: Sequence[Tensor],
        critic: Denoiser,
        t: Tensor,
        batch: Batch,
        rng: Rng,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The student's weighted loss, and the logits [B, K] of its noised samples.

        Matching losses are sums over a sample's entries, and so it counts once for each of them.

        Args:
            features: what is read of the samples, part of the graph.
            critic: the fake score at present.
            t: times [B].
            batch: the step's.
            rng: the step's.
            weight: factors [B]; 1 if left out.
        """
        c, real = self.config, None
        logits = self.net(features, batch.cond.label)
        if c.loss.compares:
            with torch.no_grad():
                real = self.net(self.real(t, critic, batch, rng), batch.cond.label)
        each = c.loss.student(logits, real)
        loss = (each if weight is None else each * weight[:, None]).mean()
        return c.student * math.prod(self.teacher.sample_shape) * loss, logits

    def discriminate(
        self,
        x_t: Tensor,
        e: Tensor,
        t: Tensor,
        kept: Mapping[str, Tensor],
        critic: Denoiser,
        batch: Batch,
        rng: Rng,
    ) -> Tensor:
        """The discriminator's own loss.

        Args:
            x_t: the fake score's states [B, ...], and e the noise in them.
            t: times [B].
            kept: features of the fake score's own pass at these.
            critic: the fake score at present.
            batch: the data, and the conditions of that pass.
            rng: the step's.
        """
        c, label = self.config, batch.cond.label
        own = e if c.same_noise else None
        fake = self.net(self.features(x_t, t, critic, batch.cond, kept), label)
        real = self.net(self.real(t, critic, batch, rng, own), label)
        loss: Tensor = c.loss.critic(real, fake).mean()
        if c.r1:
            near = self.net(self.real(t, critic, batch, rng, own, c.r1_noise), label)
            loss = loss + c.r1 * (real - near).square().mean()
        return loss

    def features(
        self, x_t: Tensor, t: Tensor, critic: Denoiser, cond: Cond, kept: Mapping[str, Tensor] = {}
    ) -> list[Tensor]:
        """What is read of x_t, by a pass of its network unless one kept it already."""
        den = critic if self.config.features == "critic" else self.teacher
        with nullcontext() if den is critic else torch.no_grad():
            if self.names and not kept:
                found = den.features(x_t, t, cond, self.names)
                kept = dict(zip(self.names, found, strict=True))
            return self.read(x_t, t, kept)

    def real(
        self,
        t: Tensor,
        critic: Denoiser,
        batch: Batch,
        rng: Rng,
        e: Tensor | None = None,
        near: float = 0.0,
    ) -> list[Tensor]:
        """What is read of the data, noised to times t by e, or by fresh noise.

        ``near`` is the spread of more noise on top, for the approximate R1 penalty.
        """
        assert batch.x is not None
        shape = batch.x.shape[1:]
        e = rng.normal("real-e", batch.index, shape) if e is None else e
        x_t = self.process.noise(batch.x, e, t)
        if near:
            x_t = x_t + near * rng.normal("r1", batch.index, shape)
        return self.features(x_t, t, critic, batch.cond)

    def passes(self, asked: Sequence[Pass], critic_steps: int) -> tuple[list[Pass], list[Pass]]:
        """Passes of the comparison as the features change them, and those only for features."""
        if self.config.features == "state":
            return list(asked), []
        whose = self.config.features
        out = [
            replace(p, kind="input", part="tail", taps=self.names) if p.role == whose else p
            for p in asked
        ]
        real = 2 if self.config.r1 else 1
        compared = 1 if self.config.loss.compares else 0
        kind: Literal["train", "forward"] = "train" if whose == "critic" else "forward"
        made = real if whose == "critic" else real + 1  # the fake's own comes with the fake score
        own = [Pass(whose, kind, critic_steps * made, 1, "features", self.names)]
        own += [Pass(whose, "forward", 1, 1, "features", self.names)] * compared
        return out, own


class RatioConfig(Section):
    """Bounds of the density ratio of data to student that a head tells."""

    least_ratio: float = Field(0.1, gt=0, le=1, description="lower bound of the density ratio")
    greatest_ratio: float = Field(20.0, ge=1, description="upper bound of it")


def check_ratio(head: AdversaryConfig, method: str) -> None:
    """See that a head tells the density ratio.

    Raises:
        UserError: its loss has other logits.
    """
    if not isinstance(head.loss, NonSaturating):
        raise UserError(
            f"adversary.loss={head.loss.kind}: its logits are no log density ratios, which "
            f"{method} needs; set adversary.loss=non_saturating"
        )


def ratio(logits: Tensor) -> Tensor:
    """Density of the data over the student's [B], from log-ratio logits [B, K]."""
    return logits.detach().mean(dim=1).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp()
