"""Transports: from the clean estimates of fake score and teacher to a direction of the sample.

A new one is a subclass with ``__call__``; a config names it by
``transport: {kind: FILE.py:CLASS}``.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.run.plug import Plug


class Transport(Plug):
    """From the two clean estimates to a direction, before weights."""

    @abstractmethod
    def __call__(self, fake: Tensor, real: Tensor) -> Tensor:
        """The direction [B, ...] along which a sample descends."""


class Plain(Transport):
    """Their difference."""

    def __call__(self, fake: Tensor, real: Tensor) -> Tensor:
        """See :class:`Transport`."""
        return fake - real


class Entropic(Transport):
    """The gradient of entropic optimal transport between the positions of the two (VDOT).

    Each sample's estimates are two clouds of as many points: the channel vectors at an image's
    positions, or a vector's coordinates. The cost of two points is their squared distance. The
    gradient is divided by 2 / N, so that where every point goes to its own partner it is the plain
    difference. Here: cost scale, iterations and mixing are ours; VDOT's are not known.
    """

    blur: float = Field(0.05, gt=0, description="regularisation, in units of the mean cost")
    iterations: int = Field(30, ge=1, description="Sinkhorn iterations, in the log domain")
    debias: bool = Field(
        True, description="Sinkhorn divergence: equal estimates give 0 whatever the blur"
    )
    lam: float = Field(1.0, ge=0, description="share of the plain difference that is added")

    def __call__(self, fake: Tensor, real: Tensor) -> Tensor:
        """See :class:`Transport`."""
        with torch.autocast(fake.device.type, enabled=False):
            moved = self.moved(fake, real)
        return moved + self.lam * (fake - real) if self.lam else moved

    def moved(self, fake: Tensor, real: Tensor) -> Tensor:
        """The transport's own part of the direction [B, ...], in fp32."""
        a, b = points(fake), points(real)
        costs = squared_distances(a, b)
        blur = (self.blur * costs.mean(dim=(1, 2), keepdim=True)).clamp_min(1e-12)
        goes_to = barycentres(costs, b, blur, self.iterations)
        if self.debias:
            moved = barycentres(squared_distances(a, a), a, blur, self.iterations) - goes_to
        else:
            moved = a - goes_to
        return moved.transpose(1, 2).reshape(fake.shape)


def points(x: Tensor) -> Tensor:
    """A sample's points in fp32 [B, N, C]: positions of [B, C, *S], or coordinates of [B, D]."""
    x = x.float()
    return x[..., None] if x.dim() == 2 else x.flatten(2).transpose(1, 2)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Costs [B, N, M] between points a [B, N, C] and b [B, M, C]."""
    way = "donot_use_mm_for_euclid_dist"  # by products, small distances would be rounding
    return torch.cdist(a, b, compute_mode=way).square()


def barycentres(costs: Tensor, b: Tensor, blur: Tensor, iterations: int) -> Tensor:
    """Where each point is sent on average [B, N, C] by the entropic plan of uniform marginals.

    Args:
        costs: [B, N, M].
        b: the points [B, M, C] that they are sent to.
        blur: regularisation [B, 1, 1], in the costs' unit.
        iterations: of Sinkhorn; the last one makes every point's shares sum to 1.
    """
    scaled = -costs / blur
    g = torch.zeros_like(costs[:, :1])  # potentials over the blur, [B, 1, M] and [B, N, 1]
    for _ in range(iterations):
        f = -(scaled + g).logsumexp(dim=2, keepdim=True)
        g = -(scaled + f).logsumexp(dim=1, keepdim=True)
    return (scaled + g).softmax(dim=2) @ b
