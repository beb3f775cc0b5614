"""Kernel distance: the unbiased squared MMD with the cubic kernel (Binkowski 2018).

The samples are dealt into disjoint subsets. Their estimates are independent, so the mean comes
with an honest standard error, and each is unbiased: zero on average for equal distributions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.run.errors import UserError


@dataclass(frozen=True)
class Kid:
    """Mean over the subsets and its standard error (None with one subset)."""

    mean: float
    se: float | None


def kid(a: Tensor, b: Tensor, *, subsets: int = 10, seed: int = 0) -> Kid:
    """Kernel distance between features a [N, D] and b [M, D].

    Args:
        a: features of one set.
        b: features of the other.
        subsets: number of disjoint parts that each set is dealt into.
        seed: decides the deal.

    Raises:
        UserError: fewer than two images a subset, or features of different width.
    """
    if a.shape[1] != b.shape[1]:
        raise UserError(f"features of different width: {a.shape[1]} and {b.shape[1]}")
    if min(len(a), len(b)) < 2 * subsets:
        raise UserError(
            f"kid with {subsets} subsets needs at least {2 * subsets} images a side, "
            f"not {min(len(a), len(b))}"
        )
    generator = torch.Generator().manual_seed(seed)
    dealt = [
        features[torch.randperm(len(features), generator=generator).to(features.device)]
        .double()
        .tensor_split(subsets)
        for features in (a, b)
    ]
    values = torch.stack([mmd2(x, y) for x, y in zip(*dealt, strict=True)])
    se = float(values.std() / subsets**0.5) if subsets > 1 else None
    return Kid(float(values.mean()), se)


def mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared MMD of x [N, D] and y [M, D] with k(u, v) = (u.v / D + 1)^3."""
    within = sum(
        (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))
        for k in (_kernel(x, x), _kernel(y, y))
    )
    return within - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
