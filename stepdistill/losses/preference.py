"""Preferences among the states that one step of a stochastic sampler may lead to."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from stepdistill.diffusion.process import expand
from stepdistill.losses.regression import sum_square


def log_ratio(y: Tensor, mean: Tensor, reference: Tensor, spread: Tensor) -> Tensor:
    """log N(y; mean, spread^2) - log N(y; reference, spread^2) of states y [B, ...]: [B].

    ``spread`` [B] is the standard deviation of the step's noise.
    """
    scale = expand(1 / spread, y)
    return 0.5 * (sum_square(scale * (y - reference)) - sum_square(scale * (y - mean)))


def preference_loss(
    best: Tensor, worst: Tensor, mean: Tensor, reference: Tensor, spread: Tensor, beta: float
) -> Tensor:
    """-log sigmoid(beta H) [B], with H the log ratio of the best state less that of the worst.

    Args:
        best: the preferred state after the step [B, ...].
        worst: the state that is not.
        mean: the step's mean, part of the graph.
        reference: that of the policy which the student is to stay near.
        spread: standard deviation of the step's noise [B].
        beta: how sharply preferences count.

    Source: direct preference optimisation of diffusion models (Wallace et al. 2023), at one step.
    """
    ratios = (log_ratio(y, mean, reference, spread) for y in (best, worst))
    return -logsigmoid(beta * (next(ratios) - next(ratios)))
