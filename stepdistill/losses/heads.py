"""Adversarial heads: from features of a network to logits; and the discriminator made of them.

A new one is a subclass with ``build``; a config names it by ``head: {kind: FILE.py:CLASS}``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from stepdistill.run.plug import Plug
from stepdistill.run.rng import seeded

LABEL_WIDTH = 16  # channels that tell a head the class


class HeadPlug(Plug):
    """A head on the features of one place of a network."""

    @abstractmethod
    def build(self, channels: int) -> nn.Module:
        """A module from positions [B, N, channels] to logits [B], or to several [B, K]."""


class Tokens(HeadPlug):
    """A small network on every position, whose outputs are averaged; it begins at 0."""

    width: int = Field(64, ge=1, description="hidden channels")

    def build(self, channels: int) -> nn.Module:
        """See :meth:`HeadPlug.build`."""
        last = _last(self.width)
        layers = (nn.LayerNorm(channels), nn.Linear(channels, self.width), nn.SiLU(), last, Pool())
        return nn.Sequential(*layers)


class Pooled(HeadPlug):
    """Mean and spread over the positions, then a small network; it begins at 0."""

    width: int = Field(64, ge=1, description="hidden channels")

    def build(self, channels: int) -> nn.Module:
        """See :meth:`HeadPlug.build`."""
        last = _last(self.width)
        first = nn.Linear(2 * channels, self.width)
        return nn.Sequential(Moments(), nn.LayerNorm(2 * channels), first, nn.SiLU(), last, Pool())


class Mlp(HeadPlug):
    """Two hidden layers on the features as they are, for states of few dimensions."""

    width: int = Field(64, ge=1, description="hidden channels")

    def build(self, channels: int) -> nn.Module:
        """See :meth:`HeadPlug.build`."""
        last = _last(self.width)
        first, second = nn.Linear(channels, self.width), nn.Linear(self.width, self.width)
        return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last, Pool())


class Quadratic(HeadPlug):
    """A weighted sum of the features and their products: all that Gaussians are told apart by."""

    def build(self, channels: int) -> nn.Module:
        """See :meth:`HeadPlug.build`."""
        last = nn.Linear(channels + channels * (channels + 1) // 2, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(Products(), last, Pool())


class ChannelMean(HeadPlug):
    """The mean of all channels, a logit a position, without weights (SiDA, Zhou et al. 2024)."""

    def build(self, channels: int) -> nn.Module:
        """See :meth:`HeadPlug.build`."""
        return Channels()


def _last(width: int) -> nn.Linear:
    """To a logit, from 0: without a bias, whose first gradients are rounding that Adam blows up."""
    last = nn.Linear(width, 1, bias=False)
    nn.init.zeros_(last.weight)
    return last


class Pool(nn.Module):
    """Mean of everything but the batch: [B]."""

    def forward(self, x: Tensor) -> Tensor:
        """Means [B]."""
        return x.flatten(1).mean(dim=1)


class Channels(nn.Module):
    """Mean over channels: [B, N, C] to [B, N]."""

    def forward(self, x: Tensor) -> Tensor:
        """Means [B, N]."""
        return x.mean(dim=2)


class Products(nn.Module):
    """Features and their products: [B, N, C] to [B, N, C + C (C + 1) / 2]."""

    def forward(self, x: Tensor) -> Tensor:
        """Both, one after the other."""
        rows, columns = torch.triu_indices(x.shape[2], x.shape[2], device=x.device)
        return torch.cat([x, x[..., rows] * x[..., columns]], dim=2)


class Moments(nn.Module):
    """Mean and mean square over positions: [B, N, C] to [B, 2 C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Moments [B, 2 C]."""
        return torch.cat([x.mean(dim=1), x.square().mean(dim=1).add(1e-6).sqrt()], dim=1)


class Discriminator(nn.Module):
    """One head for each place that features are taken from.

    Args:
        head: what is built at each.
        channels: of the features at each.
        seed: of the heads' first weights.
        labels: rows of a table of classes that the heads are told, where the features do not know
            them; 0 for none.
    """

    def __init__(self, head: HeadPlug, channels: Sequence[int], seed: int, labels: int = 0) -> None:
        super().__init__()
        more = LABEL_WIDTH if labels else 0
        with seeded(seed):
            self.heads = nn.ModuleList(head.build(count + more) for count in channels)
            self.label = nn.Embedding(labels, LABEL_WIDTH) if labels else None

    def forward(self, features: Sequence[Tensor], label: Tensor | None = None) -> Tensor:
        """Logits [B, K] of features in their networks' own layouts, one or more of each.

        ``label`` [B] is for heads that are told it. In fp32, where ratios and R1's differences
        need it.
        """
        spread = [positions(f.float()) for f in features]
        with torch.autocast(spread[0].device.type, enabled=False):
            if self.label is not None:
                told = self.label(label)[:, None]
                spread = [torch.cat([f, told.expand(-1, f.shape[1], -1)], dim=2) for f in spread]
            rows = [head(f) for head, f in zip(self.heads, spread, strict=True)]
        return torch.cat([row[:, None] if row.dim() == 1 else row for row in rows], dim=1)


def positions(feature: Tensor) -> Tensor:
    """A feature as [B, N, C]: maps [B, C, H, W], tokens [B, N, C], or vectors [B, C]."""
    if feature.dim() == 2:
        return feature[:, None]
    return feature.flatten(2).transpose(1, 2) if feature.dim() == 4 else feature
