"""Densities that training times are drawn from, and the grids that samplers walk.

A density maps uniform numbers to times by its inverse distribution function, so that all
randomness stays with the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from stepdistill.diffusion.process import Process

Grid = tuple[float, ...]
"""Decreasing times of one process; the last is 0, the clean end."""


class _Density(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Uniform(_Density):
    """Uniform in the process's own progress between ``low`` and ``high`` (1 = pure noise)."""

    kind: Literal["uniform"] = "uniform"
    low: float = Field(0.0, ge=0, le=1)
    high: float = Field(1.0, ge=0, le=1)

    @field_validator("high")
    @classmethod
    def _ordered(cls, high: float, info: ValidationInfo) -> float:
        if high < info.data.get("low", 0.0):
            raise PydanticCustomError("order", f"must not be below low={info.data['low']}")
        return high

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
        return process.time_of_noise(self.mean + self.std * torch.special.ndtri(u))


class UShaped(_Density):
    """p(s) proportional to cosh(a (s - 1/2)) on [eps, 1 - eps], for deterministic pairs only.

    Source: "Improving the Training of Rectified Flows" (2-rectified flow++), closed-form inverse.
    """

    kind: Literal["u_shaped"] = "u_shaped"
    a: float = Field(4.0, gt=0, le=100)
    eps: float = Field(1e-5, ge=0, lt=0.5)

    def sample(self, u: Tensor, process: Process) -> Tensor:
        """Times [B] from uniforms u [B] in (0, 1)."""
        s = 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a
        s = self.eps + s * (1 - 2 * self.eps)
        return process.time_of_flow(s)


Density = Annotated[Uniform | LogitNormal | UShaped, Field(discriminator="kind")]
"""Any density, chosen in a config by its ``kind``."""


def share_below(times: Callable[[Tensor], Tensor], bound: float) -> float:
    """Share of times that are not above a bound, where ``times`` of uniforms [B] rise with them."""
    low, high = 0.0, 1.0
    for _ in range(40):
        half = (low + high) / 2
        below = bool(times(torch.tensor([half], dtype=torch.float64)) <= bound)
        low, high = (half, high) if below else (low, half)
    return low


def raised(t: Tensor, low: float, top: float, process: Process) -> Tensor:
    """Times [B] of (0, top) moved into (low, top), evenly in progress."""
    ends = torch.tensor([low, top], dtype=torch.float64)
    bottom, whole = process.unwarp(ends).tolist()
    u = bottom + process.unwarp(t) * ((whole - bottom) / whole)
    return process.warp(u).clamp(low, top)


def grid_between(high: float, low: float, steps: int, process: Process) -> Grid:
    """``steps`` intervals of equal progress from one time to a lower one."""
    ends = torch.tensor([high, low], dtype=torch.float64)
    begin, end = process.unwarp(ends).tolist()
    inside = torch.linspace(begin, end, steps + 1, dtype=torch.float64)[1:-1]
    return (high, *process.warp(inside).tolist(), low)


def uniform_grid(process: Process, steps: int, start: float = 1.0) -> Grid:
    """``steps`` intervals of equal progress from ``start`` (1: pure noise) to 0, then warped."""
    u = torch.linspace(start, 0, steps + 1, dtype=torch.float64)
    return tuple(process.warp(u).tolist())


def regular_start(process: Process, head: str) -> float:
    """Progress from which one step is well posed: 1, unless the head divides by a vanishing alpha.

    An eps head's clean estimate does; its is the largest progress, to a 125th, at which alpha is
    0.05 or more (0.768 on DDPM's linear schedule): eight even steps from there lie on entries of
    tables of 1,000.
    """
    if head != "eps":
        return 1.0
    u = torch.arange(126, dtype=torch.float64) / 125
    return float(u[process.coefs(process.warp(u)).alpha >= 0.05].max())


def nearest(grid: Grid, t: float) -> int:
    """The place in a grid of the time nearest to t."""
    return min(range(len(grid)), key=lambda i: abs(grid[i] - t))
