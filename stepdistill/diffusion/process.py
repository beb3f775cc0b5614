"""Affine-Gaussian corruptions x_t = alpha(t) x + sigma(t) z and the way from one to another.

Letters: x clean, z standard normal noise, t time, n = sigma / alpha the noise-to-signal ratio.
Coefficients keep the floating dtype of ``t``: give float64 times for float64 algebra.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def expand(value: Tensor, like: Tensor) -> Tensor:
    """View a per-sample vector [B] as [B, 1, ..., 1] with as many dimensions as ``like``."""
    return value.reshape(-1, *(1,) * (like.dim() - 1))


@dataclass(frozen=True)
class Coefs:
    """Coefficients of the process and their time derivatives at t, each with the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    def expand(self, like: Tensor) -> Coefs:
        """Make every coefficient broadcast over the non-batch dimensions of ``like``."""
        parts = (self.alpha, self.sigma, self.d_alpha, self.d_sigma)
        return Coefs(*(expand(part, like) for part in parts))


class Process(ABC):
    """One corruption process; ``t_min`` and ``t_max`` bound the times a network is trained on.

    ``sigma_data`` is the data's standard deviation that EDM-like heads are scaled by.
    """

    name: str
    t_min: float
    t_max: float
    sigma_data: float = 0.5

    @abstractmethod
    def coefs(self, t: Tensor) -> Coefs:
        """Coefficients at times ``t`` of any shape."""

    @abstractmethod
    def time_at(self, log_snr: Tensor) -> Tensor:
        """Time whose log(alpha^2 / sigma^2) is ``log_snr``: the inverse of :meth:`log_snr`."""

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), strictly decreasing in t."""
        c = self.coefs(t)
        return 2 * (c.alpha.clamp_min(0).log() - c.sigma.log())  # cos(pi / 2) is below 0 in fp32

    def flow_time(self, t: Tensor) -> Tensor:
        """Rectified flow's time of the same log-SNR: sigma / (alpha + sigma), 0 to 1."""
        c = self.coefs(t)
        return c.sigma / (c.alpha + c.sigma)

    def time_of_noise(self, log_n: Tensor) -> Tensor:
        """Time at the log noise-to-signal ratio, kept in the trained range."""
        return self.time_at(-2 * log_n).clamp(self.t_min, self.t_max)

    def time_of_flow(self, s: Tensor) -> Tensor:
        """Time of rectified flow's time s in (0, 1), kept in the trained range: the inverse of
        :meth:`flow_time`."""
        return self.time_of_noise(torch.logit(s))

    def flow_rate(self, t: Tensor) -> Tensor:
        """The derivative of :meth:`flow_time` in t."""
        c = self.coefs(t)
        return (c.alpha * c.d_sigma - c.sigma * c.d_alpha) / (c.alpha + c.sigma) ** 2

    def noise(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The noisy sample alpha x + sigma z [B, ...] at times t [B]."""
        c = self.coefs(t).expand(x)
        return c.alpha * x + c.sigma * z

    def warp(self, u: Tensor) -> Tensor:
        """Map uniform progress u in [0, 1] (1 = noise) to a time; linear unless overridden."""
        return u * self.t_max

    def unwarp(self, t: Tensor) -> Tensor:
        """The progress of a time: the inverse of :meth:`warp`."""
        return t / self.t_max

    def network_time(self, t: Tensor) -> Tensor:
        """The number that networks of this process are told as their time."""
        return t

    def scale_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The state as networks of this process are fed it."""
        return x_t


class RF(Process):
    """Rectified flow: alpha = 1 - t, sigma = t; ``shift`` k warps grids by k u / (1 + (k-1) u)."""

    name = "rf"
    t_min, t_max = 0.0, 1.0

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift

    def coefs(self, t: Tensor) -> Coefs:
        """See :meth:`Process.coefs`."""
        one = torch.ones_like(t)
        return Coefs(1 - t, t, -one, one)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """See :meth:`Process.time_at`."""
        return torch.sigmoid(-log_snr / 2)

    def time_of_flow(self, s: Tensor) -> Tensor:
        """See :meth:`Process.time_of_flow`."""
        return s

    def network_time(self, t: Tensor) -> Tensor:
        """1000 t, as diffusers' flow models take it."""
        return 1000 * t

    def warp(self, u: Tensor) -> Tensor:
        """The resolution-dependent time shift of flow models."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def unwarp(self, t: Tensor) -> Tensor:
        """See :meth:`Process.unwarp`."""
        return t / (self.shift - (self.shift - 1) * t)


class EDM(Process):
    """Variance exploding: alpha = 1, sigma = t, t in [t_min, t_max]."""

    name = "edm"

    def __init__(
        self,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        t_min: float = 0.002,
        t_max: float = 80.0,
    ) -> None:
        self.sigma_data, self.rho = sigma_data, rho
        self.t_min, self.t_max = t_min, t_max

    def coefs(self, t: Tensor) -> Coefs:
        """See :meth:`Process.coefs`."""
        one = torch.ones_like(t)
        return Coefs(one, t, torch.zeros_like(t), one)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """See :meth:`Process.time_at`."""
        return torch.exp(-log_snr / 2)

    def network_time(self, t: Tensor) -> Tensor:
        """ln(t) / 4."""
        return t.clamp_min(1e-20).log() / 4

    def scale_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Unit variance: x_t / sqrt(t^2 + sigma_data^2)."""
        return x_t * expand(torch.rsqrt(t**2 + self.sigma_data**2), x_t)

    def warp(self, u: Tensor) -> Tensor:
        """The Karras spacing: linear in t^(1/rho) between t_min and t_max; 0 stays clean."""
        low, high = self._roots()
        return torch.where(u > 0, (low + u * (high - low)) ** self.rho, torch.zeros_like(u))

    def unwarp(self, t: Tensor) -> Tensor:
        """See :meth:`Process.unwarp`; times below the least are clean."""
        low, high = self._roots()
        return ((t ** (1 / self.rho) - low) / (high - low)).clamp_min(0)

    def _roots(self) -> tuple[float, float]:
        return self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)


