"""Frechet distance between Gaussians fitted to features, by eigenvalues in fp64.

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)        (Dowson and Landau 1982)

The last trace is the sum of the singular values of C1^1/2 C2^1/2, which stays exact where the
covariances are singular. It is called FID only when the features are Inception's (Heusel 2017).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from stepdistill.run.errors import UserError


@dataclass(frozen=True)
class Stats:
    """Mean and scatter of a set of features; two sets merge exactly (Chan, Golub, LeVeque 1979).

    Args:
        mean: [D] fp64.
        scatter: sum of outer products about the mean, [D, D] fp64.
        count: number of features.
    """

    mean: Tensor
    scatter: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> Stats:
        """Statistics of features [N, D].

        Raises:
            UserError: a feature is not finite, which means that the images are not.
        """
        if not torch.isfinite(features).all():
            raise UserError("features hold NaN or infinity: the images they came from are broken")
        return reduce(Stats.merge, (cls._of_part(part) for part in features.split(8192)))

    @classmethod
    def _of_part(cls, features: Tensor) -> Stats:
        values = features.double().cpu()
        mean = values.mean(0)
        centred = values - mean
        return cls(mean, centred.T @ centred, len(values))

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance [D, D] fp64.

        Raises:
            UserError: fewer than two features.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, not {self.count}")
        return self.scatter / (self.count - 1)

    def merge(self, other: Stats) -> Stats:
        """Statistics of both sets together."""
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        between = torch.outer(gap, gap) * (self.count * other.count / count)
        return Stats(mean, self.scatter + other.scatter + between, count)


def frechet_distance(a: Stats, b: Stats) -> float:
    """Squared Frechet distance of two Gaussians, the figure that is reported as FD or FID.

    Raises:
        UserError: features of different width, or fewer than two images on a side.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"features of different width cannot be compared: {len(a.mean)} and {len(b.mean)}"
        )
    cov_a, cov_b = a.cov, b.cov
    cross = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    squared = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(squared), 0.0)


def _root(cov: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(cov)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root
