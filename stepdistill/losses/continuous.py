"""Continuous-time consistency: the tangent of the clean estimate along a path, in any process.

All is written in F, the velocity of TrigFlow in units of the data: with tan(tau) = n / sigma_data
and the state y = x_t / size, clean and noise parts are x / sigma_data = cos y - sin F and
z = sin y + cos F. Neither way divides, so nothing here has a singular end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.process import Coefs, Process, expand

Normal = Literal["norm", "clamp", "none"]


@dataclass(frozen=True)
class Angle:
    """The TrigFlow angle tau of times, and what a derivative in time counts in a tangent.

    Args:
        cos: of tau [B].
        sin: of it.
        size: what a state is divided by to be y: sqrt((alpha sigma_data)^2 + sigma^2) [B].
        weight: of the tangent d(x)/d(tau) [B].
        speed: weight sin dt/dtau [B].
    """

    cos: Tensor
    sin: Tensor
    size: Tensor
    weight: Tensor
    speed: Tensor

    @classmethod
    def of(cls, process: Process, t: Tensor, data: float, *, cosine: bool) -> Angle:
        """At times t [B] of a process, for data of standard deviation ``data``.

        ``cosine`` weighs by the angle's (sCM); else the weight is 1.
        """
        c = process.coefs(t)
        size = torch.sqrt((c.alpha * data) ** 2 + c.sigma**2)
        cos, speed = c.alpha * data / size, c.sigma / (c.alpha * c.d_sigma - c.sigma * c.d_alpha)
        if cosine:
            return cls(cos, c.sigma / size, size, cos, c.alpha * speed)
        return cls(cos, c.sigma / size, size, torch.ones_like(cos), size / data * speed)


def field(x: Tensor, z: Tensor, c: Coefs, data: float) -> Tensor:
    """F of clean and noise parts [B, ...], with expanded coefficients: cos z - sin x / data."""
    size = torch.sqrt((c.alpha * data) ** 2 + c.sigma**2)
    return (c.alpha * data * z - c.sigma / data * x) / size


def tangent(
    own: Tensor, slope: Tensor, real: Tensor, x_t: Tensor, at: Angle, warmth: float
) -> Tensor:
    """w dx/dtau of the clean estimate along a path, in units of the data [B, ...].

    g = -w cos (F - F_path) - r w sin (y + dF/dtau), which is 0 where the estimate does not change
    along the path. With w = cos it is sCM's, with its scaled tangents (Lu and Song 2024; spec M9),
    which vanishes at pure noise.

    Args:
        own: F of the student [B, ...].
        slope: dF/dt of the student along the path, in the process's own time.
        real: F of the path: the teacher's, or the data's own.
        x_t: states.
        at: their angles.
        warmth: r in [0, 1]; below 1 the derivative counts less.
    """
    cos, sin, w, speed = (expand(part, x_t) for part in (at.cos, at.sin, at.weight, at.speed))
    y = x_t / expand(at.size, x_t)
    return -w * cos * (own - real) - warmth * (w * sin * y + speed * slope)


def bounded(g: Tensor, kind: Normal, floor: float) -> Tensor:
    """A tangent made small: by its sample's norm plus a floor, or each entry within [-1, 1].

    What is not finite becomes 0.
    """
    g = torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)
    if kind == "none":
        return g
    if kind == "clamp":
        return g.clamp(-1.0, 1.0)
    norm = torch.linalg.vector_norm(g.flatten(1), dim=1)
    return g / expand(norm + floor, g)
