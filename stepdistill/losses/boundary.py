"""Boundary functions of rectified flow: clean estimates f = a(s) x_s + b(s) v of a velocity v.

At s = 0 the estimate is the state, a(0) = 1 and b(0) = 0, whatever the network says. What reaches
the network of a loss's gradient is b(s) times it, so that it matters whether b falls with s or with
its square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.heads import Head
from stepdistill.diffusion.process import Coefs

Family = Literal["linear", "preserving"]

LEAST = 1e-4  # time, below which a head's weights would be 0 / 0


def boundary(s: Tensor, family: Family, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """The factors (a, b) at flow times s in [0, 1], of any shape.

    "linear": 1 and -s, the flow's own clean estimate x_s - s v. "preserving": that estimate scaled
    by c_out = s sigma_data / sqrt(s^2 + sigma_data^2), beside x_s scaled by c_skip = sigma_data^2 /
    (s^2 + sigma_data^2): b = -s c_out falls with the square of s, and a(1) is not 0.

    Source: Flash-WAM, by its code: the first for actions, the second for video.
    """
    if family == "linear":
        return torch.ones_like(s), -s
    square = s**2 + sigma_data**2
    skip, out = sigma_data**2 / square, s * sigma_data / square.sqrt()
    return skip + out, -s * out


def bounded_head(channels: Sequence[int], families: Sequence[Family], sigma_data: float) -> Head:
    """What the velocities of a network mean whose clean estimates are f, group by group.

    Args:
        channels: how many each group has, of the samples' first dimension.
        families: of each group.
        sigma_data: of "preserving".

    The functional h = (1 - a alpha) / b x - a sigma / b z, whose inverse is x = a x_s + b h.
    """

    def weights(c: Coefs, _: float) -> tuple[Tensor, Tensor, Tensor]:
        s = c.sigma.clamp_min(LEAST)
        if len(families) > 1 and s.dim() == 1:
            s = s[:, None]
        pairs = [boundary(s, family, sigma_data) for family in families]
        a, b = (whole([pair[k] for pair in pairs], channels) for k in (0, 1))
        return (1 - a * (1 - s)) / b, -a * s / b, -s / b

    return Head("bounded", weights)


def whole(parts: Sequence[Tensor], channels: Sequence[int]) -> Tensor:
    """Factors [B, 1, ...] of groups as one [B, C, ...]; those of a single group as they are."""
    if len(parts) == 1:
        return parts[0]
    pairs = zip(parts, channels, strict=True)
    return torch.cat([part.repeat_interleave(count, dim=1) for part, count in pairs], dim=1)
