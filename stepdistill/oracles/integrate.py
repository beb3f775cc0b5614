"""A batch of ordinary differential equations to high accuracy, with control of the error.

Extrapolation of the modified midpoint rule (Gragg 1965): its error is a
series in the square of the step, of which every finer sequence removes a term.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

COUNTS = (2, 4, 6, 8, 10)  # midpoint steps in a step: order 10
MOST_STEPS = 5000

Field = Callable[[Tensor, Tensor], Tensor]


def _midpoint(
    slope: Callable[[Tensor, float], Tensor],
    y: Tensor,
    first: Tensor,
    at: float,
    width: float,
    count: int,
) -> Tensor:
    step = width / count
    before, now = y, y + step * first
    for i in range(1, count):
        before, now = now, before + 2 * step * slope(now, at + i * step)
    return (before + now + step * slope(now, at + width)) / 2


def integrate(
    field: Field,
    y: Tensor,
    start: Tensor,
    stop: Tensor,
    *,
    tolerance: float = 1e-11,
    scale: float = 1.0,
) -> Tensor:
    """Follow dy/du = field(y, u) from u = start to stop.

    Args:
        field: slopes [N, D] at states [N, D] and places [N].
        y: states at the start [N, D], fp64.
        start: [N].
        stop: [N]; each row goes its own way in common steps.
        tolerance: largest error of a step, relative to the row's largest coordinate and scale.
        scale: added to that size.

    Raises:
        RuntimeError: the steps became too small or too many.
    """
    span = (stop - start)[:, None]

    def slope(state: Tensor, at: float) -> Tensor:
        return span * field(state, start + at * (stop - start))

    order = 2 * len(COUNTS) - 1
    at, width, first = 0.0, 0.05, slope(y, 0.0)
    for _ in range(MOST_STEPS):
        width = min(width, 1 - at)
        row: list[Tensor] = []
        for j, count in enumerate(COUNTS):
            last, row = row, [_midpoint(slope, y, first, at, width, count)]
            for k in range(j):
                ratio = (count / COUNTS[j - k - 1]) ** 2
                row.append(row[k] + (row[k] - last[k]) / (ratio - 1))
        size = scale + torch.maximum(y.abs(), row[-1].abs()).amax(dim=1)
        error = float(((row[-1] - row[-2]).abs().amax(dim=1) / size).max())
        if error <= tolerance:
            y, at = row[-1], at + width
            if at >= 1 - 1e-14:
                return y
            first = slope(y, at)
        change = 0.9 * (tolerance / max(error, 1e-300)) ** (1 / order) if error == error else 0.1
        width *= min(4.0, max(0.1, change))
        if width < 1e-13:
            break
    raise RuntimeError(
        f"the flow could not be followed to {tolerance:g} beyond {at:.6f} of its way"
    )
