"""The algebra of Gaussian mixtures under corruption, on plain tensors of any dtype.

Letters: N states, K components, D coordinates; a component's standard deviations are those along
its own axes, so that an isotropic corruption adds to their squares and nothing is factored twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

LEAST_VARIANCE = 1e-30  # stands for 0, of a point mass without noise


def columns(axes: Tensor) -> Tensor:
    """Axes [K, D, D] (columns are directions) as one matrix [D, K D] that serves every state."""
    return axes.permute(1, 0, 2).reshape(axes.shape[1], -1)


@dataclass(frozen=True)
class Components:
    """Gaussians, each with its own axes.

    Args:
        means: centres [K, D].
        stds: standard deviations along the axes [K, D].
        axes: see :func:`columns`; None if they are the coordinates' own.
    """

    means: Tensor
    stds: Tensor
    axes: Tensor | None = None

    def inward(self, y: Tensor) -> Tensor:
        """Vectors [N, D] in every component's axes: [N, K, D]."""
        if self.axes is None:
            return y[:, None]
        return (y @ self.axes).reshape(-1, *self.means.shape)

    def outward(self, parts: Tensor) -> Tensor:
        """The sum over components of vectors in their axes: [N, K, D] to [N, D]."""
        if self.axes is None:
            return parts.sum(dim=1)
        return parts.flatten(1) @ self.axes.T

    def centres(self) -> Tensor:
        """The means in their own axes [K, D]."""
        if self.axes is None:
            return self.means
        own = self.axes.reshape(-1, *self.means.shape).permute(1, 0, 2)
        return (self.means[:, None] @ own)[:, 0]

    def gaps(self, y: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """How far states lie from noised centres, along the axes, and the variances there.

        Args:
            y: states [N, D].
            alpha: factor of the clean part [N].
            sigma: standard deviation of the noise [N].
        """
        a, b = alpha[:, None, None], sigma[:, None, None]
        variance = (a * self.stds).square() + b.square()
        return self.inward(y) - a * self.centres(), variance.clamp_min(LEAST_VARIANCE)

    def log_fit(self, gap: Tensor, variance: Tensor) -> Tensor:
        """Log density of each component [N, K]."""
        size = gap.shape[-1] * math.log(2 * math.pi)
        return -0.5 * ((gap.square() / variance + variance.log()).sum(dim=2) + size)

    def log_joint(self, y: Tensor, alpha: Tensor, sigma: Tensor, log_weights: Tensor) -> Tensor:
        """Log of share times density of each component [N, K]; log_weights [K] or [N, K]."""
        return log_weights + self.log_fit(*self.gaps(y, alpha, sigma))

    def estimates(
        self, y: Tensor, alpha: Tensor, sigma: Tensor, log_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """E[x | y] and the score, each [N, D], of y = alpha x + sigma z."""
        gap, variance = self.gaps(y, alpha, sigma)
        share = (log_weights + self.log_fit(gap, variance)).softmax(dim=1)
        pull = share[:, :, None] * gap / variance
        shift = alpha[:, None, None] * self.stds.square() * pull
        return share @ self.means + self.outward(shift), -self.outward(pull)
