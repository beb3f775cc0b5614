"""SanaTransformer2DModel: Sana, and Sana-Sprint, which is told a guidance scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from stepdistill.adapters.cond import Cond
from stepdistill.adapters.text import ATTENTION, TextAdapter, given, unwrapped


class SanaAdapter(TextAdapter):
    """``net(hidden_states, encoder_hidden_states, timestep, ...)`` with the prompt's mask.

    Networks that are told a guidance scale (Sana-Sprint) are told times from 0 to 1. What they put
    out is the velocity of rectified flow: their pipeline turns it to TrigFlow's.
    """

    lora_targets = (*ATTENTION, "conv_inverted", "conv_point")
    innate = ("*.to_out.*", "*.conv_inverted.*", "*.conv_point.*")

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no text, or no guidance scale where the network is told one.
        """
        net = unwrapped(call)
        scale, guidance = net.config.timestep_scale, None
        if net.config.guidance_embeds:
            scale = 1e-3
            guidance = given(net, cond, "guidance") * net.config.guidance_embeds_scale
        out: Tensor = call(
            x,
            encoder_hidden_states=given(net, cond, "text"),
            timestep=time * scale,
            guidance=guidance,
            encoder_attention_mask=cond.mask,
            return_dict=False,
        )[0]
        return out

    def embeds_guidance(self, net: nn.Module) -> bool:
        """See :meth:`Adapter.embeds_guidance`."""
        config: Any = net.config
        return bool(config.guidance_embeds)

    def embedders(self, net: nn.Module) -> tuple[str, ...]:
        """The only one."""
        place = "time_embed" if self.embeds_guidance(net) else "time_embed.emb"
        return (f"{place}.timestep_embedder",)
