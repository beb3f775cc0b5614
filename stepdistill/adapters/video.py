"""Wan, LTX-Video and HunyuanVideo: rectified flows on videos [B, C, T, H, W]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.adapters.cond import Cond
from stepdistill.adapters.text import (
    ATTENTION,
    FEED,
    JOINT,
    TextAdapter,
    given,
    tokens_mask,
    unwrapped,
)


class WanAdapter(TextAdapter):
    """``net(hidden_states, timestep, text)``: Wan 2.1, and each of the two experts of Wan 2.2.

    Embeddings of what is no token are 0. Image-to-video networks are fed ``cond.image`` beside the
    state, and those of 2.1 an image encoder's embeddings, ``cond.second`` [B, L, D]. All tokens
    have one time: Wan 2.2's small network is not given a first frame, which would have its own.
    """

    stacks = ("blocks",)
    embedder = "condition_embedder.time_embedder"
    lora_targets = (*ATTENTION, "ffn.net.0.proj", "ffn.net.2")
    innate = ("*.to_out.*", "*.ffn.net.*")

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no text.
        """
        text = given(unwrapped(call), cond, "text")
        out: Tensor = call(
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=text * tokens_mask(cond, text)[:, :, None].to(text.dtype),
            encoder_hidden_states_image=cond.second,
            return_dict=False,
        )[0]
        return out

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """(C, T, H, W) of the stock pipeline's 81 frames of 480 x 832, as the config holds none.

        The autoencoder of 48 channels halves the frames' sides once more.
        """
        config: Any = net.config
        channels = config.in_channels - self.beside(net)
        side = 16 if channels == 48 else 8
        return (channels, 21, 480 // side, 832 // side)


class LTXAdapter(TextAdapter):
    """``net(tokens, text, timestep, mask, sizes)``: tokens [B, T H W, C], one a place.

    ``cond.sizes`` [B, 1] holds the frames a second; 25 if None. The autoencoder makes one frame of
    8, and one place of 32 x 32 pixels.
    """

    embedder = "time_embed.emb.timestep_embedder"
    lora_targets = (*ATTENTION, *FEED)
    innate = ("*.to_out.*", "*.ff.net.*")

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no text.
        """
        text = given(unwrapped(call), cond, "text")
        frames, height, width = x.shape[2:]
        rate = torch.full_like(time, 25.0) if cond.sizes is None else cond.sizes[:, 0]
        tokens: Tensor = call(
            hidden_states=x.flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            timestep=time,
            encoder_attention_mask=tokens_mask(cond, text),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(8 / rate.float().reshape(-1, 1, 1, 1, 1), 32, 32),
            return_dict=False,
        )[0]
        out: Tensor = tokens.transpose(1, 2).unflatten(2, (frames, height, width))
        return out

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """(C, T, H, W) of the stock pipeline's 161 frames of 512 x 704, as the config holds none.

        Raises:
            ValueError: a network of larger patches, for which no autoencoder is known.
        """
        config: Any = net.config
        if (config.patch_size, config.patch_size_t) != (1, 1):
            raise ValueError(
                "LTXVideoTransformer3DModel: networks of larger patches are not known; take one "
                "with patch_size=1 and patch_size_t=1"
            )
        return (config.in_channels, 21, 16, 22)


class HunyuanVideoAdapter(TextAdapter):
    """``net(hidden_states, timestep, text, mask, pooled, guidance)``: guidance times 1000.

    Tokens that fill up come last.
    """

    stacks = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = (
        *JOINT,
        *FEED,
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "proj_mlp",
        "single_transformer_blocks.*.proj_out",
    )
    innate = ("*.to_out.*", "*.ff.net.*", "single_transformer_blocks.*.proj_out.*")

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no text, no pooled one, no guidance for a network that is told, or a network
                whose first frame is given.
        """
        net = unwrapped(call)
        if net.config.image_condition_type == "token_replace":
            raise ValueError(
                "HunyuanVideoTransformer3DModel: networks that keep a first frame "
                "(image_condition_type=token_replace) are not known; take another"
            )
        guidance = 1000 * given(net, cond, "guidance") if self.embeds_guidance(net) else None
        text = given(net, cond, "text")
        out: Tensor = call(
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=text,
            encoder_attention_mask=tokens_mask(cond, text),
            pooled_projections=given(net, cond, "pooled"),
            guidance=guidance,
            return_dict=False,
        )[0]
        return out

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """(C, T, H, W) of the stock pipeline's 129 frames of 720 x 1280: the config holds none."""
        config: Any = net.config
        return (config.in_channels - self.beside(net), 33, 90, 160)

    def embeds_guidance(self, net: nn.Module) -> bool:
        """See :meth:`Adapter.embeds_guidance`."""
        config: Any = net.config
        return bool(config.guidance_embeds)

    def embedders(self, net: nn.Module) -> tuple[str, ...]:
        """One for the blocks, and one for those that refine the text before."""
        own = "time_text_embed.timestep_embedder"
        return (own, f"context_embedder.{own}")
