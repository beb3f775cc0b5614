"""Rewards by networks that ship; a config names one ``kind: stepdistill.eval.rewards:CLASS``."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from stepdistill.eval.classifier import Classifier, shipped
from stepdistill.losses.reward import Reward
from stepdistill.run.errors import UserError


class DigitsClass(Reward):
    """Log-probability of the asked class, by the shipped classifier of 8x8 digits."""

    def __call__(self, x: Tensor, label: Tensor | None) -> Tensor:
        """See :class:`Reward`.

        Raises:
            UserError: no digits, or no classes.
        """
        if tuple(x.shape[1:]) != (1, 8, 8) or label is None:
            shape = "x".join(map(str, x.shape[1:]))
            raise UserError(
                f"reward {self.kind}: sees 1x8x8 images of a class, not {shape} "
                f"with{'' if label is not None else 'out'} classes; name another reward"
            )
        with torch.autocast(x.device.type, enabled=False):
            odds: Tensor = _classifier(str(x.device))(x.float()).log_softmax(dim=1)
        return odds.gather(1, label[:, None])[:, 0]


@cache
def _classifier(device: str) -> Classifier:
    """The shipped classifier, read once a device; nothing trains it."""
    return shipped("digits").to(device)
