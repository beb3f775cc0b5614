"""Features of a network by forward hooks on named modules; the network itself is not touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def record(net: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the modules called ``names`` while the context is open.

    Raises:
        ValueError: a name that the network does not have.
    """
    features: dict[str, Tensor] = {}
    if not names:
        yield features
        return
    modules = dict(net.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise ValueError(f"{type(net).__name__} has no module {missing[0]!r} to take features from")

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            features[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
