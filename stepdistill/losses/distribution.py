"""Distribution matching: noising a sample further, and the targets of the fake score.

Letters: a = alpha, s = sigma of the process at the target time t; a_s, s_s at the level of the
sample that is noised (a_s = 1, s_s = 0 for a clean one); e fresh noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.diffusion.heads import Head
from stepdistill.diffusion.process import Coefs


@dataclass(frozen=True)
class Renoise:
    """The kernel x_t = A x_s + B e that takes a sample at level s to a noisier level t.

    Args:
        at_s: coefficients of the process at the sample's level (expanded).
        at_t: coefficients at the noisier level (expanded).

    Source: Phased DMD; A = a_t / a_s, B^2 = s_t^2 - A^2 s_s^2.
    """

    at_s: Coefs
    at_t: Coefs

    @property
    def scale(self) -> Tensor:
        """A."""
        return self.at_t.alpha / self.at_s.alpha

    @property
    def spread(self) -> Tensor:
        """B, bounded away from 0."""
        square = self.at_t.sigma**2 - (self.scale * self.at_s.sigma) ** 2
        return square.clamp_min(1e-8).sqrt()

    def state(self, x_s: Tensor, e: Tensor) -> Tensor:
        """The noisier state x_t."""
        return self.scale * x_s + self.spread * e

    def parts(self, x_s: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Unbiased stand-ins (x, z) for the clean and noise parts of x_t.

        Their means given x_t are the full process's E[x|x_t] and E[z|x_t], whatever law x_s has:
        z = (s_t / B) e, x = x_s / a_s - a_t s_s^2 / (a_s^2 B) e.
        """
        a_s, a_t = self.at_s.alpha, self.at_t.alpha
        z = self.at_t.sigma / self.spread * e
        x = x_s / a_s - a_t * self.at_s.sigma**2 / (a_s**2 * self.spread) * e
        return x, z

    def target(self, head: Head, x_s: Tensor, e: Tensor, sigma_data: float = 0.5) -> Tensor:
        """The unbiased regression target for a network of the given head.

        For a velocity head of rectified flow this is Phased DMD's
        [(a_s^2 s_t + a_t s_s^2) / (a_s^2 B)] e - x_s / a_s.
        """
        x, z = self.parts(x_s, e)
        return head.output(x, z, self.at_t, sigma_data)

    def weight(self, kind: str) -> Tensor:
        """Weight on the squared error that tames the target's 1/B as t falls to s.

        "ratio": (B / s_t)^2, which is 1 for clean samples; "clamp": B^2 min(1/B^2, 10) as the
        paper's eq. 13; "none": 1.
        """
        if kind == "ratio":
            return ((self.spread / self.at_t.sigma) ** 2).clamp_max(1.0)
        if kind == "clamp":
            return (10 * self.spread**2).clamp_max(1.0)
        return torch.ones_like(self.spread)
