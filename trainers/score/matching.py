"""Distribution matching: samples are pulled along the gap of the two scores, held constant.

This is the gradient of a divergence between the noised student's law and the noised data's; the
networks are asked without a graph. Weights, transport and guidance are plug-ins of the config.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.losses.gap import MeanAbs, Seen, Weight, product
from stepdistill.losses.regression import pull
from stepdistill.losses.transport import Plain, Transport
from stepdistill.run.plug import Plugged
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss
from stepdistill.trainers.score.adversary import ratio
from stepdistill.trainers.score.engine import Sample, ScoreConfig, ScoreTrainer


class MatchingConfig(ScoreConfig):
    """Settings of distribution matching."""

    weights: tuple[Plugged[Weight], ...] = Field(
        (MeanAbs(),), description="factors of the direction, multiplied"
    )
    transport: Plugged[Transport] = Field(
        default_factory=Plain, description="from the two clean estimates to a direction"
    )


class Matching(ScoreTrainer):
    """The comparison of distribution matching, for trainers that say how to generate."""

    config: MatchingConfig

    def compare(self, made: Sample, batch: Batch, rng: Rng) -> Loss:
        """Pull the sample along the weighted gap, at levels above its own."""
        x, e = made.x.detach(), self.z(batch, rng, "e")
        t = self.times(self.config.student_t, made.level, batch, rng)
        leaf = x.requires_grad_(bool(self.adversary) and self.opposed)
        kernel = self.kernel(x, made.level, t)
        x_t = kernel.state(leaf, e)
        asked = self.ask(x_t, t, batch, rng, graph=False)
        against, logs, odds = x.new_zeros(()), {}, None
        if self.adversary and self.opposed:
            loss, logits = self.adversary.oppose(
                asked.features, self.denoiser(self.fake), t, batch, rng
            )
            (push,) = torch.autograd.grad(loss, leaf)
            against, odds = (made.x * push).sum(), ratio(logits) if made.known else None
            logs = {"adversarial": loss}
        with torch.no_grad():
            fake, real = asked.fake.x.detach(), asked.real.x.detach()
            reference, label = made.reference.detach(), batch.cond.label
            seen = Seen(
                x.detach(), reference, label, t, kernel.at_t, x_t.detach(), fake, real, odds
            )
            direction = self.direction(seen)
        loss = pull(made.x, direction).mean()
        logs |= {"gap": (fake - real).abs().mean(), "direction": loss}
        return Loss(loss + against, logs | self.vitals(made, fake, real, t, e))

    def direction(self, seen: Seen) -> Tensor:
        """The direction along which the sample descends [B, ...]."""
        c = self.config
        moved: Tensor = c.transport(seen.fake, seen.real)
        return product(c.weights, seen) * moved
