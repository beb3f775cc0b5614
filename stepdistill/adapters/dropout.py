"""Dropout that is the same in every call: what a sample's layers drop is drawn by its number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SHIFTS = (0, 16, 32, 48)  # of the four draws in a word
LEVELS = 1 << 16


@dataclass(frozen=True)
class Drop:
    """What a network's dropout layers drop.

    Args:
        share: of their entries, in (0, 1), to the nearest of 65,536ths.
        words: by a layer's name and their count, random 64-bit words [B, count] of the samples.
    """

    share: float
    words: Callable[[str, int], Tensor]

    def mask(self, layer: str, like: Tensor) -> Tensor:
        """What a layer's entries [B, ...] are multiplied by: 0, or 1 / (1 - share)."""
        count = math.prod(like.shape[1:])
        words = self.words(layer, -(-count // len(SHIFTS)))
        draws = torch.stack([(words >> shift) & (LEVELS - 1) for shift in SHIFTS], dim=2)
        kept = draws.flatten(1)[:, :count].reshape(like.shape) >= round(self.share * LEVELS)
        return kept.to(like.dtype) / (1 - self.share)


def droppers(net: nn.Module) -> dict[str, nn.Module]:
    """The dropout layers of a network by name, whether they drop or not."""
    return {name: part for name, part in net.named_modules() if isinstance(part, nn.Dropout)}


@contextmanager
def dropped(net: nn.Module, drop: Drop | None) -> Iterator[None]:
    """Calls of a network, which itself is left in eval mode, drop in this context."""
    handles = []
    if drop is not None:
        handles = [
            layer.register_forward_hook(_hook(drop, name)) for name, layer in droppers(net).items()
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(drop: Drop, name: str) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output * drop.mask(name, output)

    return hook
