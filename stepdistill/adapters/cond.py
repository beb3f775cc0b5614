"""What a sample is conditioned on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """Conditions of a batch; every tensor has the batch as its first dimension.

    Args:
        label: class indices [B], int64, or None for an unconditional model.
        end: the time at which the step ends [B], no later than the state's own, for networks that
            are told; None: the state's own, a step of no length.
        twin: 1 for samples whose state is one of the student's own images noised [B], for networks
            that are told; None: 0 for all.
        guidance: the guidance scale that a sample is to look like [B], at least 1, for networks
            that are told; None: the network's own usual one.
        image: an image [B, C', *S] of the state's size that networks are fed beside it, such as a
            picture that is to be sharpened; None: they are fed none.
        steps: how many steps made the image that a state was noised from [B], for networks that are
            told; None: one.
        text: embeddings of a prompt's tokens [B, L, D], as the network's own text encoder makes
            them; None: the network reads none.
        mask: 1 where these are tokens and 0 where they fill up [B, L]; None: all are.
        pooled: one embedding of the whole prompt [B, D'], for networks that are given it too.
        second: embeddings by a second text encoder [B, ...], for networks that read two.
        sizes: what a network is told of the picture's size [B, K], in its own order and units.
    """

    label: Tensor | None = None
    end: Tensor | None = None
    twin: Tensor | None = None
    guidance: Tensor | None = None
    steps: Tensor | None = None
    image: Tensor | None = None
    text: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    second: Tensor | None = None
    sizes: Tensor | None = None

    def ending(self, end: Tensor) -> Cond:
        """The same conditions for steps that end at times [B]."""
        return replace(self, end=end)

    def unlabelled(self, lost: Tensor, null: int) -> Cond:
        """The same conditions with the label "no class" where ``lost`` [B] is set; of conditions
        without labels, themselves."""
        if self.label is None:
            return self
        return replace(self, label=torch.where(lost, null, self.label))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Cond:
        """Apply ``fn`` to every tensor that is present."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return Cond(**{k: None if v is None else fn(v) for k, v in present.items()})

    def rows(self, index: Tensor | slice) -> Cond:
        """Select rows of the batch."""
        return self.map(lambda v: v[index])

    def stack(self, other: Cond) -> Cond:
        """Concatenate two conditions of the same kind into one batch of both."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Cond(**{k: None if a is None else torch.cat([a, b]) for k, (a, b) in pairs.items()})
