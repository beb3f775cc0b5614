"""Networks in training that are told further numbers, and the same networks without these."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor, nn

NAME = "extra_embedding"  # of the module within the network
FOLDER = "extra"  # of its config and weights, in a saved network's


def extend(net: nn.Module, numbers: Sequence[str], places: Sequence[str]) -> None:
    """Have a network be told further numbers, which it does not heed at first.

    Args:
        net: the network, which gets a module more.
        numbers: their names.
        places: names of its modules that embed its time.
    """
    extra = import_module("stepdistill.adapters.extra").ExtraEmbedding.of(net, numbers, places)
    net.add_module(NAME, extra)
    extra.attach(net)


def held(net: nn.Module) -> Any | None:
    """The :class:`ExtraEmbedding` by which a network is told numbers, if it is."""
    return net._modules.get(NAME)


@contextmanager
def _apart(net: nn.Module) -> Iterator[None]:
    extra = net._modules.pop(NAME)
    try:
        yield
    finally:
        net.add_module(NAME, extra)


def plain(net: nn.Module) -> nn.Module:
    """A copy of a network that is told numbers, as its class makes it: without these."""
    with _apart(net):
        made = copy.deepcopy(net)
    for module in made.modules():
        for key, hook in list(module._forward_hooks.items()):
            if hasattr(hook, "extra"):
                del module._forward_hooks[key]
    return made


def saved(folder: Any, net: nn.Module) -> dict[str, Tensor]:
    """All weights of a network like ``net`` that was saved to a folder, by name."""
    kind: Any = type(net)
    own = kind.from_pretrained(folder, use_safetensors=True).state_dict()
    extra = held(net)
    if extra is not None:
        more = type(extra).from_pretrained(folder / FOLDER, use_safetensors=True)
        own |= {f"{NAME}.{name}": value for name, value in more.state_dict().items()}
    return dict(own)


def numbers(net: nn.Module) -> tuple[str, ...]:
    """The further numbers that a network is told."""
    extra = held(net)
    return () if extra is None else tuple(extra.layers)
