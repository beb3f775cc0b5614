"""A small network for vectors, saved and loaded like any diffusers model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from stepdistill.adapters.base import Adapter
from stepdistill.adapters.cond import Cond


class VectorMLP(ModelMixin, ConfigMixin):
    """Residual blocks on a vector, modulated by time and class.

    Args:
        dim: length D of a sample.
        width: length of the hidden layers.
        depth: number of residual blocks.
        num_classes: number of classes; 0 for none. The label ``num_classes`` means "no class".
        time_scale: network times are divided by this before they are embedded (1000 for flows).
    """

    @register_to_config
    def __init__(
        self,
        dim: int = 2,
        width: int = 64,
        depth: int = 3,
        num_classes: int = 0,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        self.enter = nn.Linear(dim, width)
        self.time = nn.Sequential(nn.Linear(17, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.mods = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.leave = nn.Linear(width, dim)

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Raw output [B, D] for samples [B, D] at network times [B]."""
        t = (timestep / self.config.time_scale)[:, None]
        angles = t * math.pi * 2 ** torch.arange(-3, 5, device=t.device, dtype=t.dtype)
        emb = self.time(torch.cat([t, angles.sin(), angles.cos()], dim=1))
        if self.label is not None and class_labels is not None:
            emb = emb + self.label(class_labels)
        h = self.enter(sample)
        for mod, block in zip(self.mods, self.blocks, strict=True):
            scale, shift = mod(nn.functional.silu(emb)).chunk(2, dim=1)
            h = h + block(h * (1 + scale) + shift)
        out: Tensor = self.leave(h)
        return out


class MLPAdapter(Adapter):
    """``net(sample, timestep, class_labels)`` for vectors [B, D]."""

    label_key = "num_classes"
    lora_targets = ("enter", "time.*", "mods.*", "blocks.*", "leave")

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`."""
        out: Tensor = call(x, time, cond.label)
        return out

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """(D,) from the network's config."""
        config: Any = net.config
        return (config.dim,)

    def null_label(self, net: nn.Module) -> int | None:
        """The row after the last class."""
        config: Any = net.config
        return int(config.num_classes) or None

    def taps(self, net: nn.Module) -> tuple[str, ...]:
        """The middle block."""
        config: Any = net.config
        return (f"blocks.{(config.depth - 1) // 2}",)

    def blocks(self, net: nn.Module) -> tuple[str, ...]:
        """Every block."""
        config: Any = net.config
        return tuple(f"blocks.{place}" for place in range(config.depth))

    def embedders(self, net: nn.Module) -> tuple[str, ...]:
        """The only one."""
        return ("time",)
