"""Regression on pairs of noise and its image: along the straight line between them, and of images.

Letters: s rectified flow's time, 0 to 1; y = x_t / (alpha + sigma) the state in its coordinates,
where a line between noise z and image x is y = (1 - s) x + s z, with the velocity z - x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from stepdistill.diffusion.process import Coefs
from stepdistill.losses.regression import mean_square, pseudo_huber

PairMetric = Literal["l2", "huber"]
ReflowMetric = Literal["l2", "huber", "faded_huber"]


def line_noise(x: Tensor, z: Tensor, top: Coefs) -> Tensor:
    """The noise z - (alpha / sigma) x [B, ...] whose line to x begins where sampling does.

    A sampler's first state is sigma z, also where alpha is not 0 there: alpha x + sigma z', with
    z' this noise, is that state. In rectified flow it is z itself.

    Args:
        x: images [B, ...].
        z: standard normal noise [B, ...].
        top: coefficients at the sampler's first time, expanded.

    Source: spec 1.1 (a process's first state is the pair's noise), worked out here.
    """
    return z - top.alpha / top.sigma * x


def pair_distance(delta: Tensor, metric: PairMetric = "l2") -> Tensor:
    """ "l2" is the mean square [B]; "huber" is (sqrt(sum delta^2 + c^2) - c) / d, c = 0.00054 d.

    Source: 2-rectified flow++ (Lee et al. 2024), its Huber premetric; spec 1.4.
    """
    if metric == "l2":
        return mean_square(delta)
    d = delta[0].numel()
    return pseudo_huber(delta, 0.00054 * d) / d


def velocity_loss(
    v: Tensor, x: Tensor, z: Tensor, t: Tensor, metric: ReflowMetric = "l2"
) -> Tensor:
    """Per-sample loss [B] of a velocity v against the straight path's z - x.

    "l2" and "huber" are :func:`pair_distance`'s, the latter right only for deterministic pairs;
    "faded_huber" is (1 - t) times it, which leaves the noisy end, where one step starts, to a
    perceptual term beside it.

    Source: 2-rectified flow++ (Lee et al. 2024); spec 1.4.
    """
    delta = v - (z - x)
    if metric == "faded_huber":
        return (1 - t) * pair_distance(delta, "huber")
    return pair_distance(delta, metric)


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """LPIPS's distance [B] of two lists of features, but for its learned weights of channels.

    Features become unit vectors along their channels; the squared distance of these is averaged
    over places and levels. Maps are [B, C, H, W], vectors [B, C], tokens [B, N, C].

    Source: LPIPS (Zhang et al. 2018), with weight 1 / levels for every channel.
    """
    total = []
    for one, other in zip(a, b, strict=True):
        axis = -1 if one.dim() == 3 else 1
        delta = normalize(one.float(), dim=axis) - normalize(other.float(), dim=axis)
        total.append(delta.square().sum(dim=axis, keepdim=True).flatten(1).mean(dim=1))
    return torch.stack(total).mean(dim=0)


def window_line(
    first: Tensor, last: Tensor, high: Coefs, low: Coefs, at: Coefs
) -> tuple[Tensor, Tensor]:
    """States [B, ...] on the lines between the ends of a window, and the lines' velocities.

    Args:
        first: states at the window's noisy end [B, ...].
        last: states at its clean end [B, ...].
        high: coefficients at the noisy end, expanded.
        low: coefficients at the clean end, expanded.
        at: coefficients at the states' own times, expanded.

    Returns:
        The states, in the process's own scale, and the slope of y in s, both [B, ...].
    """
    size_high, size_low, size = (c.alpha + c.sigma for c in (high, low, at))
    s_high, s_low, s = high.sigma / size_high, low.sigma / size_low, at.sigma / size
    y_high, y_low = first / size_high, last / size_low
    v = (y_high - y_low) / (s_high - s_low)
    return size * (y_low + (s - s_low) * v), v


def mixed_noise(z: Tensor, other: Tensor, beta: float) -> Tensor:
    """sqrt(1 - beta^2) z + beta z' [B, ...]: standard normal at every beta of [0, 1].

    Source: SlimFlow (Zhu et al. 2024), annealing reflow; spec 7.
    """
    return math.sqrt(1 - beta * beta) * z + beta * other
