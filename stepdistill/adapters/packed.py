"""Transformers that are fed pictures as a row of tokens: Flux, Flux.2 and Qwen-Image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.adapters.cond import Cond
from stepdistill.adapters.text import FEED, JOINT, TextAdapter, given, unwrapped

SIDE = 128  # of latents [C, H, W] of a picture of 1024 pixels; no config holds a size


def pack(x: Tensor, side: int) -> Tensor:
    """Squares of ``side`` by ``side`` of images [B, C, H, W] as tokens [B, L, C side^2].

    Raises:
        ValueError: a height or width that is no multiple of ``side``.
    """
    if x.shape[2] % side or x.shape[3] % side:
        raise ValueError(f"height and width {tuple(x.shape[2:])} must be multiples of {side}")
    squares = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, C, H', side, W', side]
    tokens: Tensor = squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return tokens


def unpack(tokens: Tensor, side: int, like: Tensor) -> Tensor:
    """Images [B, C', H, W] of ``like``'s height and width: the inverse of :func:`pack`."""
    rows, columns = (size // side for size in like.shape[2:])
    squares = tokens.unflatten(2, (-1, side, side)).unflatten(1, (rows, columns))
    images: Tensor = squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return images


def places(rows: int, columns: int, axes: int, like: Tensor) -> Tensor:
    """The row and column of each token of an image, as axes 1 and 2 of [L, axes]; the rest is 0."""
    made = torch.zeros(rows, columns, axes, device=like.device)
    made[..., 1] = torch.arange(rows, device=like.device)[:, None]
    made[..., 2] = torch.arange(columns, device=like.device)
    return made.flatten(0, 1)


class PackedAdapter(TextAdapter):
    """What these families share; ``side`` is that of the squares that are tokens."""

    side: ClassVar[int] = 2
    embedder = "time_text_embed.timestep_embedder"

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """(C, H, W): channels from the network's config, and the latents of 1024 pixels."""
        config: Any = net.config
        size = SIDE * self.side // 2
        return (config.in_channels // self.side**2 - self.beside(net), size, size)

    def beside(self, net: nn.Module) -> int:
        """See :meth:`Adapter.beside`."""
        return super().beside(net) // self.side**2

    def embeds_guidance(self, net: nn.Module) -> bool:
        """See :meth:`Adapter.embeds_guidance`."""
        config: Any = net.config
        return bool(config.guidance_embeds)

    def guidance(self, net: Any, cond: Cond) -> Tensor | None:
        """The guidance scale that the network is told, if it is.

        Raises:
            ValueError: the condition has none.
        """
        return given(net, cond, "guidance") if self.embeds_guidance(net) else None


class FluxAdapter(PackedAdapter):
    """``net(hidden_states, encoder_hidden_states, pooled_projections, timestep, ...)``.

    Tokens are squares of 2 by 2; times go from 0 to 1. No mask: what fills a prompt up is read.
    """

    lora_targets = (
        *JOINT,
        *FEED,
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "proj_mlp",
        "single_transformer_blocks.*.proj_out",
    )
    innate = ("*.to_out.*", "*.ff.net.*", "single_transformer_blocks.*.proj_out.*")
    stacks = ("transformer_blocks", "single_transformer_blocks")
    pairs = ("transformer_blocks", "single_transformer_blocks")

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no text, no pooled embedding, or no guidance scale where one is told.
        """
        net = unwrapped(call)
        text = given(net, cond, "text")
        out: Tensor = call(
            pack(x, self.side),
            encoder_hidden_states=text,
            pooled_projections=given(net, cond, "pooled"),
            timestep=time / 1000,
            img_ids=places(x.shape[2] // self.side, x.shape[3] // self.side, 3, x),
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
            guidance=self.guidance(net, cond),
            return_dict=False,
        )[0]
        return unpack(out, self.side, x)


class Flux2Adapter(PackedAdapter):
    """``net(hidden_states, encoder_hidden_states, timestep, ...)`` without a pooled embedding.

    States are latents as the stock pipeline is given them: 2 by 2 squares in their channels already
    (128 for the published model), normalized. Later blocks have one stream, of the prompt's tokens
    and then the picture's.
    """

    side = 1
    pairs = ("transformer_blocks",)
    lora_targets = (*JOINT, "linear_in", "linear_out", "to_qkv_mlp_proj", "attn.to_out")
    innate = ("*.to_out.*", "*.linear_out.*")
    stacks = ("transformer_blocks", "single_transformer_blocks")
    embedder = "time_guidance_embed.timestep_embedder"

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no text, or no guidance scale where one is told.
        """
        net = unwrapped(call)
        text = given(net, cond, "text")
        txt_ids = torch.zeros(text.shape[1], 4, device=x.device)
        txt_ids[:, 3] = torch.arange(text.shape[1], device=x.device)
        out: Tensor = call(
            pack(x, self.side),
            encoder_hidden_states=text,
            timestep=time / 1000,
            img_ids=places(x.shape[2], x.shape[3], 4, x),
            txt_ids=txt_ids,
            guidance=self.guidance(net, cond),
            return_dict=False,
        )[0]
        return unpack(out, self.side, x)


class QwenImageAdapter(PackedAdapter):
    """``net(hidden_states, encoder_hidden_states, encoder_hidden_states_mask, timestep, ...)``.

    Tokens are squares of 2 by 2; times go from 0 to 1.
    """

    lora_targets = (
        *JOINT,
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    )
    innate = ("*.to_out.*", "*.img_mlp.net.*")
    pairs = ("transformer_blocks",)

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no text, or a network of the kinds for editing and for layers.
        """
        net = unwrapped(call)
        if net.config.zero_cond_t or net.config.use_additional_t_cond:
            raise ValueError(
                "QwenImageTransformer2DModel: networks that edit or make layers (zero_cond_t, "
                "use_additional_t_cond) are not known; take one that makes images of text"
            )
        shape = (1, x.shape[2] // self.side, x.shape[3] // self.side)
        out: Tensor = call(
            pack(x, self.side),
            encoder_hidden_states=given(net, cond, "text"),
            encoder_hidden_states_mask=cond.mask,
            timestep=time / 1000,
            img_shapes=[[shape]] * len(x),
            return_dict=False,
        )[0]
        return unpack(out, self.side, x)

    def embeds_guidance(self, net: nn.Module) -> bool:
        """No: whatever its config says, it has no layers for it."""
        return False

    def beside(self, net: nn.Module) -> int:
        """None: its config counts channels taken by tokens, and channels given by pixels."""
        return 0
