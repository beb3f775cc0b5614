"""UNet2DModel: unconditional, or with class labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from stepdistill.adapters.base import Adapter
from stepdistill.adapters.cond import Cond


class UNetAdapter(Adapter):
    """``net(sample, timestep, class_labels)``."""

    label_key = "num_class_embeds"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut")
    innate = ("*.conv1.*", "*.conv2.*", "*samplers.*.conv.*", "*.to_out.*")

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`."""
        out: Tensor = call(x, time, class_labels=cond.label, return_dict=False)[0]
        return out

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """(C, H, W) from the network's config."""
        config: Any = net.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (config.in_channels - self.beside(net), height, width)

    def label_rows(self, net: nn.Module) -> int:
        """See :meth:`Adapter.label_rows`."""
        config: Any = net.config
        if config.class_embed_type is not None:
            raise ValueError(
                f"UNet2DModel: class_embed_type={config.class_embed_type} is no table of labels"
            )
        return super().label_rows(net)

    def taps(self, net: nn.Module) -> tuple[str, ...]:
        """The block in the middle."""
        return ("mid_block",)

    def blocks(self, net: nn.Module) -> tuple[str, ...]:
        """Every block of the way down, and the one in the middle."""
        config: Any = net.config
        down = range(len(config.down_block_types))
        return (*(f"down_blocks.{place}" for place in down), "mid_block")

    def embedders(self, net: nn.Module) -> tuple[str, ...]:
        """The only one."""
        return ("time_embedding",)
