"""Regression of the velocity on pairs of noise and its image."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from stepdistill.losses.regression import mean_square, pseudo_huber

ReflowMetric = Literal["l2", "huber", "faded_huber"]


def velocity_loss(
    v: Tensor, x: Tensor, z: Tensor, t: Tensor, metric: ReflowMetric = "l2"
) -> Tensor:
    """Per-sample loss [B] of a velocity v against the straight path's z - x.

    "l2" is the mean square; "huber" is (sqrt(sum delta^2 + c^2) - c) / d with c = 0.00054 d, right
    only for deterministic pairs; "faded_huber" is (1 - t) times that, which leaves the noisy end,
    where one step starts, to a perceptual term beside it.

    Source: 2-rectified flow++ (Lee et al. 2024), its Huber premetric.
    """
    delta = v - (z - x)
    if metric == "l2":
        return mean_square(delta)
    d = delta[0].numel()
    huber = pseudo_huber(delta, 0.00054 * d) / d
    return (1 - t) * huber if metric == "faded_huber" else huber
