"""Weights: factors of the gap of two scores, by which it becomes the direction of a sample.

A direction is transport(fake, real) times the product of weights. A new weight is a subclass with
``__call__``; a config names it by ``kind: FILE.py:CLASS``.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.process import Coefs, expand
from stepdistill.losses.reward import Reward as AnyReward
from stepdistill.losses.reward import rewards
from stepdistill.run.plug import Plug, Plugged


@dataclass(frozen=True)
class Seen:
    """What a comparison of teacher and fake score has at hand; weights see it without a graph.

    Args:
        x: the student's sample [B, ...].
        reference: the clean estimate that it came from.
        label: classes [B], or None.
        t: times [B] at which it was noised.
        coefs: the process's coefficients there, expanded.
        x_t: the noised sample.
        fake: the fake score's clean estimate.
        real: the teacher's, guided if it is.
        ratio: density of the data over the student's at x_t [B], by the adversarial head, or None.
    """

    x: Tensor
    reference: Tensor
    label: Tensor | None
    t: Tensor
    coefs: Coefs
    x_t: Tensor
    fake: Tensor
    real: Tensor
    ratio: Tensor | None = None


class Weight(Plug):
    """A factor of the direction."""

    @abstractmethod
    def __call__(self, seen: Seen) -> Tensor:
        """Factors that broadcast against the sample [B, ...]."""


class MeanAbs(Weight):
    """DMD's normaliser, 1 / mean|reference - D_T| of each sample (DMD2, Yin et al. 2024)."""

    floor: float = Field(1e-4, gt=0, description="lower bound of that mean")

    def __call__(self, seen: Seen) -> Tensor:
        """See :class:`Weight`."""
        size = (seen.reference - seen.real).abs().flatten(1).mean(dim=1).clamp_min(self.floor)
        return expand(1 / size, seen.x)


class Vsd(Weight):
    """alpha sigma: VSD's sigma^2 (eps_F - eps_T), turned to clean estimates (SwiftBrush)."""

    def __call__(self, seen: Seen) -> Tensor:
        """See :class:`Weight`."""
        return seen.coefs.alpha * seen.coefs.sigma


class Kl(Weight):
    """alpha^2 / sigma^2: the exact gradient of KL(p_t || q_t) in a clean sample."""

    def __call__(self, seen: Seen) -> Tensor:
        """See :class:`Weight`."""
        return (seen.coefs.alpha / seen.coefs.sigma) ** 2


class Reward(Weight):
    """exp(beta (reward - centre) / scale) of each sample, clipped (Stream-R1).

    Here: the reward's centre and scale are constants, where Stream-R1 has running statistics, and
    weights are not brought to a mean of 1 in the batch: a sample's does not depend on the others.
    There is one reward: no fusion of several axes, and no penalty for their imbalance.
    """

    reward: Plugged[AnyReward] = Field(description="of the clean estimate")
    beta: float = Field(1.0, description="sharpness; 0: every sample weighs 1")
    centre: float = Field(0.0, description="the reward that weighs 1")
    scale: float = Field(1.0, gt=0, description="the reward's unit")
    low: float = Field(0.2, gt=0, le=1, description="least weight")
    high: float = Field(5.0, ge=1, description="greatest weight")

    def __call__(self, seen: Seen) -> Tensor:
        """See :class:`Weight`."""
        value = rewards(self.reward, seen.reference, seen.label)
        weight = (self.beta * (value - self.centre) / self.scale).exp()
        return expand(weight.clamp(self.low, self.high), seen.x)


class Saliency(Weight):
    """Where in a sample the reward's gradient is large, with mean 1 in each sample (Stream-R1).

    floor + (1 - floor) S / max S, S the gradient's mean size over the channels of a position. Here:
    positions of all axes are alike, where Stream-R1 weighs time and space apart.
    """

    reward: Plugged[AnyReward] = Field(description="of the clean estimate")
    floor: float = Field(0.15, ge=0, le=1, description="weight where it is 0; 1: all weigh 1")

    def __call__(self, seen: Seen) -> Tensor:
        """See :class:`Weight`."""
        leaf = seen.reference.detach().requires_grad_()
        with torch.enable_grad():
            value = rewards(self.reward, leaf, seen.label, slope=True)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        size = slope.float().abs()
        size = size.mean(dim=1, keepdim=True) if size.dim() > 2 else size
        most = expand(size.flatten(1).amax(dim=1), size)
        share = torch.where(most > 0, size / most, 1.0)
        weight = self.floor + (1 - self.floor) * share
        return weight / expand(weight.flatten(1).mean(dim=1), weight)


class Likelihood(Weight):
    """g^2 alpha^2 / (2 sigma^4), g the process's diffusion: over even times, what adds up to the
    divergence of the clean laws themselves (Uni-Instruct; KL for SiD's alpha = 1/2).

    It grows without bound towards t = 0; give ``student_t`` a lower end.
    """

    def __call__(self, seen: Seen) -> Tensor:
        """See :class:`Weight`."""
        c = seen.coefs
        half = c.sigma * (c.d_sigma - c.sigma * c.d_alpha / c.alpha)  # g^2 / 2
        return half * c.alpha**2 / c.sigma**4


def product(weights: tuple[Weight, ...], seen: Seen) -> Tensor:
    """The product of weights, as factors of the sample; 1 of none."""
    out = expand(torch.ones_like(seen.t), seen.x)
    for weight in weights:
        out = out * weight(seen)
    return out
