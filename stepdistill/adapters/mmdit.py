"""Transformers with a stream for the prompt and one for the picture: SD3 and AuraFlow.

Neither is told a mask: what fills a prompt up is read like the rest, as in their training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.adapters.text import FEED, JOINT, TextAdapter, given, unwrapped


class SD3Adapter(TextAdapter):
    """``net(hidden_states, encoder_hidden_states, pooled_projections, timestep)``."""

    lora_targets = (*JOINT, *FEED, "ff_context.net.0.proj", "ff_context.net.2")
    innate = ("*.to_out.*", "*.ff.net.*")
    pairs = ("transformer_blocks",)
    embedder = "time_text_embed.timestep_embedder"

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no text, or no pooled embedding of it.
        """
        net = unwrapped(call)
        out: Tensor = call(
            x,
            encoder_hidden_states=given(net, cond, "text"),
            pooled_projections=given(net, cond, "pooled"),
            timestep=time,
            return_dict=False,
        )[0]
        return out


class AuraFlowAdapter(TextAdapter):
    """``net(hidden_states, encoder_hidden_states, timestep)``, told times from 0 to 1.

    Its later blocks have one stream, of the prompt's tokens and then the picture's.
    """

    lora_targets = (*JOINT, "linear_1", "linear_2", "out_projection")
    innate = ("*.to_out.*", "*.out_projection.*")
    stacks = ("joint_transformer_blocks", "single_transformer_blocks")
    pairs = ("joint_transformer_blocks",)
    embedder = "time_step_proj"

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no text.
        """
        out: Tensor = call(
            x,
            encoder_hidden_states=given(unwrapped(call), cond, "text"),
            timestep=time / 1000,
            return_dict=False,
        )[0]
        return out
