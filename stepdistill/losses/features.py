"""Features of pictures by frozen networks, on which discriminators work.

A new one is a subclass with ``build``; a config names it by ``features: {kind: FILE.py:CLASS}``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plug
from stepdistill.run.rng import seeded


class ImageFeatures(Plug):
    """A frozen network on pictures."""

    @abstractmethod
    def build(self, shape: Sequence[int]) -> nn.Module:
        """A module from pictures [B, *shape] in [-1, 1] to a list of maps [B, C, H, W].

        Tokens [B, N, C] and vectors [B, C] will do as well. It is frozen by the caller.
        """


class Pixels(ImageFeatures):
    """The picture, or vector, itself."""

    def build(self, shape: Sequence[int]) -> nn.Module:
        """See :meth:`ImageFeatures.build`."""
        return Stages([])


class RandomConv(ImageFeatures):
    """A pyramid of random convolutions; on vectors, a random network of as many layers.

    Its features mean nothing, but lose little: enough for small pictures and for proofs.
    """

    widths: tuple[int, ...] = Field(
        (32, 64, 128), min_length=1, description="channels, from the finest level to the coarsest"
    )
    seed: int = Field(0, ge=0, description="seed of its weights")

    def build(self, shape: Sequence[int]) -> nn.Module:
        """See :meth:`ImageFeatures.build`."""
        sizes = [shape[0], *self.widths]
        with seeded(self.seed):
            if len(shape) == 1:
                stages = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
            else:
                stages = [
                    nn.Conv2d(a, b, 3, stride=1 if place == 0 else 2, padding=1)  # type: ignore
                    for place, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
                ]
            for stage in stages:
                nn.init.kaiming_normal_(stage.weight)
        return Stages(stages)


class Timm(ImageFeatures):
    """A backbone of timm, which resizes pictures to its own size; nothing is downloaded unasked."""

    model: str = Field(description="name of the backbone")
    weights: str = Field(
        description="file of its weights; pretrained: timm's own, which it downloads; random"
    )
    levels: tuple[int, ...] | None = Field(
        None, min_length=1, description="which of its feature levels; null: all"
    )

    def build(self, shape: Sequence[int]) -> nn.Module:
        """See :meth:`ImageFeatures.build`.

        Raises:
            UserError: vectors, or a model, weights or levels that timm cannot give.
        """
        if len(shape) != 3:
            raise UserError("features.kind=timm reads pictures, not vectors; use random_conv")
        try:
            import timm
        except ImportError as error:
            raise UserError("features.kind=timm needs timm; pip install timm") from error
        file = Path(self.weights)
        keys: dict[str, Any] = {"pretrained": self.weights != "random"}
        if self.weights not in ("pretrained", "random"):
            if not file.is_file():
                raise UserError(
                    f"features.weights={file}: no such file; give one, or pretrained to let timm "
                    "download it"
                )
            keys["pretrained_cfg_overlay"] = {"file": str(file)}
        if self.levels is not None:
            keys["out_indices"] = self.levels
        try:
            with seeded(0):
                net: Any = timm.create_model(self.model, features_only=True, **keys)
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"features.model={self.model}: {text}") from error
        return Resized(net, net.pretrained_cfg)


class Stages(nn.Module):
    """Layers in a row, each followed by SiLU: the list of what each puts out; without any, x."""

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features, from the first layer to the last."""
        out = [] if len(self.stages) else [x]
        for stage in self.stages:
            x = nn.functional.silu(stage(x))
            out.append(x)
        return out


class Resized(nn.Module):
    """A backbone on pictures [B, 1 or 3, H, W] in [-1, 1], brought to its own size and range."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        self.net, self.size = net, tuple(config["input_size"][1:])
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name]).reshape(1, 3, 1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features, from the finest level to the coarsest."""
        x = interpolate(x.expand(-1, 3, -1, -1), self.size, mode="bilinear", antialias=True)
        return list(self.net((x / 2 + 0.5 - self.mean) / self.std))


class Projected(nn.Module):
    """Features mixed by frozen random maps: across channels, then from coarse levels to fine ones.

    Args:
        net: what gives the features, from fine to coarse.
        channels: of each feature.
        width: channels after the projection.
        seed: of the maps.

    Source: Projected GANs converge faster (Sauer et al. 2021), here by bilinear enlargement; it
    is the discriminator of GDD.
    """

    def __init__(self, net: nn.Module, channels: Sequence[int], width: int, seed: int) -> None:
        super().__init__()
        self.net = net
        with seeded(seed):
            self.across = nn.ModuleList(nn.Linear(count, width) for count in channels)
            self.down = nn.ModuleList(nn.Linear(width, width) for _ in channels[1:])
        for layer in (*self.across, *self.down):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Mixed features, in the layout of the network's own."""
        found = [_mixed(layer, f) for layer, f in zip(self.across, self.net(x), strict=True)]
        for place in reversed(range(len(self.down))):
            fine, coarse = found[place], found[place + 1]
            if fine.dim() == 4:
                coarse = interpolate(coarse, fine.shape[2:], mode="bilinear")
            found[place] = fine + _mixed(self.down[place], coarse)
        return found


def _mixed(layer: nn.Module, feature: Tensor) -> Tensor:
    """A linear layer on the channels of a feature."""
    if feature.dim() != 4:
        out: Tensor = layer(feature)
        return out
    last: Tensor = layer(feature.movedim(1, -1))
    return last.movedim(-1, 1)


def widths(features: Sequence[Tensor]) -> list[int]:
    """Channels of features: maps [B, C, H, W], tokens [B, N, C] or vectors [B, C]."""
    return [f.shape[1] if f.dim() in (2, 4) else f.shape[-1] for f in features]
