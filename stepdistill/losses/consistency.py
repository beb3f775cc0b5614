"""Pairs of times, targets and weights of what learns along the teacher's path."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.process import Process
from stepdistill.losses.regression import mean_square
from stepdistill.run.plug import Plug

NOISIEST = 80.0  # noise level at and above which pairs are as there

SnrWeight = Literal["truncated", "plus_one"]


class PairWeight(Plug):
    """What a pair of times counts; a config names a new one by ``kind: FILE.py:CLASS``."""

    @abstractmethod
    def __call__(self, t: Tensor, r: Tensor, process: Process) -> Tensor:
        """Weights [B] of pairs (t, r), both [B], r < t, in the process's time."""


class One(PairWeight):
    """1 for all."""

    def __call__(self, t: Tensor, r: Tensor, process: Process) -> Tensor:
        """See :class:`PairWeight`."""
        return torch.ones_like(t)


class InverseGap(PairWeight):
    """1 / (t - r), as ECT and iCT weigh their pairs."""

    floor: float = Field(1e-4, gt=0, description="lower bound of t - r")
    levels: bool | None = Field(
        None, description="t and r as noise levels sigma / alpha, as published; null: as times"
    )

    def __call__(self, t: Tensor, r: Tensor, process: Process) -> Tensor:
        """See :class:`PairWeight`."""
        if self.levels:
            t, r = noise_level(t, process), noise_level(r, process)
        return 1 / (t - r).clamp_min(self.floor)


def noise_level(t: Tensor, process: Process) -> Tensor:
    """sigma / alpha of times."""
    c = process.coefs(t)
    return c.sigma / c.alpha.clamp_min(1e-12)


def level_partner(t: Tensor, stage: int, q: float, k: float, process: Process) -> Tensor:
    """The less noisy time of a pair by their noise levels n: n_r = n (1 - (1 + k sigmoid(-n))
    q^-(stage+1)), or 0 where that is none; n is taken for 80, EDM's noisiest, above it.

    Source: easy consistency tuning (Geng et al. 2024), its ratio, of b = 1; published: k = 8.
    """
    n = noise_level(t, process).clamp_max(NOISIEST)
    lower = n * (1 - (1 + k * torch.sigmoid(-n)) * q ** -(stage + 1))
    r = process.time_of_noise(lower.clamp_min(1e-12).log())
    r = torch.minimum(r, torch.nextafter(t, torch.zeros_like(t)))  # however small the gap is
    return torch.where((lower > 0) & (t > process.t_min), r, torch.zeros_like(t))


def ect_partner(t: Tensor, stage: int, q: float = 2.0) -> Tensor:
    """The less noisy time r = t (1 - q^-(stage+1)) of a pair; 0 gap only in the limit.

    Source: easy consistency tuning (Geng et al. 2024), its ratio with k = 0.
    """
    return t * (1 - q ** -(stage + 1))


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
