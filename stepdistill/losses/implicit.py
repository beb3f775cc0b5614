"""Implicit score matching: losses whose gradient flows through teacher and fake score.

All are of one sample each [B], of its clean version x_hat, and the clean estimates of fake score
and teacher at x_t = alpha x_hat + sigma e; all three are part of the graph.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.process import Coefs
from stepdistill.losses.distance import Distance
from stepdistill.losses.divergence import Divergence
from stepdistill.losses.regression import sum_square

Space = Literal["x0", "score"]
Form = Literal["score", "full"]
Ratio = Literal["exact", "stopped"]


def sim_loss(
    x_hat: Tensor,
    fake: Tensor,
    real: Tensor,
    coefs: Coefs,
    *,
    distance: Distance,
    space: Space = "x0",
    form: Form = "score",
) -> Tensor:
    """Per-sample loss [B] of score implicit matching.

    With y the score gap s_F - s_T and d(y) the distance, the "score" form is
    -<d'(y), s_F - grad log q(x_t | x)>, and "full" adds d(y), which gives the total derivative.
    In "x0" space the gap is measured between clean estimates, alike at every noise level.

    Args:
        x_hat: the student's clean sample [B, ...].
        fake: the fake score's clean estimate at x_t.
        real: the teacher's clean estimate at x_t.
        coefs: coefficients at t, expanded.
        distance: d; only its slope counts in the "score" form.
        space: where the gap is measured.
        form: as above.

    Source: One-step diffusion distillation through score implicit matching (Luo et al. 2024).
    """
    rate = torch.ones_like(coefs.alpha) if space == "x0" else coefs.alpha / coefs.sigma**2
    gap = rate * (fake - real)
    residual = rate * (fake - x_hat)
    loss = -(distance.slope(gap) * residual).flatten(1).sum(dim=1)
    return loss + distance(gap) if form == "full" else loss


def sid_loss(x_hat: Tensor, fake: Tensor, real: Tensor, alpha: float) -> Tensor:
    """Per-sample loss [B] of score identity distillation, without its normaliser.

    <D_T - D_F, D_T - x_hat> - alpha ||D_T - D_F||^2, summed so that alpha = 1 leaves one term:
    <D_T - D_F, D_F - x_hat> + (1 - alpha) ||D_T - D_F||^2. That is half of SIM with ``l2``, in its
    "score" form for alpha = 1 and in its "full" one for alpha = 1/2.

    Args:
        x_hat: the student's clean sample [B, ...].
        fake: the fake score's clean estimate D_F.
        real: the teacher's, D_T.
        alpha: above 1 it makes up for a fake score that lags.

    Source: Score identity distillation (Zhou et al. 2024).
    """
    gap = fake - real
    cross = -(gap * (fake - x_hat)).flatten(1).sum(dim=1)
    return cross + (1 - alpha) * sum_square(gap)


def uni_loss(
    x_hat: Tensor,
    fake: Tensor,
    real: Tensor,
    x_t: Tensor,
    coefs: Coefs,
    r: Tensor,
    *,
    divergence: Divergence,
    ratio: Ratio = "exact",
    bounds: tuple[float, float] = (0.1, 20.0),
) -> Tensor:
    """Per-sample loss [B] whose gradient is that of an f-divergence at one noise level.

    (F - r F') ||D_T - D_F||^2 + 2 F <D_T - D_F, D_F - x_hat>, with F(r) = r^2 f''(r) and r the
    density of the data over the student's at x_t. The gradient goes through r too: since
    grad log r = s_T - s_F is known, r exp(<sg(s_T - s_F), x_t - sg(x_t)>) has r's value and its
    gradient without a pass through what told it.

    Args:
        x_hat: the student's clean sample [B, ...].
        fake: the fake score's clean estimate D_F at x_t.
        real: the teacher's, D_T.
        x_t: the noised sample, part of the graph.
        coefs: coefficients at t, expanded.
        r: density ratios [B], held constant.
        divergence: gives F.
        ratio: "exact" as above; "stopped" holds r constant, which biases the gradient.
        bounds: to which r is clipped; beyond them it is constant.

    Source: Uni-Instruct (Wang et al. 2025); the gradient is derived here.
    """
    gap = fake - real
    if ratio == "exact":
        rate = (coefs.alpha / coefs.sigma**2 * gap).detach()
        r = r * torch.exp(-(rate * (x_t - x_t.detach())).flatten(1).sum(dim=1))
    r = r.clamp(*bounds)
    cross = (gap * (fake - x_hat)).flatten(1).sum(dim=1)
    return divergence.rest(r) * sum_square(gap) - 2 * divergence.weight(r) * cross
