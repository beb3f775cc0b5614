"""Lumina 2, Z-Image and HiDream: networks whose output points from noise to image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.adapters.cond import Cond
from stepdistill.adapters.text import ATTENTION, TextAdapter, given, tokens_mask, unwrapped


class Lumina2Adapter(TextAdapter):
    """``net(hidden_states, timestep, text, mask)``: time is 1 for images, output is x - z.

    Tokens that fill up come last.
    """

    stacks = ("layers",)
    embedder = "time_caption_embed.timestep_embedder"
    lora_targets = (*ATTENTION, *(f"feed_forward.linear_{place}" for place in (1, 2, 3)))
    innate = ("*.to_out.*", "*.feed_forward.*")

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no text.
        """
        text = given(unwrapped(call), cond, "text")
        out: Tensor = call(
            hidden_states=x,
            timestep=1 - time / 1000,
            encoder_hidden_states=text,
            encoder_attention_mask=tokens_mask(cond, text),
            return_dict=False,
        )[0]
        return -out


class ZImageAdapter(TextAdapter):
    """``net(images, t, texts)`` of lists: images [C, 1, H, W], texts [L_i, D] of tokens only.

    Time is 1 for images, output is x - z.
    """

    stacks = ("layers",)
    embedder = "t_embedder"
    lora_targets = (*ATTENTION, *(f"feed_forward.w{place}" for place in (1, 2, 3)))
    innate = ("*.to_out.*", "*.feed_forward.*")

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no text.
        """
        text = given(unwrapped(call), cond, "text")
        kept = tokens_mask(cond, text).bool()
        texts = [tokens[own] for tokens, own in zip(text, kept, strict=True)]
        images = list(x.unsqueeze(2).unbind(0))
        outs: list[Tensor] = call(images, 1 - time / 1000, texts, return_dict=False)[0]
        return -torch.stack(outs).squeeze(2)

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """(C, 128, 128): the config holds no size, the stock pipeline draws 1024 pixels."""
        config: Any = net.config
        return (config.in_channels, 128, 128)


class HiDreamAdapter(TextAdapter):
    """``net(hidden_states, timesteps, T5's text, Llama's text, pooled)``: output is x - z.

    ``cond.second`` holds Llama's hidden states by layer [B, K, L, D]. There is no mask: what fills
    up is read as well.
    """

    stacks = ("double_stream_blocks", "single_stream_blocks")
    embedder = "t_embedder.timestep_embedder"
    lora_targets = tuple(
        name + stream for stream in ("", "_t") for name in ("to_q", "to_k", "to_v", "to_out")
    )
    innate = ("*.to_out*", "*.ff_*")

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no text of either encoder, or no pooled one.
        """
        net = unwrapped(call)
        _let_gradients_through(net)
        second = given(net, cond, "second", "the embeddings of Llama's layers")
        out: Tensor = call(
            hidden_states=x,
            timesteps=time,
            encoder_hidden_states_t5=given(net, cond, "text"),
            encoder_hidden_states_llama3=second.transpose(0, 1),
            pooled_embeds=given(net, cond, "pooled"),
            return_dict=False,
        )[0]
        return -out

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """(C, H, W) of the largest image that the config allows."""
        config: Any = net.config
        return (config.in_channels, *config.max_resolution)


def _let_gradients_through(net: nn.Module) -> None:
    """Have a network's routed experts compute alike in eval mode, but not under no_grad.

    diffusers cuts the graph at them in eval mode, where denoisers always are.
    """
    for module in net.modules():
        if hasattr(module, "moe_infer"):
            module.training = True  # its own flag, not its parts'
            vars(module)["_force_inference_output"] = False
