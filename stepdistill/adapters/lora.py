"""Several low-rank adapters by name on one shared network, of which one or none is on.

The layers are peft's, put in place by its ``inject_adapter_in_model``. peft's own switch,
``set_adapter``, also flips what asks for gradients; the one here does not, and costs nothing when
the right adapter is on already.
"""

from __future__ import annotations

import copy
import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_KEY = "_stepdistill_lora"  # the entry of a network's __dict__ that holds its bank
_PARTS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class LowRank:
    """What the adapters of a network look like.

    Args:
        rank: of the product of the two matrices.
        alpha: the product is multiplied by alpha / rank.
        targets: ends of the names of the linear and convolution layers that are adapted.
        seed: of the first matrix; the second is zero.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int = 0


@dataclass
class _Bank:
    """The adapters of one network: its adapted layers by name, and which adapter is on."""

    shape: LowRank
    layers: dict[str, Any]
    names: list[str] = field(default_factory=list)
    active: str | None = None

    def switch(self, name: str | None) -> None:
        if name == self.active:
            return
        if name is not None and name not in self.names:
            raise ValueError(f"no adapter {name!r}; there are {', '.join(self.names) or 'none'}")
        for layer in self.layers.values():
            state = vars(layer)  # past nn.Module.__setattr__, which is slow
            state["_disable_adapters"] = name is None
            if name is not None:
                state["_active_adapter"] = [name]
        self.active = name


def _bank(net: nn.Module) -> _Bank | None:
    found: _Bank | None = vars(net).get(_KEY)
    return found


def _held(net: nn.Module, name: str) -> _Bank:
    bank = _bank(net)
    if bank is None or name not in bank.names:
        raise ValueError(f"{type(net).__name__} has no adapter {name!r}")
    return bank


def shared(net: nn.Module) -> bool:
    """Whether a network carries adapters, or layers made for them."""
    return _bank(net) is not None


def names(net: nn.Module) -> tuple[str, ...]:
    """The adapters of a network."""
    bank = _bank(net)
    return () if bank is None else tuple(bank.names)


def add(net: nn.Module, name: str, shape: LowRank) -> None:
    """Put an adapter on a network, off, and equal to nothing: its second matrix is zero.

    The first matrix comes from the shape's seed and the layer's name alone, so it is the same on
    every process and device, and in all adapters of a network, so that the mean of two adapters'
    matrices is near the mean of their products. No parameter asks for other gradients than before.

    Raises:
        ValueError: a target that matches no layer, another shape than the network's adapters
            have, or a name that is taken.
    """
    bank = _bank(net)
    if bank is None:
        bank = _Bank(shape, dict.fromkeys(matches(net, shape.targets)))
    if shape != bank.shape or name in bank.names:
        raise ValueError(f"its network has an adapter {name} already, or others of another shape")
    asked = {param: param.requires_grad for param in net.parameters()}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's of several adapters on a network
        import_module("peft").inject_adapter_in_model(_peft_config(bank), net, name)
    del net.peft_config  # the bank stands for it
    bank.layers = {layer: net.get_submodule(layer) for layer in bank.layers}
    bank.names.append(name)
    vars(net)[_KEY] = bank
    for layer in bank.layers.values():
        layer.train(net.training)
    for param in net.parameters():
        param.requires_grad_(asked.get(param, False))
    bank.active = name  # by peft, which says so layer by layer
    bank.switch(None)
    reset(net, name)


def _peft_config(bank: _Bank) -> Any:
    names = "|".join(re.escape(layer) for layer in bank.layers)
    return import_module("peft").LoraConfig(
        r=bank.shape.rank,
        lora_alpha=bank.shape.alpha,
        target_modules=f"({names})",
        init_lora_weights=False,
    )


def matches(net: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear and convolution layers that end with one of ``targets``.

    Args:
        net: with adapters or without.
        targets: ends of names, whole parts of them: ``to_q``, ``ff.net.2``; ``*`` is anything.

    Raises:
        ValueError: a target that matches none, or a grouped convolution.
    """
    layers = _layers(net)
    for target in targets:
        if not _ending(layers, target):
            ends = sorted({name.rpartition(".")[2] for name in layers})
            known = f"the names of its layers end with {', '.join(ends[:20])}"
            raise ValueError(
                f"{target} matches no linear or convolution layer of {type(net).__name__}; "
                f"{known if ends else 'it has none'}"
            )
    found = {name for target in targets for name in _ending(layers, target)}
    for name in found:
        if getattr(layers[name], "groups", 1) != 1:
            raise ValueError(f"{name} is a convolution in groups, which cannot be merged")
    return [name for name in layers if name in found]


def present(net: nn.Module, targets: Sequence[str]) -> tuple[str, ...]:
    """Those of ``targets`` that match a layer; see :func:`matches`."""
    layers = _layers(net)
    return tuple(target for target in targets if _ending(layers, target))


