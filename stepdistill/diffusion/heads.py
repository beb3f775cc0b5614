"""What a network's raw output means: a linear functional h = a x + b z of clean and noise parts.

With x_t = alpha x + sigma z and det = alpha b - sigma a one inverse serves every head:
x = (b x_t - sigma h) / det and z = (alpha h - a x_t) / det.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.diffusion.process import Coefs


@dataclass(frozen=True)
class Head:
    """One prediction type.

    Args:
        name: the word used in configs.
        weights: (coefficients, sigma_data) -> (a, b, det), each with the coefficients' shape; det
            in its simplified form, so that no head divides by a quantity that cancels.
    """

    name: str
    weights: Callable[[Coefs, float], tuple[Tensor, Tensor, Tensor]]

    def output(self, x: Tensor, z: Tensor, c: Coefs, sigma_data: float = 0.5) -> Tensor:
        """The raw output h [B, ...] of a network that knew x and z (coefficients expanded)."""
        a, b, _ = self.weights(c, sigma_data)
        return a * x + b * z

    def clean(self, h: Tensor, x_t: Tensor, c: Coefs, sigma_data: float = 0.5) -> Tensor:
        """The clean estimate from the raw output."""
        if self.name == "x0":
            return h
        _, b, det = self.weights(c, sigma_data)
        return (b * x_t - c.sigma * h) / det

    def noise(self, h: Tensor, x_t: Tensor, c: Coefs, sigma_data: float = 0.5) -> Tensor:
        """The noise estimate from the raw output."""
        if self.name == "eps":
            return h
        a, _, det = self.weights(c, sigma_data)
        return (c.alpha * h - a * x_t) / det

    def motion(self, c: Coefs, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
        """How far the clean and the noise estimate go as the raw output goes by one."""
        one, (_, _, det) = torch.ones_like(c.alpha), self.weights(c, sigma_data)
        x = one if self.name == "x0" else -c.sigma / det
        return x, one if self.name == "eps" else c.alpha / det


def _x0(c: Coefs, _: float) -> tuple[Tensor, Tensor, Tensor]:
    one = torch.ones_like(c.alpha)
    return one, torch.zeros_like(one), -c.sigma


def _eps(c: Coefs, _: float) -> tuple[Tensor, Tensor, Tensor]:
    one = torch.ones_like(c.alpha)
    return torch.zeros_like(one), one, c.alpha


def _v(c: Coefs, _: float) -> tuple[Tensor, Tensor, Tensor]:
    return -c.sigma, c.alpha, c.alpha**2 + c.sigma**2


def _velocity(c: Coefs, _: float) -> tuple[Tensor, Tensor, Tensor]:
    return c.d_alpha, c.d_sigma, c.alpha * c.d_sigma - c.sigma * c.d_alpha


def _trig_f(c: Coefs, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    rho = torch.sqrt(c.sigma**2 + (sigma_data * c.alpha) ** 2)
    return -c.sigma / (sigma_data * rho), sigma_data * c.alpha / rho, rho / sigma_data


def _edm_f(c: Coefs, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    a, b, det = _trig_f(c, sigma_data)
    return -a, -b, -det


HEADS: dict[str, Head] = {
    head.name: head
    for head in (
        Head("x0", _x0),
        Head("eps", _eps),
        Head("v", _v),
        Head("velocity", _velocity),
        Head("edm-f", _edm_f),
        Head("trig-f", _trig_f),
    )
}
"""Prediction types by name; EDM's raw F is TrigFlow's with the sign turned."""
