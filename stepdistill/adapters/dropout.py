"""Dropout that is the same in every call: what is dropped is drawn by a seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Drop:
    """What a network's dropout layers drop.

    Args:
        share: of their entries, in [0, 1).
        seed: by which these are drawn, the same in every call of as large a batch.
    """

    share: float
    seed: int


def droppers(net: nn.Module) -> list[nn.Dropout]:
    """The dropout layers of a network, whether they drop or not."""
    return [module for module in net.modules() if isinstance(module, nn.Dropout)]


@contextmanager
def dropped(net: nn.Module, drop: Drop | None) -> Iterator[None]:
    """Calls of a network in this context drop; torch's own randomness goes on as it was."""
    if drop is None:
        yield
        return
    device, found = next(net.parameters()).device, droppers(net)
    shares = [layer.p for layer in found]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(drop.seed)
        for layer in found:
            layer.p, layer.training = drop.share, True
        try:
            yield
        finally:
            for layer, share in zip(found, shares, strict=True):
                layer.p, layer.training = share, False