def _layers(net: nn.Module) -> dict[str, nn.Module]:
    """Linear and convolution layers by the names that they have without adapters."""
    found: dict[str, nn.Module] = {}
    for name, module in net.named_modules():
        inside = any(f".{part}." in name for part in _PARTS) and shared(net)
        if isinstance(module, nn.Linear | nn.Conv2d) and not inside:
            found[name.removesuffix(".base_layer")] = module
    return found


def _ending(names: Iterable[str], target: str) -> list[str]:
    return [name for name in names if fnmatchcase(f".{name}", f"*.{target}")]


@torch.no_grad()
def reset(net: nn.Module, name: str) -> None:
    """Make an adapter what :func:`add` made it."""
    bank = _held(net, name)
    for place, layer in bank.layers.items():
        first, second = (getattr(layer, part)[name].weight for part in _PARTS)
        key = hashlib.sha256(f"{bank.shape.seed}/{place}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        bound = first[0].numel() ** -0.5
        drawn = torch.empty(first.shape).uniform_(-bound, bound, generator=draw)
        first.copy_(drawn)
        second.zero_()


def parameters(net: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by name: ``layer.lora_A.weight``, ``layer.lora_B.weight``."""
    return {
        f"{place}.{part}.weight": getattr(layer, part)[name].weight
        for place, layer in _held(net, name).layers.items()
        for part in _PARTS
    }


@torch.no_grad()
def load(net: nn.Module, name: str, weights: Mapping[str, Tensor]) -> None:
    """Copy values, named as :func:`parameters` does, into an adapter.

    Raises:
        ValueError: they are of other layers.
    """
    own = parameters(net, name)
    if own.keys() != weights.keys():
        raise ValueError(f"adapter {name!r}: the weights are of other layers")
    for key, param in own.items():
        param.copy_(weights[key])


def twin(net: nn.Module, name: str, other: str) -> None:
    """Add an adapter ``other`` with the values of ``name``."""
    add(net, other, _held(net, name).shape)
    load(net, other, parameters(net, name))


def activate(net: nn.Module, name: str | None) -> None:
    """Have the next calls of the network use an adapter, or none: the bare network to the bit.

    Raises:
        ValueError: no such adapter.
    """
    bank = _bank(net)
    if bank is not None:
        bank.switch(name)
    elif name is not None:
        raise ValueError(f"{type(net).__name__} has no adapters")


def active(net: nn.Module) -> str | None:
    """The adapter that is on."""
    bank = _bank(net)
    return None if bank is None else bank.active


@contextmanager
def switched(net: nn.Module, name: str | None) -> Iterator[None]:
    """An adapter on, or none, while the context is open; then what was before."""
    before = active(net)
    activate(net, name)
    try:
        yield
    finally:
        activate(net, before)


def remove(net: nn.Module, name: str) -> None:
    """Take an adapter off a network for good."""
    bank = _held(net, name)
    if bank.active == name:
        bank.switch(None)
    for layer in bank.layers.values():
        vars(layer)["_active_adapter"] = []  # or peft would turn another on, and its gradients
        layer.delete_adapter(name)
    bank.names.remove(name)


def plain_state(net: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network as it was without adapters, name for name."""
    bank, state = _bank(net), net.state_dict()
    if bank is None:
        return dict(state)
    out = {}
    for key, value in state.items():
        layer, middle, rest = key.partition(".base_layer.")
        if middle and layer in bank.layers:
            out[f"{layer}.{rest}"] = value
        elif not any(f".{part}." in key for part in _PARTS):
            out[key] = value
    return out


def plain_params(net: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network that are no adapter's."""
    named = net.named_parameters()
    if _bank(net) is None:
        return [param for _, param in named]
    return [param for name, param in named if not any(f".{part}." in name for part in _PARTS)]


@torch.no_grad()
def merged(net: nn.Module, name: str | None) -> nn.Module:
    """A plain copy of a network, of its own class, with an adapter's product added, or none.

    It has no trace of adapters: it saves and loads like any network of its class.
    """
    bank = _bank(net)
    if bank is None:
        if name is not None:
            raise ValueError(f"{type(net).__name__} has no adapters")
        return copy.deepcopy(net)
    memo: dict[int, Any] = {}  # deepcopy takes what it finds here for the copy
    for layer in bank.layers.values():
        plain = copy.deepcopy(layer.base_layer)
        if name is not None:
            plain.weight += layer.get_delta_weight(name)
        memo[id(layer)] = plain
    del vars(net)[_KEY]
    try:
        return copy.deepcopy(net, memo)
    finally:
        vars(net)[_KEY] = bank


def save(net: nn.Module, name: str, folder: Path) -> None:
    """Write an adapter as peft does: adapter_config.json and adapter_model.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    weights = parameters(net, name)
    plain = {f"base_model.model.{k}": v.detach().contiguous() for k, v in weights.items()}
    save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _peft_config(_held(net, name)).save_pretrained(folder)
