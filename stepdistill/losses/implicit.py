"""Score implicit matching: losses whose gradient flows through teacher and fake score."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.process import Coefs, expand
from stepdistill.losses.regression import huber_constant, sum_square

Space = Literal["x0", "score"]
Form = Literal["score", "full"]


def sim_loss(
    x_hat: Tensor,
    fake: Tensor,
    real: Tensor,
    coefs: Coefs,
    *,
    distance: Literal["pseudo_huber", "l2"] = "pseudo_huber",
    c: float | None = None,
    space: Space = "x0",
    form: Form = "score",
    detach_norm: bool = False,
) -> Tensor:
    """Per-sample loss [B] of score implicit matching.

    With y the score gap s_F - s_T and d(y) the distance, the "score" form is
    -<d'(y), s_F - grad log q(x_t | x)>, and "full" adds d(y), which gives the total derivative.
    In "x0" space the gap is measured between clean estimates, with one c for every noise level.

    Args:
        x_hat: the student's clean sample [B, ...], part of the graph.
        fake: the fake score's clean estimate at x_t, part of the graph through x_t.
        real: the teacher's clean estimate at x_t, part of the graph through x_t.
        coefs: coefficients at t, expanded.
        distance: d(y) = sqrt(||y||^2 + c^2) - c, or ||y||^2.
        c: the pseudo-Huber constant, iCT's if left out; the norm is a sum over the sample's
            dimensions.
        space: where the gap is measured.
        form: as above.
        detach_norm: hold the factor 1 / sqrt(||y||^2 + c^2) constant (SiD's normaliser).

    Source: One-step diffusion distillation through score implicit matching (Luo et al. 2024).
    """
    rate = torch.ones_like(coefs.alpha) if space == "x0" else coefs.alpha / coefs.sigma**2
    gap = rate * (fake - real)
    residual = rate * (fake - x_hat)
    if distance == "l2":
        slope, height = 2 * gap, sum_square(gap)
    else:
        c = huber_constant(gap.shape) if c is None else c
        root = torch.sqrt(sum_square(gap) + c * c)
        height = root - c
        slope = gap / expand(root.detach() if detach_norm else root, gap)
    loss = -(slope * residual).flatten(1).sum(dim=1)
    return loss + height if form == "full" else loss
