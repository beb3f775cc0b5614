"""Pairs of times for consistency distillation, and the weights of its loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Weight = Literal["one", "inverse_gap"]


def ect_partner(t: Tensor, stage: int, q: float = 2.0) -> Tensor:
    """The less noisy time r = t (1 - q^-(stage+1)) of a pair; 0 gap only in the limit.

    Source: easy consistency tuning (Geng et al. 2024), its ratio with k = 0.
    """
    return t * (1 - q ** -(stage + 1))


def pair_weight(t: Tensor, r: Tensor, kind: Weight) -> Tensor:
    """1, or 1 / (t - r) as ECT and iCT weigh their pairs."""
    return torch.ones_like(t) if kind == "one" else 1 / (t - r).clamp_min(1e-4)
