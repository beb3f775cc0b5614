"""Adapter: the only place that knows how a family of networks is called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Adapter(ABC):
    """The signature of one family of networks."""

    @abstractmethod
    def __call__(
        self, call: Callable[..., Any], x: Tensor, time: Tensor, label: Tensor | None
    ) -> Tensor:
        """Run ``call`` (the network, or a wrapper of it) on x [B, C, *S] at network times [B]."""

    @abstractmethod
    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """Shape of one sample without the batch."""

    def null_label(self, net: nn.Module) -> int | None:
        """The label that means "no class", where the architecture itself fixes one."""
        return None
