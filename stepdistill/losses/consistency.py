"""Pairs of times, targets and weights of what learns along the teacher's path."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.process import Process
from stepdistill.losses.regression import mean_square

Weight = Literal["one", "inverse_gap"]
SnrWeight = Literal["truncated", "plus_one"]


def ect_partner(t: Tensor, stage: int, q: float = 2.0) -> Tensor:
    """The less noisy time r = t (1 - q^-(stage+1)) of a pair; 0 gap only in the limit.

    Source: easy consistency tuning (Geng et al. 2024), its ratio with k = 0.
    """
    return t * (1 - q ** -(stage + 1))


def pair_weight(t: Tensor, r: Tensor, kind: Weight) -> Tensor:
    """1, or 1 / (t - r) as ECT and iCT weigh their pairs."""
    return torch.ones_like(t) if kind == "one" else 1 / (t - r).clamp_min(1e-4)


def landing_estimate(x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor, process: Process) -> Tensor:
    """The clean estimate with which one Euler step from x_t at times t [B] lands on x_r at r < t.

    Source: progressive distillation (Salimans and Ho 2022), for any process; spec M1.
    """
    a, b = process.coefs(t).expand(x_t), process.coefs(r).expand(x_t)
    share = b.sigma / a.sigma
    return (x_r - share * x_t) / (b.alpha - share * a.alpha)


def snr_weight(t: Tensor, process: Process, kind: SnrWeight) -> Tensor:
    """Weight [B] of a clean estimate's square: max(snr, 1), or snr + 1, snr = alpha^2 / sigma^2."""
    c = process.coefs(t)
    snr = (c.alpha / c.sigma) ** 2
    return snr.clamp_min(1.0) if kind == "truncated" else snr + 1


def frame_gap(delta: Tensor, lag: int) -> Tensor:
    """Mean square [B] of what an error changes by over ``lag`` frames, of videos [B, C, F, H, W].

    It is 0 where the error is the same in all frames.

    Source: dual-expert consistency (Lv et al. 2025), the temporal term by its code.
    """
    return mean_square(delta[:, :, lag:] - delta[:, :, :-lag])
