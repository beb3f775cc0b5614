"""What networks that read prompts have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.adapters.base import Adapter, spaced
from stepdistill.adapters.cond import Cond

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED = ("ff.net.0.proj", "ff.net.2")

WORDS = {
    "text": "text embeddings",
    "pooled": "a pooled text embedding",
    "guidance": "the guidance scale that it is to look like",
}


class TextAdapter(Adapter):
    """A transformer that is told a prompt's embeddings.

    ``stacks`` names its lists of blocks, from its input to its output; ``pairs`` those whose blocks
    put out the prompt's tokens and then the picture's. ``embedder`` is the module that embeds the
    time.
    """

    reads_text = True
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    pairs: ClassVar[tuple[str, ...]] = ()
    embedder: ClassVar[str]

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """(C, H, W) from the network's config."""
        config: Any = net.config
        size = config.sample_size
        return (config.in_channels - self.beside(net), size, size)

    def _names(self, net: nn.Module) -> list[str]:
        return [
            f"{stack}.{place}"
            for stack in self.stacks
            for place, _ in enumerate(net.get_submodule(stack).children())
        ]

    def taps(self, net: nn.Module) -> tuple[str, ...]:
        """The middle block."""
        names = self._names(net)
        return (names[(len(names) - 1) // 2],)

    def blocks(self, net: nn.Module) -> tuple[str, ...]:
        """Up to four blocks, evenly spaced, the last among them."""
        return spaced(self._names(net))

    def feature(self, name: str, output: Any) -> Tensor:
        """See :meth:`Adapter.feature`: of a block with two streams, the picture's."""
        stack, _, place = name.partition(".")
        if stack in self.pairs and place.isdecimal():
            picture: Tensor = output[1]
            return picture
        return super().feature(name, output)

    def embedders(self, net: nn.Module) -> tuple[str, ...]:
        """The only one."""
        return (self.embedder,)


def unwrapped(call: Callable[..., Any]) -> Any:
    """The network itself, behind a data-parallel or compiled wrapper or none."""
    for name in ("module", "_orig_mod"):
        call = getattr(call, name, call)
    return call


def given(net: Any, cond: Cond, name: str, words: str | None = None) -> Tensor:
    """A part of a condition that a network cannot do without.

    Args:
        net: the network.
        cond: the condition.
        name: of its part.
        words: what the part is; those of :data:`WORDS` if left out.

    Raises:
        ValueError: the condition has no such part.
    """
    value: Tensor | None = getattr(cond, name)
    if value is None:
        raise ValueError(
            f"{type(net).__name__}: every sample needs {words or WORDS[name]} (cond.{name})"
        )
    return value


def tokens_mask(cond: Cond, text: Tensor) -> Tensor:
    """1 where a prompt's embeddings [B, L, D] are of tokens: [B, L], int64."""
    if cond.mask is None:
        return torch.ones(text.shape[:2], device=text.device, dtype=torch.long)
    return cond.mask.long()
