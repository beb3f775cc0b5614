"""Densities that training times are drawn from, and the grids that samplers walk.

A density maps uniform numbers to times by its inverse distribution function, so that all
randomness stays with the caller.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stepdistill.diffusion.process import Process

Grid = tuple[float, ...]
"""Decreasing times of one process; the last is 0, the clean end."""


def flow_to_process(s: Tensor, process: Process) -> Tensor:
    """The time of ``process`` that has the log-SNR of rectified flow at time s in (0, 1)."""
    t = process.time_at(-2 * torch.logit(s))
    return t.clamp(process.t_min, process.t_max)


class _Density(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Uniform(_Density):
    """Uniform in the process's own progress between ``low`` and ``high`` (1 = pure noise)."""

    kind: Literal["uniform"] = "uniform"
    low: float = Field(0.0, ge=0, le=1)
    high: float = Field(1.0, ge=0, le=1)

    def sample(self, u: Tensor, process: Process) -> Tensor:
        """Times [B] from uniforms u [B] in (0, 1)."""
        return process.warp(self.low + u * (self.high - self.low))


class LogitNormal(_Density):
    """logit s ~ N(mean, std^2) in rectified-flow time s; the same as lognormal n = s / (1 - s)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)

    def sample(self, u: Tensor, process: Process) -> Tensor:
        """Times [B] from uniforms u [B] in (0, 1)."""
        log_n = self.mean + self.std * torch.special.ndtri(u)
        return process.time_at(-2 * log_n).clamp(process.t_min, process.t_max)


class UShaped(_Density):
    """p(s) proportional to cosh(a (s - 1/2)) on [eps, 1 - eps], for deterministic pairs only.

    Source: "Improving the Training of Rectified Flows" (2-rectified flow++), closed-form inverse.
    """

    kind: Literal["u_shaped"] = "u_shaped"
    a: float = Field(4.0, gt=0)
    eps: float = Field(1e-5, ge=0, lt=0.5)

    def sample(self, u: Tensor, process: Process) -> Tensor:
        """Times [B] from uniforms u [B] in (0, 1)."""
        s = 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a
        s = self.eps + s * (1 - 2 * self.eps)
        return s if process.name == "rf" else flow_to_process(s, process)


Density = Annotated[Uniform | LogitNormal | UShaped, Field(discriminator="kind")]
"""Any density, chosen in a config by its ``kind``."""


def uniform_grid(process: Process, steps: int, start: float = 1.0) -> Grid:
    """``steps`` intervals of equal progress from ``start`` (1: pure noise) to 0, then warped."""
    u = torch.linspace(start, 0, steps + 1, dtype=torch.float64)
    return tuple(process.warp(u).tolist())


def karras_grid(steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Grid:
    """``steps`` noise levels of EDM from ``high`` to ``low``, evenly spaced in t^(1/rho)."""
    ends = high ** (1 / rho), low ** (1 / rho)
    return tuple((torch.linspace(*ends, steps, dtype=torch.float64) ** rho).tolist())
