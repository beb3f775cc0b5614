"""Gradient checkpointing that recomputes a block with the adapter and numbers that it had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from stepdistill.adapters import lora, scalars


class Recompute:
    """What a network of diffusers calls its blocks by.

    By the time of the backward pass another adapter may be on, or other numbers be told. An
    instance copies along with its network and then stands for the copy.

    Args:
        net: the network whose adapters are switched.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        """``block(*args)``, of which only the inputs are kept for the backward pass."""
        name, extra = lora.active(self.net), scalars.held(self.net)
        values = None if extra is None else extra.values

        @contextmanager
        def again() -> Iterator[None]:
            numbers = nullcontext() if extra is None else extra.telling(values)
            with lora.switched(self.net, name), numbers:
                yield

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), again()

        return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


def recompute(net: nn.Module) -> None:
    """Have a network recompute its blocks in the backward pass instead of keeping what they need.

    Raises:
        ValueError: the network does not support it.
    """
    if not can_recompute(net):
        raise ValueError(f"{type(net).__name__} does not support it")
    switch: Any = net.enable_gradient_checkpointing
    switch(Recompute(net) if lora.shared(net) or scalars.held(net) else None)


def can_recompute(net: nn.Module) -> bool:
    """Whether a network supports :func:`recompute`: those of diffusers say so."""
    return bool(getattr(net, "_supports_gradient_checkpointing", False))
