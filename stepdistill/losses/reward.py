"""Rewards: a number for an image that says how much it is liked, more for better.

A new one is a subclass with ``__call__``; a config names it by ``reward: {kind: FILE.py:CLASS}``.
It is differentiable in the image where a term follows its gradient.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plug, a_sample


class Reward(Plug):
    """How much clean samples are liked, each by itself."""

    @abstractmethod
    def __call__(self, x: Tensor, label: Tensor | None) -> Tensor:
        """Rewards [B] of clean samples x [B, ...], asked for by classes [B] (None: no classes)."""


def rewards(reward: Reward, x: Tensor, label: Tensor | None, *, slope: bool = False) -> Tensor:
    """A reward's values [B] in fp32, checked.

    Args:
        reward: any.
        x: clean samples [B, ...].
        label: classes [B], or None.
        slope: whether its gradient in x, which has a graph, is needed.

    Raises:
        UserError: another number of values than samples, or no gradient where one is needed.
    """
    value = a_sample(reward, "reward", reward(x, label), len(x))
    if slope and not value.requires_grad:
        raise UserError(
            f"reward: {reward.kind} has no gradient in the image, which is needed here; compute it "
            "without torch.no_grad and detach"
        )
    return value.float()


class Brightness(Reward):
    """The mean of a sample's entries: of an image in [-1, 1], how bright it is."""

    def __call__(self, x: Tensor, label: Tensor | None) -> Tensor:
        """See :class:`Reward`."""
        return x.flatten(1).mean(dim=1)
