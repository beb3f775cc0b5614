"""Implicit scores: the gradient flows through teacher and fake score, in two stages.

First the loss is differentiated in the image alone, whose graph is then freed; then the image's
gradient goes through the student. Both stages together are the whole gradient.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.process import expand
from stepdistill.losses.gap import Seen, Weight, product
from stepdistill.run.plug import Plugged
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass
from stepdistill.trainers.score.adversary import ratio
from stepdistill.trainers.score.engine import Sample, ScoreConfig, ScoreTrainer

TINY = 1e-12  # below which a sample's factor is none


class ImplicitConfig(ScoreConfig):
    """Settings of implicit-score methods."""

    weights: tuple[Plugged[Weight], ...] = Field(
        (), description="factors of each sample's gradient, multiplied and held constant; none: 1"
    )


class Implicit(ScoreTrainer):
    """The comparison of implicit-score methods; they say what the two estimates cost."""

    config: ImplicitConfig

    @abstractmethod
    def cost(self, seen: Seen) -> Tensor:
        """The loss of each sample [B], without weights; all of ``seen`` is part of the graph."""

    def weight(self, seen: Seen) -> tuple[Tensor, Tensor | None]:
        """Each sample's factor [B], held constant, and those of its entries, of mean 1, or None.

        A sample's factor multiplies its loss; its entries', where weights tell them apart, multiply
        the gradient in the image, the adversarial part's too.
        """
        with torch.no_grad():
            found = product(self.config.weights, seen)
            whole = found.flatten(1).mean(dim=1)
            if found[0].numel() == 1:
                return whole, None
            return whole, found / expand(whole.clamp_min(TINY), found)

    def push(self, seen: Seen) -> Tensor | None:
        """Factors of the adversarial loss [B], held constant; None for 1."""
        return None

    def compare(self, made: Sample, batch: Batch, rng: Rng) -> Loss:
        """The gradient in the image first, its own graph freed, then through the student."""
        leaf = made.x.detach().requires_grad_()
        t = self.times(self.config.student_t, made.level, batch, rng)
        x_t = self.process.noise(leaf, self.z(batch, rng, "e"), t)
        asked = self.ask(x_t, t, batch, rng, graph=True)
        fake, real = asked.fake.x, asked.real.x
        coefs, label = self.process.coefs(t).expand(leaf), batch.cond.label
        seen = Seen(leaf, leaf, label, t, coefs, x_t, fake, real)
        logs, against = {}, None
        if self.adversary and self.opposed:
            against, logits = self.adversary.oppose(
                asked.features, self.denoiser(self.fake), t, batch, rng, self.push(seen)
            )
            logs = {"adversarial": against}
            if made.known:
                seen = replace(seen, ratio=ratio(logits))
        whole, parts = self.weight(seen)
        each = whole * self.cost(seen)
        loss = each.masked_fill(equal(fake, real), 0.0).mean()
        total = loss if against is None else loss + against
        (direction,) = torch.autograd.grad(total, leaf)
        if parts is not None:
            direction = direction * parts
        logs |= {"loss": loss, "gap": (fake - real).abs().mean()}
        return Loss((made.x * direction).sum(), logs | self.vitals(made, fake, real, t))

    def passes(self) -> list[Pass]:
        """As the engine's, but the comparison is differentiated in its input."""
        return through(super().passes())


def equal(fake: Tensor, real: Tensor) -> Tensor:
    """Samples [B] whose two estimates are one and the same, as at the start.

    There a gradient that is differentiated through both is rounding, which Adam would blow up to
    a full step.
    """
    return (fake == real).flatten(1).all(dim=1)


def through(passes: Sequence[Pass]) -> list[Pass]:
    """Passes of a comparison that is differentiated in its input, whole."""
    asked = {("critic", "forward"), ("teacher", "forward")}
    return [
        replace(p, kind="input", part="whole", taps=())
        if ((p.role, p.kind) in asked and p.part == "whole") or p.part == "tail"
        else p
        for p in passes
    ]
