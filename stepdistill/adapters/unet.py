"""UNets: UNet2DModel, with class labels or none, and UNet2DConditionModel, which reads prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.adapters.base import Adapter
from stepdistill.adapters.cond import Cond
from stepdistill.adapters.text import FEED, given, unwrapped


class UNetAdapter(Adapter):
    """``net(sample, timestep, class_labels)``."""

    label_key = "num_class_embeds"
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "conv1",
        "conv2",
        "conv_shortcut",
    )
    innate = ("*.conv1.*", "*.conv2.*", "*samplers.*.conv.*", "*.to_out.*")

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`."""
        out: Tensor = call(x, time, class_labels=cond.label, return_dict=False)[0]
        return out

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """(C, H, W) from the network's config."""
        config: Any = net.config
        size = config.sample_size or self.usual_size(net)
        height, width = (size, size) if isinstance(size, int) else size
        return (config.in_channels - self.beside(net), height, width)

    def usual_size(self, net: nn.Module) -> int:
        """The height and width of samples of networks whose config holds none.

        Raises:
            ValueError: there is no usual one.
        """
        raise ValueError(f"{type(net).__name__}: its config has no sample_size; set it")

    def label_rows(self, net: nn.Module) -> int:
        """See :meth:`Adapter.label_rows`."""
        config: Any = net.config
        if config.class_embed_type is not None:
            raise ValueError(
                f"{type(net).__name__}: class_embed_type={config.class_embed_type} is no table of "
                "labels"
            )
        return super().label_rows(net)

    def taps(self, net: nn.Module) -> tuple[str, ...]:
        """The block in the middle, or the last of the way down where there is none."""
        return (self.blocks(net)[-1],)

    def blocks(self, net: nn.Module) -> tuple[str, ...]:
        """Every block of the way down, and the one in the middle."""
        config: Any = net.config
        down = [f"down_blocks.{place}" for place in range(len(config.down_block_types))]
        return tuple(down if config.mid_block_type is None else [*down, "mid_block"])

    def embedders(self, net: nn.Module) -> tuple[str, ...]:
        """The only one."""
        return ("time_embedding",)


class TextUNetAdapter(UNetAdapter):
    """``net(sample, timestep, encoder_hidden_states, ...)``: Stable Diffusion 1, 2 and XL.

    XL is given a pooled embedding, and as ``cond.sizes`` [B, 6] height and width before scaling,
    top and left of the crop, and height and width made, in pixels. Students that are told a
    guidance scale are fed waves of it. No mask: what fills a prompt up is read like the rest, as in
    their training.
    """

    reads_text = True
    lora_targets = (*UNetAdapter.lora_targets, "proj_in", "proj_out", *FEED)

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no text or another part of the condition that the network is told, or one
                that is told what a condition does not hold.
        """
        net = unwrapped(call)
        told = None
        if self.embeds_guidance(net):
            told = guidance_waves(given(net, cond, "guidance"), net.config.time_cond_proj_dim)
        out: Tensor = call(
            x,
            time,
            encoder_hidden_states=given(net, cond, "text"),
            class_labels=cond.label,
            timestep_cond=None if told is None else told.to(x),
            added_cond_kwargs=self.added(net, cond),
            return_dict=False,
        )[0]
        return out

    def added(self, net: Any, cond: Cond) -> dict[str, Tensor] | None:
        """What is embedded beside the time, if anything is.

        Raises:
            ValueError: conditions that are missing or not known.
        """
        kind, hidden = net.config.addition_embed_type, net.config.encoder_hid_dim_type
        if kind not in (None, "text", "text_time") or hidden not in (None, "text_proj"):
            raise ValueError(
                f"{type(net).__name__}: addition_embed_type={kind}, encoder_hid_dim_type={hidden} "
                "is not known; take a network that is told text alone, or text and sizes"
            )
        if kind != "text_time":
            return None
        words = "six numbers: its picture's own size, crop and size made, in pixels"
        return {
            "text_embeds": given(net, cond, "pooled"),
            "time_ids": given(net, cond, "sizes", words),
        }

    def usual_size(self, net: nn.Module) -> int:
        """128 for XL, 64 for the rest."""
        config: Any = net.config
        return 128 if config.addition_embed_type == "text_time" else 64

    def embeds_guidance(self, net: nn.Module) -> bool:
        """See :meth:`Adapter.embeds_guidance`."""
        config: Any = net.config
        return config.time_cond_proj_dim is not None


def guidance_waves(scale: Tensor, width: int) -> Tensor:
    """Guidance scales [B] as waves [B, width], as students of Stable Diffusion are fed them."""
    half = width // 2
    pace = torch.arange(half, device=scale.device) * (-math.log(10000) / (half - 1))
    angles = 1000 * (scale.float() - 1)[:, None] * pace.exp()
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
