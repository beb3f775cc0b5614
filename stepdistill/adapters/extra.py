"""Further numbers that a network is told beside its time, such as where a step ends.

This file needs torch and diffusers only: a copy of it travels in the ``extra/`` folder of exported
pipelines, so that they load where stepdistill is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

FILE_NAME = "extra.py"
SLOWEST, FASTEST = -2.0, 2.0  # log2 of half turns of the waves while a number goes from 0 to 1

_SOURCE = Path(__file__).read_text(encoding="utf-8")


class ExtraEmbedding(ModelMixin, ConfigMixin):
    """Embeddings of further numbers, added to each of a network's embeddings of its time.

    Each has the shape of the network's own: two linear layers with a SiLU between. The waves that
    they are fed are slow, so that derivatives in a number stay small.

    Args:
        numbers: their names.
        places: the network's modules that embed its time -> sizes of the input, of the hidden layer
            and of the output.
    """

    config: Any

    @register_to_config
    def __init__(self, numbers: Sequence[str], places: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {name: nn.ModuleList(_layers(*sizes) for sizes in places.values()) for name in numbers}
        )
        self.values: Mapping[str, Tensor] | None = None

    @classmethod
    def of(cls, net: nn.Module, numbers: Sequence[str], places: Sequence[str]) -> ExtraEmbedding:
        """Copies of a network's own embedders, whose output is 0 for now.

        Args:
            net: the network.
            numbers: names of the numbers.
            places: its modules that embed its time; their first and last linear layers are copied.
        """
        own = {place: _linear(net.get_submodule(place)) for place in places}
        sizes = {
            place: [first.in_features, first.out_features, last.out_features]
            for place, (first, last) in own.items()
        }
        made: ExtraEmbedding = cls(list(numbers), sizes)
        with torch.no_grad():
            for name in numbers:
                for place, (first, _) in enumerate(own.values()):
                    enter, _, leave = made._embedder(name, place)
                    enter.weight.copy_(first.weight)
                    enter.bias.copy_(enter.bias * 0 if first.bias is None else first.bias)
                    leave.weight.zero_()
                    leave.bias.zero_()
        made.to(next(net.parameters()).device).eval()
        return made

    def attach(self, net: nn.Module) -> list[Any]:
        """Add to the embeddings of a network from now on, while numbers are told; the handles."""
        return [
            net.get_submodule(name).register_forward_hook(Addition(self, place))
            for place, name in enumerate(self.config.places)
        ]

    @contextmanager
    def telling(self, values: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Calls in this context are told numbers [B], 0 to 1, by name; None: nothing is added.

        A number that is left out is 0.
        """
        before, self.values = self.values, values
        try:
            yield
        finally:
            self.values = before

    def forward(self, place: int) -> Tensor:
        """What is added to the embedding [B, D] at a place, of the numbers told."""
        assert self.values is not None
        parts, none = [], torch.zeros_like(next(iter(self.values.values())))
        for name in self.layers:
            layers, value = self._embedder(name, place), self.values.get(name, none)
            weight = layers[0].weight
            parts.append(layers(waves(value, weight.shape[1]).to(weight.dtype)))
        added: Tensor = torch.stack(parts).sum(dim=0)
        return added

    def _embedder(self, name: str, place: int) -> Any:
        layers: Any = self.layers[name]
        return layers[place]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save config and weights, and this file beside them, so that it can be loaded again."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).write_text(_SOURCE, encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)


class Addition:
    """The hook of one place; copied along with a network, it stands for the copy's embedding."""

    def __init__(self, extra: ExtraEmbedding, place: int) -> None:
        self.extra, self.place = extra, place

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The output of a network's embedder, and what is added to it."""
        if self.extra.values is None:
            return output
        both: Tensor = output + self.extra(self.place).to(output.dtype)
        return both


def waves(value: Tensor, width: int) -> Tensor:
    """Numbers [B] as waves [B, width] of a quarter of a half turn to two turns over 0 to 1."""
    turns = torch.linspace(SLOWEST, FASTEST, width // 2, device=value.device)
    angles = math.pi * value.float()[:, None] * 2**turns
    made = torch.cat([angles.cos(), angles.sin()], dim=1)
    return nn.functional.pad(made, (0, width % 2))


def _layers(inside: int, hidden: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, hidden), nn.SiLU(), nn.Linear(hidden, outside))


def _linear(module: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """The first and the last linear layer of an embedder."""
    found = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return found[0], found[-1]
