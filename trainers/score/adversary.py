"""The adversarial part of a score trainer: a discriminator on features of its networks.

It reads features of the fake score (DMD2), of the teacher (LADD), or the noised state itself. The
fake sample's features come from the pass that the scores need anyway, cut off behind the last
tapped module where no more of it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import expand
from stepdistill.losses.adversarial import AdversarialLoss, NonSaturating
from stepdistill.losses.heads import Discriminator, HeadPlug, Tokens
from stepdistill.run.errors import UserError
from stepdistill.run.plug import plug
from stepdistill.trainers.base import Pass
from stepdistill.trainers.settings import Section

MOST_LOG_RATIO = 10.0


class AdversaryConfig(Section):
    """An adversarial head."""

    features: Literal["critic", "teacher", "state"] = Field(
        "critic", description="whose features it reads; state: the noised sample and its time"
    )
    taps: tuple[str, ...] = Field(
        (), description="modules whose outputs are the features; empty: half way through"
    )
    head: plug(HeadPlug) = Field(default_factory=Tokens, description="the head on each feature")  # type: ignore[valid-type]
    loss: plug(AdversarialLoss) = Field(  # type: ignore[valid-type]
        default_factory=NonSaturating, description="what its logits cost both sides"
    )
    student: float = Field(3e-3, ge=0, description="weight in the student's loss")
    critic: float = Field(1e-2, ge=0, description="weight in the fake score's loss")
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
        self.config, self.process = config, teacher.process
        den = critic if config.features == "critic" else teacher
        self.names = () if config.features == "state" else config.taps or den.adapter.taps(den.net)
        if config.features != "state" and not self.names:
            raise UserError(
                f"adversary.taps: {type(den.net).__name__} has no features known here; name its "
                "modules, or set adversary.features=state"
            )
        x = torch.zeros(1, *den.sample_shape, device=den.device)
        t = torch.full((1,), 0.5 * den.process.t_max, device=den.device)
        label = torch.zeros(1, dtype=torch.long, device=den.device) if den.classes else None
        try:
            with torch.no_grad():
                found = den.features(x, t, Cond(label), self.names) if self.names else []
        except ValueError as error:
            raise UserError(f"adversary.taps: {error}") from error
        read = self.read(x, t, dict(zip(self.names, found, strict=True)))
        channels = [f.shape[1] if f.dim() in (2, 4) else f.shape[-1] for f in read]
        self.net = Discriminator(config.head, channels, seed).to(den.device)

    def taps(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Modules of fake score and teacher that are read."""
        own = self.config.features == "critic"
        return (self.names, ()) if own else ((), self.names)

    def read(self, x_t: Tensor, t: Tensor, *kept: Mapping[str, Tensor]) -> list[Tensor]:
        """The features, of what the networks' passes kept or of the state itself."""
        if self.config.features != "state":
            features = {name: value for one in kept for name, value in one.items()}
            return [features[name] for name in self.names]
        level = torch.tanh(self.process.log_snr(t) / 4)
        return [torch.cat([x_t, expand(level, x_t).expand_as(x_t[:, :1])], dim=1)]

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


def ratio(logits: Tensor) -> Tensor:
    """Density of the data over the student's [B], from log-ratio logits [B, K]."""
    return logits.detach().mean(dim=1).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp()
