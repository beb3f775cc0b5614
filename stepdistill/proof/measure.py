"""Figures of samples against a law or against the images that theory gives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepdistill.oracles.mixture import Mixture

DIRECTIONS = 16
BLOCKS = 16


def even_normals(count: int, dim: int, seed: int = 0) -> Tensor:
    """Standard normals [count, dim] that fill space evenly (scrambled Sobol points), fp64."""
    engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed)
    u = engine.draw(count, dtype=torch.float64)
    normals: Tensor = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
    return normals


def whitened(z: Tensor) -> Tensor:
    """The same points with mean 0 and covariance 1 to rounding: an affine map shows its moments."""
    z = z.double() - z.double().mean(dim=0)
    lower = torch.linalg.cholesky(z.T @ z / len(z))
    white: Tensor = torch.linalg.solve_triangular(lower, z.T, upper=False).T
    return white


def scale(law: Mixture) -> float:
    """Root mean standard deviation of a coordinate, the unit of every distance."""
    return float(law.covariance().diagonal().mean().sqrt())


def shadows(x: Tensor, law: Mixture) -> list[tuple[Tensor, Mixture]]:
    """Sorted samples [N] and the law on a line: on the only one, or along even directions.

    A mixture's shadow is a mixture, whose distribution function and quantiles are exact.
    """
    if law.dim == 1:
        return [(x[:, 0].double().sort()[0], law)]
    way = torch.nn.functional.normalize(even_normals(DIRECTIONS, law.dim, seed=7), dim=1)
    return [((x.double() @ one).sort()[0], law.project(one)) for one in way]


def wasserstein1(x: Tensor, law: Mixture) -> float:
    """W1 of samples [N, D] to a law: on a line; else its mean over shadows (sliced W1)."""
    q = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
    gaps = [(order - one.quantile(q)).abs().mean() for order, one in shadows(x, law)]
    return float(torch.stack(gaps).mean())


def cdf_gap(x: Tensor, law: Mixture) -> float:
    """Largest difference of the samples' distribution function to the law's, over all shadows."""
    q = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
    gaps = [(one.cdf(order) - q).abs().max() for order, one in shadows(x, law)]
    return float(torch.stack(gaps).max())


def gaussian_w2(x: Tensor, law: Mixture) -> float:
    """W2 between the Gaussians of the samples' and the law's moments (Bures' distance)."""
    x, target = x.double(), law.covariance()
    spread = torch.cov(x.T, correction=0).reshape(law.dim, law.dim)
    root = _root(target)
    cross = torch.linalg.eigvalsh(root @ spread @ root).clamp_min(0).sqrt().sum()
    square = (x.mean(dim=0) - law.mean()).square().sum()
    square = square + target.trace() + spread.trace() - 2 * cross
    return float(square.clamp_min(0).sqrt())


def _root(matrix: Tensor) -> Tensor:
    values, axes = torch.linalg.eigh(matrix)
    root: Tensor = (axes * values.clamp_min(0).sqrt()) @ axes.T
    return root


def energy(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Energy distance 2 E|x-y| - E|x-x'| - E|y-y'| of two sets of samples, with standard error.

    Means over blocks of both sets, each unbiased; the error is that of the mean over blocks.
    """
    found = []
    for a, b in zip(x.double().chunk(BLOCKS), y.double().chunk(BLOCKS), strict=True):
        within = [torch.cdist(one, one).sum() / (len(one) * (len(one) - 1)) for one in (a, b)]
        found.append(float(2 * torch.cdist(a, b).mean() - sum(within)))
    values = torch.tensor(found)
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def mode_gap(x: Tensor, law: Mixture) -> float:
    """Largest difference of a mode's share among samples from its weight."""
    return float((law.shares(x.double()) - law.weights).abs().max())


def least_mode(x: Tensor, law: Mixture) -> float:
    """Share of the most neglected mode, as a part of its weight; 0 where one is lost."""
    return float((law.shares(x.double()) / law.weights).min())
