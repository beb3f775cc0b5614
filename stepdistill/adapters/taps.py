"""Features of a network by forward hooks on named modules; the network itself is not touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Tail = Literal["whole", "frozen", "none"]
"""What becomes of the network after its last tap: it runs as it is, without a graph, or not."""


class _EnoughError(Exception):
    """All features are there; the rest of the network need not run."""


@contextmanager
def record(
    net: nn.Module,
    names: Sequence[str],
    tail: Tail = "whole",
    feature: Callable[[str, Any], Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the modules called ``names`` while the context is open.

    Of several calls in it, the last one's. With ``tail="none"`` a call of the network ends the
    context as soon as it has them all. Of a module with several outputs the first is kept, or what
    ``feature`` finds by the module's name and these.

    Raises:
        ValueError: a name that the network does not have.
    """
    features: dict[str, Tensor] = {}
    if not names:
        yield features
        return
    modules = dict(net.named_modules())
    find = feature or (lambda _, output: output if isinstance(output, Tensor) else output[0])
    missing = [name for name in names if name not in modules]
    if missing:
        raise ValueError(f"{type(net).__name__} has no module {missing[0]!r} to take features from")

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            features[name] = find(name, output)
            if tail == "whole" or len(features) < len(names):
                return None
            if tail == "none":
                raise _EnoughError
            torch.set_grad_enabled(False)
            return _detached(output)

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    grad = torch.is_grad_enabled()
    try:
        yield features
    except _EnoughError:
        pass
    finally:
        torch.set_grad_enabled(grad)
        for handle in handles:
            handle.remove()


def _detached(output: Any) -> Any:
    """One tensor, or several or what else there is in their place, without their graphs."""
    if isinstance(output, tuple):
        return tuple(_detached(part) for part in output)
    return output.detach() if isinstance(output, Tensor) else output
