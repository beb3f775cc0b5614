"""Distances, by the difference y of two scores or images: what many methods make small.

A new one is a subclass with ``__call__``, differentiable, 0 at y = 0 and positive elsewhere; its
slope comes by autograd. A config names it by ``{kind: FILE.py:CLASS}``.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.process import expand
from stepdistill.losses.regression import huber_constant, sum_square
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plug, a_sample

SHORTEST = 1e-6  # norms below it weigh as it does, where a power of them would grow beyond bound


class Distance(Plug):
    """A distance d(y) of a difference from 0."""

    @abstractmethod
    def __call__(self, y: Tensor) -> Tensor:
        """d(y), one number a sample [B], of differences y [B, ...]; samples must not mix."""

    def slope(self, y: Tensor) -> Tensor:
        """The gradient d'(y) [B, ...], itself differentiable in y; constant where y is.

        Raises:
            UserError: not one number a sample, or none that depends on y.
        """
        with torch.enable_grad():
            leaf = y if y.requires_grad else y.detach().requires_grad_()
            height = a_sample(self, "distance", self(leaf), len(y))
            if not height.requires_grad:
                raise UserError(f"distance: {self.kind} has no gradient in its difference")
            (found,) = torch.autograd.grad(height.sum(), leaf, create_graph=y.requires_grad)
        return found


class PseudoHuber(Distance):
    """sqrt(||y||^2 + c^2) - c: square when small, length when large (SIM, Luo et al. 2024).

    The norm is of the whole sample, and c = scale sqrt(dimensions), iCT's rule.
    """

    scale: float = Field(0.00054, gt=0, description="c = scale sqrt(dimensions)")
    detach_norm: bool = Field(
        False, description="hold the slope's factor 1 / sqrt(||y||^2 + c^2) constant"
    )

    def _root(self, y: Tensor) -> tuple[Tensor, float]:
        c = huber_constant(y.shape, self.scale)
        return torch.sqrt(sum_square(y) + c * c), c

    def __call__(self, y: Tensor) -> Tensor:
        """See :class:`Distance`."""
        root, c = self._root(y)
        return root - c

    def slope(self, y: Tensor) -> Tensor:
        """y / sqrt(||y||^2 + c^2)."""
        root, _ = self._root(y)
        return y / expand(root.detach() if self.detach_norm else root, y)


class Huber(Distance):
    """The sum over entries of sqrt(y^2 + c^2) - c: each is square when small, length when large.

    Source: the ``huber`` loss of diffusers' LCM training, which takes the mean over entries.
    """

    c: float = Field(1e-3, gt=0, description="where square becomes length")

    def __call__(self, y: Tensor) -> Tensor:
        """See :class:`Distance`."""
        return (torch.sqrt(y.square() + self.c**2) - self.c).flatten(1).sum(dim=1)

    def slope(self, y: Tensor) -> Tensor:
        """y / sqrt(y^2 + c^2), entry by entry."""
        return y / torch.sqrt(y.square() + self.c**2)


class L2(Distance):
    """||y||^2, with which SIM is SiD."""

    def __call__(self, y: Tensor) -> Tensor:
        """See :class:`Distance`."""
        return sum_square(y)

    def slope(self, y: Tensor) -> Tensor:
        """2 y."""
        return 2 * y


class Power(Distance):
    """||y||^p: 1 is the length, whose slope is the direction alone; 2 is ``l2``."""

    p: float = Field(1.5, ge=1, description="the power")

    def _factor(self, y: Tensor) -> Tensor:
        """||y||^(p - 2)."""
        return sum_square(y).clamp_min(SHORTEST**2) ** (self.p / 2 - 1)

    def __call__(self, y: Tensor) -> Tensor:
        """See :class:`Distance`."""
        return sum_square(y) * self._factor(y)

    def slope(self, y: Tensor) -> Tensor:
        """p ||y||^(p - 2) y."""
        return self.p * expand(self._factor(y), y) * y
