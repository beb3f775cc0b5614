"""PixArtTransformer2DModel: PixArt alpha and sigma."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.adapters.text import ATTENTION, FEED, TextAdapter, given, unwrapped


class PixArtAdapter(TextAdapter):
    """``net(hidden_states, encoder_hidden_states, timestep, ...)`` with the prompt's mask.

    Where the network has embeddings of it, ``cond.sizes`` [B, 2] is the picture's height and width
    in pixels.
    """

    lora_targets = (*ATTENTION, *FEED)
    innate = ("*.to_out.*", "*.ff.net.*")
    embedder = "adaln_single.emb.timestep_embedder"

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no text, or no sizes where the network is told these.
        """
        net = unwrapped(call)
        config, added = net.config, None
        told = config.use_additional_conditions
        if told or (told is None and config.sample_size == 128):
            sizes = given(net, cond, "sizes", "its picture's height and width in pixels").to(x)
            added = {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}
        out: Tensor = call(
            x,
            encoder_hidden_states=given(net, cond, "text"),
            timestep=time,
            added_cond_kwargs=added,
            encoder_attention_mask=cond.mask,
            return_dict=False,
        )[0]
        return out
