"""Distribution functions of Gaussian mixtures on a line, and the monotone map between two.

Everything is in logarithms of the nearer tail, so that both tails keep their digits. Shapes:
values [N], components [1, K] or, where each value has its own mixture, [N, K]; fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ROUNDS = 200
LEAST_STD = 1e-300  # stands for 0, of a point mass


@dataclass(frozen=True)
class Line:
    """A mixture on a line.

    Args:
        log_weights: logarithms of the shares [K].
        means: [1, K] or [N, K].
        stds: the same; 0 for points.
    """

    log_weights: Tensor
    means: Tensor
    stds: Tensor

    def mirrored(self, sign: Tensor) -> Line:
        """The mixture of sign times the value, one sign a value [N]."""
        return Line(self.log_weights, sign[:, None] * self.means, self.stds)

    def places(self, y: Tensor) -> Tensor:
        """Values in standard deviations from the centres [N, K]."""
        places: Tensor = (y[:, None] - self.means) / self.stds.clamp_min(LEAST_STD)
        return places

    def log_cdf(self, y: Tensor) -> Tensor:
        """Log of the probability below y [N]."""
        below: Tensor = torch.special.log_ndtr(self.places(y))
        return (self.log_weights + below).logsumexp(dim=1)

    def log_pdf(self, y: Tensor) -> Tensor:
        """Log density at y [N]."""
        spread = self.stds.clamp_min(LEAST_STD).log() + 0.5 * math.log(2 * math.pi)
        return (self.log_weights - 0.5 * self.places(y).square() - spread).logsumexp(dim=1)

    def tails(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Log probability of the nearer tail [N], and its side: 1 below, -1 above."""
        below = self.log_cdf(y)
        above = self.mirrored(-torch.ones_like(y)).log_cdf(-y)
        return torch.minimum(below, above), torch.where(below <= above, 1.0, -1.0).to(y)

    def at_tail(self, log_tail: Tensor, side: Tensor) -> Tensor:
        """Where the tail on ``side`` [N] has this log probability [N], at most log 1/2."""
        return side * self.mirrored(side).solve(log_tail)

    def solve(self, log_tail: Tensor) -> Tensor:
        """Where the probability below has this logarithm [N], at most that of 1/2.

        Newton's method on log F inside a bracket that is halved whenever a step would leave it or
        gains too little. The bracket: Phi(-z) <= exp(-z^2 / 2) for each component.
        """
        reach = (-2 * log_tail).clamp_min(0).sqrt()[:, None]
        low = (self.means - self.stds * reach).amin(dim=1).expand_as(log_tail)
        high = self.means.amax(dim=1).expand_as(log_tail)
        scale = high.abs() + low.abs() + torch.finfo(high.dtype).tiny
        y, step, before = (low + high) / 2, high - low, high - low
        for _ in range(MOST_ROUNDS):
            value = self.log_cdf(y)
            rest = value - log_tail
            low, high = torch.where(rest < 0, y, low), torch.where(rest < 0, high, y)
            newton = y - rest * (value - self.log_pdf(y)).exp()
            good = (newton > low) & (newton < high) & ((newton - y).abs() < before.abs() / 2)
            after = torch.where(good, newton, (low + high) / 2)
            after = torch.where(rest == 0, y, after)
            before, step = step, after - y
            y = after
            if bool((step.abs() <= 4e-16 * scale).all()):
                break
        return y


def cdf(line: Line, y: Tensor) -> Tensor:
    """The probability below y [N]."""
    log_tail, side = line.tails(y)
    return torch.where(side > 0, log_tail.exp(), -torch.expm1(log_tail))


def quantile(line: Line, q: Tensor) -> Tensor:
    """Where the probability below is q [N]; -inf at 0 and inf at 1."""
    side = torch.where(q <= 0.5, 1.0, -1.0).to(q)
    log_tail = torch.where(q <= 0.5, q.log(), torch.log1p(-q))
    inner = log_tail.isfinite()
    y = line.at_tail(log_tail.where(inner, torch.full_like(q, -math.log(2))), side)
    return y.where(inner, -side * math.inf)


def transport(src: Line, dst: Line, y: Tensor) -> Tensor:
    """The increasing map of one law to another, G^-1(F(y)) [N]."""
    return dst.at_tail(*src.tails(y))
