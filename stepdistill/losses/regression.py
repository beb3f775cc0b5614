"""Distances and weighted regressions; every function returns one value a sample [B], in fp32."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def sum_square(delta: Tensor) -> Tensor:
    """Squared Euclidean norm over the non-batch dimensions [B]."""
    return delta.flatten(1).square().sum(dim=1)


def mean_square(delta: Tensor) -> Tensor:
    """Mean square over the non-batch dimensions [B]."""
    return delta.flatten(1).square().mean(dim=1)


def huber_constant(shape: torch.Size, scale: float = 0.00054) -> float:
    """iCT's constant c = 0.00054 sqrt(d) for samples of d dimensions (batch excluded)."""
    return scale * math.sqrt(shape[1:].numel())


def pseudo_huber(delta: Tensor, c: float) -> Tensor:
    """sqrt(||delta||^2 + c^2) - c over the whole sample [B] (iCT, eq. for d_c)."""
    return torch.sqrt(sum_square(delta) + c * c) - c


class _Clip(torch.autograd.Function):
    """Clamp whose gradient passes inwards: a pixel outside can come back, and go no further."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(-bound, bound)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,), (grad,) = ctx.saved_tensors, grads
        outwards = ((x > ctx.bound) & (grad < 0)) | ((x < -ctx.bound) & (grad > 0))
        return grad.masked_fill(outwards, 0), None


def clip_through(x: Tensor, bound: float) -> Tensor:
    """Clamp to [-bound, bound]; of the gradient, only what would push further out is dropped."""
    clipped: Tensor = _Clip.apply(x, bound)
    return clipped


def pull(x: Tensor, direction: Tensor) -> Tensor:
    """A surrogate [B] whose gradient in x is ``direction``, per sample and unscaled.

    Its value is half the squared norm of the direction, so it shows the gradient's size.
    """
    target = (x - direction).detach()
    return 0.5 * sum_square(x - target)
