"""TwinFlow: the target of a step that is one short step of the flow and then the student's own."""

from __future__ import annotations

import math

from torch import Tensor


def recursive_target(
    u: Tensor, v: Tensor, rest: Tensor, way: Tensor, short: Tensor, bound: float
) -> Tensor:
    """What the average velocity u of a step is pulled to, held constant [B, ...].

    u - clip(((s - r) u - rest) / d - v), where a step of length s - r is first one of length d
    along the field v, and then a way ``rest``; at rest (s - r) u = d v + rest.

    Args:
        u: the student's average velocity.
        v: the field where the step begins.
        rest: the way from the end of the short step on: length times average velocity.
        way: the step's length s - r, expanded.
        short: that of the short step d, no longer, expanded.
        bound: of the residual, entry by entry.
    """
    u = u.detach()
    missed = (way * u - rest) / short - v
    return u - missed.clamp(-bound, bound)


def barron_weighted(square: Tensor, c: float) -> Tensor:
    """m / sqrt(m + c^2) of mean squares m [B], the root held constant: a gradient of one length."""
    return square / (square + c**2).sqrt().detach()


def span_weight(way: Tensor) -> Tensor:
    """tan((1 - length) pi / 2.5) + 1 of steps [B]: 1 for the whole way, 4.08 without length."""
    return ((1 - way) * math.pi / 2.5).tan() + 1
