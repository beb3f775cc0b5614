"""Adversarial losses: what a discriminator's logits, high for data, cost both sides.

A new one is a subclass with ``critic`` and ``student``; a config names it by
``kind: FILE.py:CLASS``.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import relu, softplus

from stepdistill.run.plug import Plug


class AdversarialLoss(Plug):
    """A pair of losses of logits [B, K]; ``compares`` where the student's needs real ones too."""

    compares: ClassVar[bool] = False

    @abstractmethod
    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        """The discriminator's loss, entry by entry."""

    @abstractmethod
    def student(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        """The student's loss, entry by entry; ``real`` is given where the loss compares."""


class NonSaturating(AdversarialLoss):
    """softplus; its best logit is log q_t / p_t, the log ratio of data to student."""

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        """See :class:`AdversarialLoss`."""
        return softplus(fake) + softplus(-real)

    def student(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        """See :class:`AdversarialLoss`."""
        return softplus(-fake)


class Hinge(AdversarialLoss):
    """Hinge; its logits are no log ratios."""

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        """See :class:`AdversarialLoss`."""
        return relu(1 - real) + relu(1 + fake)

    def student(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        """See :class:`AdversarialLoss`."""
        return -fake


class Relativistic(AdversarialLoss):
    """softplus of the difference of each fake logit to a real one (Jolicoeur-Martineau 2018)."""

    compares = True

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        """See :class:`AdversarialLoss`."""
        return softplus(fake - real)

    def student(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        """See :class:`AdversarialLoss`."""
        assert real is not None
        return softplus(real - fake)
