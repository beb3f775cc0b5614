"""Terms: what a config adds to the student's loss, on clean samples that have a graph.

A new one is a subclass with ``__call__``; a config names it by ``terms: [{kind: FILE.py:CLASS}]``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from stepdistill.losses import reward as scored
from stepdistill.losses.features import ImageFeatures, Pixels
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plug, Plugged, kind_of

_networks: dict[tuple[type, str, tuple[int, ...], str], nn.Module] = {}


class Term(Plug):
    """A further loss of each sample.

    ``group`` is how many neighbours in the batch it takes together, whose drawn class is one and
    the same.
    """

    group: ClassVar[int] = 1

    @property
    def on(self) -> bool:
        """Whether it adds anything; a term that does not is not computed."""
        return True

    @abstractmethod
    def __call__(self, x: Tensor, label: Tensor | None) -> Tensor:
        """The loss [B], weighted, of clean samples x [B, ...] of classes [B], or of none."""


class Diversity(Term):
    """-weight (1 - cos(E(x), E(x'))) of the samples 2i and 2i + 1, which share their class.

    Where batches bring classes of their own, as images do, a pair of two classes adds nothing.

    Source: the diversity reward of Diversity-rewarded CFG distillation (arXiv 2410.06084, from
    memory), here differentiated through the samples in the place of a policy gradient.
    """

    group: ClassVar[int] = 2
    weight: float = Field(0.1, ge=0, description="beta: how much diversity counts")
    features: Plugged[ImageFeatures] = Field(
        default_factory=Pixels, description="E, whose features are laid out in one vector"
    )

    @property
    def on(self) -> bool:
        """See :attr:`Term.on`."""
        return self.weight > 0

    def __call__(self, x: Tensor, label: Tensor | None) -> Tensor:
        """See :class:`Term`."""
        found = network(self.features, tuple(x.shape[1:]), str(x.device))(x.float())
        flat = torch.cat([part.flatten(1) for part in found], dim=1)
        diverse = diversity(flat)
        if label is not None:
            diverse = diverse * (label[0::2] == label[1::2])
        return -self.weight * diverse.repeat_interleave(2)


class Reward(Term):
    """-weight R(x, class): the student follows a reward's gradient."""

    weight: float = Field(1.0, ge=0, description="how much the reward counts")
    reward: Plugged[scored.Reward] = Field(description="the reward")

    @property
    def on(self) -> bool:
        """See :attr:`Term.on`."""
        return self.weight > 0

    def __call__(self, x: Tensor, label: Tensor | None) -> Tensor:
        """See :class:`Term`."""
        return -self.weight * scored.rewards(self.reward, x, label, slope=True)


class Clamped(Term):
    """weight max(0, threshold - R(x, class)): what fits its class well enough is left alone.

    Source: SwiftBrush v2 (Dao et al. 2024), whose R is the cosine of CLIP's embeddings of image and
    prompt; its threshold and weight are from memory.
    """

    weight: float = Field(0.1, ge=0, description="how much it counts")
    threshold: float = Field(0.37, description="the reward from which nothing is asked any more")
    reward: Plugged[scored.Reward] = Field(description="the reward")

    @property
    def on(self) -> bool:
        """See :attr:`Term.on`."""
        return self.weight > 0

    def __call__(self, x: Tensor, label: Tensor | None) -> Tensor:
        """See :class:`Term`."""
        short: Tensor = self.threshold - scored.rewards(self.reward, x, label, slope=True)
        return self.weight * short.clamp_min(0)


def diversity(e: Tensor) -> Tensor:
    """1 - cos(e, e') of neighbours 2i and 2i + 1, features [2 N, D]: [N].

    As half the squared distance of unit vectors: 0, with a finite gradient, for two that are one.
    """
    unit = e / e.norm(dim=1, keepdim=True).clamp_min(1e-6)
    gap: Tensor = unit[0::2] - unit[1::2]
    return 0.5 * gap.square().sum(dim=1)


def network(features: ImageFeatures, shape: tuple[int, ...], device: str) -> nn.Module:
    """The frozen network of features, made once."""
    key = (type(features), features.model_dump_json(), shape, device)
    if key not in _networks:
        net: nn.Module = features.build(shape).requires_grad_(False).eval()
        _networks[key] = net.to(device)
    return _networks[key]


def largest(terms: Sequence[Term]) -> int:
    """Neighbours of one class that terms need.

    Raises:
        UserError: two terms that need groups of different sizes.
    """
    sizes = {term.group for term in terms if term.on} - {1}
    if len(sizes) > 1:
        raise UserError(f"terms: they need groups of {sorted(sizes)} samples; give one size")
    return sizes.pop() if sizes else 1


def added(
    terms: Sequence[Term], x: Tensor, label: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of terms, a mean over samples, and its parts by name; 0 and nothing of none.

    Raises:
        UserError: samples without a graph, which no term could move.
    """
    total, parts = x.new_zeros(()), {}
    for term in terms:
        if not term.on:
            continue
        if not x.requires_grad:
            raise UserError(
                "recompute: terms look at clean estimates, which it keeps no graph of before the "
                "last phase; set recompute=false"
            )
        part = term(x, label).mean()
        total, parts[f"term_{kind_of(type(term))}"] = total + part, part
    return total, parts
