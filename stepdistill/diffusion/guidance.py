"""Classifier-free guidance of a teacher: one network call of both halves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser, Prediction
from stepdistill.diffusion.process import expand


def guided(
    den: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Cond,
    scale: float | Tensor = 1.0,
    *,
    taps: Sequence[str] = (),
    tail: Literal["whole", "frozen"] = "whole",
) -> Prediction:
    """null + scale (cond - null), in the raw output; scale 1 is one plain call.

    The output is affine in the clean estimate at fixed x_t, so guiding it guides every view of it.

    Args:
        x_t: states [B, C, *S] at times t [B].
        scale: one number, or one a sample [B].
        taps: modules whose outputs for the condition itself are kept; see :class:`Denoiser`.
        tail: what becomes of the network behind them.

    Raises:
        ValueError: guidance is asked of a network that has no "no class" label.
    """
    if not isinstance(scale, Tensor) and scale == 1:
        return den(x_t, t, cond, taps=taps, tail=tail)  # type: ignore[no-any-return]
    if den.null_label is None:
        raise ValueError("guidance: the teacher has no label that means 'no class'; set it to 1.0")
    label = cond.label
    null = replace(cond, label=None if label is None else torch.full_like(label, den.null_label))
    x_t = x_t.float()
    with den.tapped(taps, tail) as features:
        both = den.raw(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.stack(null))
    h, h_null = both.chunk(2)
    weight = expand(scale, h) if isinstance(scale, Tensor) else scale
    own = {name: kept[: len(x_t)] for name, kept in features.items()}
    return den.prediction(
        h_null + weight * (h - h_null), x_t, den.process.coefs(t).expand(x_t), own
    )
