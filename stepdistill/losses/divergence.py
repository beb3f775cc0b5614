"""f-divergences, by the weight that they give to a place where the ratio r of densities is known.

r = q / p is the data's density over the student's. For D_f = E_p[f(r)], everything that a
gradient needs is F(r) = r^2 f''(r): distribution matching weights the score gap by it (f-distill),
and along diffusion D_f is the integral of E_p[F(r) ||s_p - s_q||^2] (Uni-Instruct).

A new one is a subclass with ``weight``; a config names it by ``divergence: {kind: FILE.py:CLASS}``.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from stepdistill.run.plug import Plug


class Divergence(Plug):
    """An f-divergence of the data from the student."""

    @abstractmethod
    def weight(self, r: Tensor) -> Tensor:
        """F(r) = r^2 f''(r), entry by entry, for ratios r > 0."""

    def rest(self, r: Tensor) -> Tensor:
        """F(r) - r F'(r), which stands before the squared gap in Uni-Instruct.

        It is differentiable in r, and constant where r is.
        """
        with torch.enable_grad():
            leaf = r if r.requires_grad else r.detach().requires_grad_()
            weight = self.weight(leaf)
            slope = torch.zeros_like(r)
            if weight.requires_grad:
                (slope,) = torch.autograd.grad(weight.sum(), leaf, create_graph=r.requires_grad)
            rest = weight - leaf * slope
        return rest if r.requires_grad else rest.detach()


class ReverseKl(Divergence):
    """KL(p || q): f = -log r; seeks modes."""

    def weight(self, r: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(r)


class ForwardKl(Divergence):
    """KL(q || p): f = r log r; covers modes."""

    def weight(self, r: Tensor) -> Tensor:
        """Equal to r."""
        return r


class ChiSquare(Divergence):
    """Pearson's chi square: f = (r - 1)^2."""

    def weight(self, r: Tensor) -> Tensor:
        """2 r^2."""
        return 2 * r * r


class JensenShannon(Divergence):
    """f = (r log r - (r + 1) log((r + 1) / 2)) / 2, the mean of both KLs to the mixture."""

    def weight(self, r: Tensor) -> Tensor:
        """r / (2 (1 + r))."""
        return 0.5 * r / (1 + r)


class Jeffreys(Divergence):
    """Both KLs added."""

    def weight(self, r: Tensor) -> Tensor:
        """1 + r."""
        return 1 + r


class SoftenedReverseKl(Divergence):
    """f = (r + 1) log((r + 1) / r), the direction of a non-saturating generator."""

    def weight(self, r: Tensor) -> Tensor:
        """1 / (1 + r)."""
        return 1 / (1 + r)


class Neyman(Divergence):
    """Neyman's chi square: f = (1 - r)^2 / r, up to a factor of 2."""

    def weight(self, r: Tensor) -> Tensor:
        """1 / r."""
        return 1 / r


class SquaredHellinger(Divergence):
    """f = (1 - sqrt r)^2, up to a factor."""

    def weight(self, r: Tensor) -> Tensor:
        """The root of r."""
        return r.sqrt()