class Trig(Process):
    """TrigFlow: alpha = cos t, sigma = sigma_data sin t, t in [0, pi/2]."""

    name = "trig"
    t_min, t_max = 0.0, math.pi / 2

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def coefs(self, t: Tensor) -> Coefs:
        """See :meth:`Process.coefs`."""
        cos, sin, s = t.cos(), t.sin(), self.sigma_data
        return Coefs(cos, s * sin, -sin, s * cos)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """See :meth:`Process.time_at`."""
        return torch.atan(torch.exp(-log_snr / 2) / self.sigma_data)

    def scale_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t / sigma_data."""
        return x_t / self.sigma_data


class VP(Process):
    """Variance preserving, from a scheduler's table of alphas_cumprod.

    Time is (k + 1) / K for the table's index k = 0 .. K-1, so that t = 1 is its noisiest entry,
    t = 0 is exactly clean, and an even grid from 1 to 0 is the schedulers' "trailing" spacing.
    Between entries ln n is linear in t (below the first entry n itself is). An entry of 0 (zero
    terminal SNR) is taken as 2^-24, as diffusers does.
    """

    name = "vp"
    t_max = 1.0

    def __init__(self, alphas_cumprod: Sequence[float] | Tensor) -> None:
        bar = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu().clamp_min(2.0**-24)
        self.log_n = 0.5 * ((1 - bar).log() - bar.log())
        self.size = len(bar)
        self.t_min = 1 / self.size
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _table(self, like: Tensor) -> Tensor:
        key = (like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = self.log_n.to(like)
        return self._tables[key]

    def coefs(self, t: Tensor) -> Coefs:
        """See :meth:`Process.coefs`; t in [0, 1]."""
        table = self._table(t)
        place = (t * self.size - 1).clamp(-1, self.size - 1)
        low = place.floor().clamp(0, self.size - 2).long()
        slope = table[low + 1] - table[low]
        inside = place >= 0
        log_n = table[low] + torch.where(inside, place - low, 0) * slope
        n = log_n.exp() * torch.where(inside, 1, place + 1)
        d_log_n = self.size * torch.where(inside, slope, 1 / (place + 1).clamp_min(1e-30))
        alpha = torch.rsqrt(1 + n * n)
        sigma = n * alpha
        d_sigma = torch.where(n > 0, sigma * alpha**2 * d_log_n, self.size * table[0].exp())
        return Coefs(alpha, sigma, -alpha * sigma**2 * d_log_n, d_sigma)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """See :meth:`Process.time_at`; levels beyond the table's ends are clamped to them."""
        table, log_n = self._table(log_snr), -log_snr / 2
        high = torch.searchsorted(table, log_n.contiguous()).clamp(1, self.size - 1)
        low = high - 1
        place = low + (log_n - table[low]) / (table[high] - table[low])
        below = torch.exp(log_n - table[0]) - 1
        return (
            torch.where(log_n < table[0], below, place).clamp(-1, self.size - 1) + 1
        ) / self.size

    def network_time(self, t: Tensor) -> Tensor:
        """The table's index, fractional between its entries."""
        return (self.size * t - 1).clamp_min(0)


def translate(y: Tensor, t: Tensor, src: Process, dst: Process) -> tuple[Tensor, Tensor]:
    """The same (x, z) seen in another process: the state and time of ``dst`` at equal log-SNR.

    Args:
        y: states of ``src`` [B, ...].
        t: their times [B].
    """
    a = src.coefs(t)
    at = dst.time_at(src.log_snr(t))
    b = dst.coefs(at)
    ratio = torch.sqrt(b.alpha**2 + b.sigma**2) / torch.sqrt(a.alpha**2 + a.sigma**2)
    return y * expand(ratio, y), at
