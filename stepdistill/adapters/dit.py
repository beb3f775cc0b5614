"""DiTTransformer2DModel: class labels, with one row of the label table kept for "no class"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from stepdistill.adapters.base import Adapter, spaced
from stepdistill.adapters.cond import Cond


class DiTAdapter(Adapter):
    """``net(hidden_states, timestep, class_labels)``; the label is mandatory."""

    label_key = "num_embeds_ada_norm"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    innate = ("*.to_out.*", "*.ff.net.*")  # ours: GDD's rule knows convolutions only

    def __call__(self, call: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Adapter.__call__`.

        Raises:
            ValueError: no labels.
        """
        if cond.label is None:
            raise ValueError("DiTTransformer2DModel: every sample needs a class label")
        out: Tensor = call(x, timestep=time, class_labels=cond.label, return_dict=False)[0]
        return out

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """(C, H, W) from the network's config."""
        config: Any = net.config
        size = config.sample_size
        return (config.in_channels - self.beside(net), size, size)

    def null_label(self, net: nn.Module) -> int | None:
        """The row after the last class."""
        config: Any = net.config
        return int(config.num_embeds_ada_norm)

    def taps(self, net: nn.Module) -> tuple[str, ...]:
        """The middle block."""
        config: Any = net.config
        return (f"transformer_blocks.{(config.num_layers - 1) // 2}",)

    def blocks(self, net: nn.Module) -> tuple[str, ...]:
        """Up to four blocks, evenly spaced, the last among them."""
        config: Any = net.config
        return spaced([f"transformer_blocks.{place}" for place in range(config.num_layers)])

    def embedders(self, net: nn.Module) -> tuple[str, ...]:
        """One in every block; the first one's also modulates the output."""
        config: Any = net.config
        return tuple(
            f"transformer_blocks.{place}.norm1.emb.timestep_embedder"
            for place in range(config.num_layers)
        )
