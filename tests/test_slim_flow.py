"""SlimFlow's distillation against closed form: where one step rests between pairs and two steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import RF
from stepdistill.oracles.denoiser import Oracle
from stepdistill.run.rng import Rng
from stepdistill.trainers.flow.slim_flow import SECOND
from tests.helpers import make

MEAN, STD = 0.5, 1.3
GAIN = 0.9  # of the pairs: x = MEAN + GAIN z, as a biased solver would have made them


class OneStep(Denoiser):
    """A student whose only step leads to MEAN + gain z."""

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Its velocity at pure noise [B, 1]."""
        return (1 - self.net.gain) * x_t - MEAN


def slope_at(made, gain: float) -> float:
    """The loss's slope in the gain, over many samples."""
    net = nn.Module()
    net.gain = nn.Parameter(torch.tensor(gain))
    made.players["student"].denoiser = OneStep(net, RF(), "velocity", adapter=made.teacher.adapter)
    z = Rng(1).normal("pair", made.batch(0).index, (1,))
    batch = made.batch(0, x=MEAN + GAIN * z, z=z)
    (slope,) = torch.autograd.grad(made.distil(batch, Rng(0).at(0)).value, net.gain)
    return float(slope)


def rest() -> float:
    """The gain at which the pull of the pairs and that of the flow's second step are even.

    Of a student with gain a the flow's step at t has the gain k(t) ((1 - t) a + t), where
    k = 1 - t (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2); its mean over t and the pairs' gain have
    the student between them.
    """
    low, high = SECOND
    t = low + (high - low) * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    k = 1 - t * (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
    return float((GAIN + (k * t).mean()) / (2 - (k * (1 - t)).mean()))


def test_distillation_rests_between_the_pairs_and_the_flow_s_second_step() -> None:
    teacher = Oracle(RF(), "velocity", torch.tensor([[MEAN]]), STD)
    made = make("slim_flow", teacher, stage="distil", batch_size=65536)
    a, b = slope_at(made, 0.8), slope_at(made, 1.4)
    assert a < 0 < b
    assert 0.8 - a * 0.6 / (b - a) == pytest.approx(rest(), abs=5e-3)
    assert abs(rest() - GAIN) > 0.05 and abs(rest() - STD) > 0.05  # neither alone is the answer
