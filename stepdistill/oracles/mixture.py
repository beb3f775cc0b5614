"""A Gaussian mixture in any dimension, in fp64: densities, moments, samples and corruption."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stepdistill.oracles import line
from stepdistill.oracles.components import Components, columns
from stepdistill.oracles.line import Line

Label = Hashable  # of a class: a number or a name
Level = float | Tensor  # one for all states, or one a state [N]


def double(values: Any) -> Tensor:
    """A tensor in fp64, on the device where it was."""
    return torch.as_tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Mixture:
    """Weighted Gaussians; build it by :meth:`of`.

    Args:
        weights: shares of the K components [K], summing to 1.
        means: centres [K, D].
        stds: standard deviations along each component's axes [K, D]; 0 is a point.
        axes: axes as columns [K, D, D]; None if they are the coordinates' own.
        labels: class of each component; empty if there are none. Several may share a class.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    axes: Tensor | None = None
    labels: tuple[Label, ...] = ()

    @classmethod
    def of(
        cls,
        means: Any,
        *,
        stds: Any = None,
        covariances: Any = None,
        weights: Any = None,
        labels: Sequence[Label] = (),
    ) -> Mixture:
        """Make a mixture from spreads of either kind.

        Args:
            means: centres [K, D].
            stds: standard deviations: one number, one a component [K] or one a coordinate [K, D].
            covariances: in their place, full matrices [K, D, D] (or [D, D], one for all).
            weights: shares [K] in any unit; equal if left out.
            labels: class of each component.

        Raises:
            ValueError: shapes that do not fit, or numbers that no mixture has.
        """
        means = double(means)
        if means.dim() != 2 or not means.numel():
            raise ValueError(f"mixture: means are [K, D], not {list(means.shape)}")
        share = torch.ones_like(means[:, 0]) if weights is None else double(weights)
        if share.shape != means.shape[:1] or not bool((share > 0).all()):
            raise ValueError("mixture: weights are one positive number a component")
        if labels and len(labels) != len(means):
            raise ValueError(f"mixture: {len(labels)} labels for {len(means)} components")
        if (stds is None) == (covariances is None):
            raise ValueError("mixture: give stds or covariances, one of them")
        axes = None
        if stds is not None:
            spread = double(stds)
            spread = (spread[:, None] if spread.dim() == 1 else spread).expand_as(means)
        else:
            spread, axes = _factor(double(covariances), means)
        if not all(bool(v.isfinite().all()) for v in (means, share, spread)) or spread.min() < 0:
            raise ValueError("mixture: numbers must be finite and stds not negative")
        return cls(share / share.sum(), means, spread.clone(), axes, tuple(labels))

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def dim(self) -> int:
        """Coordinates D of a sample."""
        return self.means.shape[1]

    @property
    def classes(self) -> tuple[Label, ...]:
        """The classes: in order if they are numbers, else as they first come."""
        found = tuple(dict.fromkeys(self.labels))
        numbers = all(isinstance(label, int) for label in found)
        return tuple(sorted(found)) if numbers else found  # type: ignore[type-var]

    @property
    def covariances(self) -> Tensor:
        """Of each component [K, D, D]."""
        if self.axes is None:
            return torch.diag_embed(self.stds.square())
        return (self.axes * self.stds.square()[:, None]) @ self.axes.mT

    def rows(self, index: Tensor | slice | int) -> Mixture:
        """Some of the components, without labels."""
        keep = torch.arange(len(self), device=self.means.device)[index].reshape(-1)
        share = self.weights[keep]
        axes = None if self.axes is None else self.axes[keep]
        return Mixture(share / share.sum(), self.means[keep], self.stds[keep], axes)

    def restrict(self, label: Label) -> Mixture:
        """The law of one class.

        Raises:
            ValueError: no component has this label.
        """
        held = [k for k, own in enumerate(self.labels) if own == label]
        if not held:
            raise ValueError(f"mixture: no component of class {label!r}")
        return self.rows(torch.tensor(held, device=self.means.device))

    def tilted(self, slope: Tensor) -> Mixture:
        """The law whose density is this one's times exp(<slope, x>), with slope [D].

        A component N(m, C) moves by C slope, and its share grows by exp(<m, slope> + slope' C
        slope / 2).
        """
        slope = slope.to(self.means)
        shift = self.covariances @ slope
        odds = self.weights.log() + (self.means + shift / 2) @ slope
        return replace(self, weights=odds.softmax(dim=0), means=self.means + shift)

    # Moments and samples

    def mean(self) -> Tensor:
        """Of the whole [D]."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """Of the whole [D, D]."""
        gap = self.means - self.mean()
        spread = self.covariances + gap[:, :, None] * gap[:, None]
        return torch.einsum("k,kde->de", self.weights, spread)

    def sample(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Samples [N, D] and their components [N]: a function of the numbers that are given.

        Args:
            z: standard normal [N, D].
            u: uniform in [0, 1) [N].
        """
        edges = self.weights.cumsum(0)[:-1].contiguous()
        k = torch.searchsorted(edges, u.to(edges).contiguous(), right=True)
        step = self.stds[k] * z.to(edges)
        if self.axes is not None:
            step = torch.einsum("bde,be->bd", self.axes[k], step)
        return self.means[k] + step, k

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Samples [N, D] by a generator."""
        like: dict[str, Any] = {"device": generator.device, "dtype": torch.float64}
        z = torch.randn(count, self.dim, generator=generator, **like)
        u = torch.rand(count, generator=generator, **like)
        return self.sample(z.to(self.means), u.to(self.means))[0]

    # Densities and posteriors at y = alpha x + sigma z

    def noised(self, alpha: float, sigma: float) -> Mixture:
        """The law of alpha x + sigma z."""
        stds = ((alpha * self.stds).square() + sigma**2).sqrt()
        return replace(self, means=alpha * self.means, stds=stds)

    def log_density(self, y: Tensor, alpha: Level = 1.0, sigma: Level = 0.0) -> Tensor:
        """Log density [N] at states y [N, D]."""
        return self._joint(y, alpha, sigma).logsumexp(dim=1)

    def score(self, y: Tensor, alpha: Level = 1.0, sigma: Level = 0.0) -> Tensor:
        """Gradient of the log density [N, D]."""
        return self._estimates(y, alpha, sigma)[1]

    def posterior_mean(self, y: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[x | y] [N, D]."""
        return self._estimates(y, alpha, sigma)[0]

    def responsibilities(self, y: Tensor, alpha: Level = 1.0, sigma: Level = 0.0) -> Tensor:
        """Probability of each component given y [N, K]."""
        return self._joint(y, alpha, sigma).softmax(dim=1)

    def shares(self, y: Tensor) -> Tensor:
        """Shares of the components among samples [K]: of its own samples, in mean its weights."""
        return self.responsibilities(y).mean(dim=0)

    # On a line

    def project(self, direction: Any) -> Mixture:
        """The law of the product with a direction [D]: a mixture of one coordinate."""
        along = double(direction).to(self.means)
        inner = along.expand_as(self.means)
        if self.axes is not None:
            inner = torch.einsum("d,kde->ke", along, self.axes)
        stds = (inner * self.stds).square().sum(dim=1, keepdim=True).sqrt()
        return Mixture(self.weights, self.means @ along[:, None], stds, None, self.labels)

    def line(self) -> Line:
        """Its view as a mixture on a line.

        Raises:
            ValueError: it has more than one coordinate.
        """
        if self.dim != 1:
            raise ValueError(f"mixture: {self.dim} coordinates, not 1; project it first")
        return Line(self.weights.log(), self.means.T, self.stds.T)

    def cdf(self, y: Tensor) -> Tensor:
        """Of one coordinate: the probability below y [N]."""
        return line.cdf(self.line(), double(y))

    def quantile(self, q: Tensor) -> Tensor:
        """Of one coordinate: where the probability below is q [N]."""
        return line.quantile(self.line(), double(q))

    def _view(self) -> Components:
        return Components(self.means, self.stds, None if self.axes is None else columns(self.axes))

    def _levels(self, y: Tensor, *levels: Level) -> list[Tensor]:
        return [double(level).to(self.means).expand(len(y)) for level in levels]

    def _joint(self, y: Tensor, alpha: Level, sigma: Level) -> Tensor:
        a, b = self._levels(y, alpha, sigma)
        return self._view().log_joint(y.to(self.means), a, b, self.weights.log())

    def _estimates(self, y: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
        a, b = self._levels(y, alpha, sigma)
        return self._view().estimates(y.to(self.means), a, b, self.weights.log())


def join(first: Mixture, second: Mixture) -> tuple[Tensor, Tensor, Tensor | None]:
    """Means, stds and axes of the components of both."""
    axes = None
    if first.axes is not None or second.axes is not None:
        axes = torch.cat([_axes(first), _axes(second)])
    return (
        torch.cat([first.means, second.means]),
        torch.cat([first.stds, second.stds]),
        axes,
    )


def _axes(mixture: Mixture) -> Tensor:
    if mixture.axes is not None:
        return mixture.axes
    return torch.eye(mixture.dim).to(mixture.means).expand(len(mixture), -1, -1)


def _factor(matrices: Tensor, means: Tensor) -> tuple[Tensor, Tensor | None]:
    """Standard deviations along axes and the axes; None where matrices are diagonal."""
    size = means.shape[1]
    if matrices.shape not in ((size, size), (*means.shape, size)):
        raise ValueError(f"mixture: covariances are [K, D, D], not {list(matrices.shape)}")
    matrices = matrices.expand(*means.shape, size)
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    if not bool((matrices - torch.diag_embed(diagonal)).any()):
        if diagonal.min() < 0:
            raise ValueError("mixture: a covariance has a negative variance")
        return diagonal.sqrt(), None
    values, axes = torch.linalg.eigh(matrices)
    slack = 1e-12 * values.abs().amax()
    if not torch.allclose(matrices, matrices.mT, rtol=0, atol=float(slack)):
        raise ValueError("mixture: a covariance is not symmetric")
    if values.min() < -slack:
        raise ValueError("mixture: a covariance has a negative variance")
    return values.clamp_min(0).sqrt(), axes
