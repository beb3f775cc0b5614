"""The unbiased target of phased distribution matching on Gaussians and points, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.heads import HEADS
from stepdistill.diffusion.process import EDM, RF, VP, Coefs, Process, Trig
from stepdistill.losses.distribution import Renoise
from tests.helpers import MEAN, STD, descend, gaussian_clean, hermite2, scaled_linear

Z, E, W = hermite2(80)
NODES = hermite2(20)


def at(process: Process, t: float) -> Coefs:
    """Coefficients at one time, fp64 [1]."""
    return process.coefs(torch.tensor([t], dtype=torch.float64))


DATA_MEAN, DATA_STD, LOW, HIGH = 0.4, 0.7, 0.5, 0.75
SLOPE, INTERCEPT = 1.057956, -0.505796  # of the true flow at t = .75
BIASED_SLOPE, BIASED_INTERCEPT = 0.878157, -0.287816  # of the tempting target e - x_s


def line(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept of the regression of y on x; exact, as both are Gaussian."""
    mean_x, mean_y = (w * x).sum(), (w * y).sum()
    slope = (w * (x - mean_x) * (y - mean_y)).sum() / (w * (x - mean_x) ** 2).sum()
    return slope, mean_y - slope * mean_x


def noised(
    process: Process, low: float, high: float, mean: float, var: float
) -> tuple[Renoise, Tensor]:
    """The kernel from low to high, and samples at low of data N(mean, var)."""
    c = at(process, low)
    x_s = c.alpha * mean + (c.alpha**2 * var + c.sigma**2).sqrt() * Z
    return Renoise(c, at(process, high)), x_s


def test_phased_target_is_unbiased() -> None:
    kernel, x_s = noised(RF(), LOW, HIGH, DATA_MEAN, DATA_STD**2)
    assert float(kernel.scale) == pytest.approx(0.5)
    assert float(kernel.spread) == pytest.approx(0.70711, abs=5e-6)
    tau = kernel.target(HEADS["velocity"], x_s, E)
    torch.testing.assert_close(tau, 1.41421356237 * E - 2 * x_s)
    x_t = kernel.state(x_s, E)
    assert [float(v) for v in line(x_t, tau, W)] == pytest.approx([SLOPE, INTERCEPT], abs=1e-6)
    biased = [float(v) for v in line(x_t, E - x_s, W)]
    assert biased == pytest.approx([BIASED_SLOPE, BIASED_INTERCEPT], abs=1e-6)


@pytest.mark.parametrize("head", ["x0", "eps", "v", "velocity", "edm-f", "trig-f"])
@pytest.mark.parametrize(
    ("process", "low", "high"),
    [
        (RF(), LOW, HIGH),
        (Trig(sigma_data=1.0), 0.6, 1.1),  # a VP process in the angle
        (VP(scaled_linear()), 0.3, 0.8),
        (EDM(), 0.4, 1.5),
        (RF(), 0.0, 0.6),
    ],
    ids=["rf", "trig", "vp", "edm", "clean"],
)
def test_phased_target_of_every_head(process, low, high, head) -> None:
    """The regression on x_t is what a teacher of that head says of the data."""
    kernel, x_s = noised(process, low, high, DATA_MEAN, DATA_STD**2)
    x_t = kernel.state(x_s, E)
    target = kernel.target(HEADS[head], x_s, E, process.sigma_data)
    slope, intercept = line(x_t, target, W)
    c = kernel.at_t
    points = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x = gaussian_clean(points, c.alpha, c.sigma, DATA_MEAN, DATA_STD**2)
    z = (points - c.alpha * x) / c.sigma
    truth = HEADS[head].output(x, z, c, process.sigma_data)
    assert float(intercept) == pytest.approx(float(truth[0]), abs=1e-9)
    assert float(slope) == pytest.approx(float(truth[1] - truth[0]), abs=1e-9)


@pytest.mark.parametrize(
    ("x_t", "true", "biased"),
    [
        (-0.5, -0.899535, -0.649939),
        (0.2, -0.453074, -0.202587),
        (0.9, 0.000934, 0.249059),
    ],
)
def test_phased_target_on_four_points(x_t, true, biased) -> None:
    """Data uniform on {-1, 0, 1, 2}: E[target | x_t] by summing over x_s."""
    points = torch.tensor([-1.0, 0, 1, 2], dtype=torch.float64)
    x_s = torch.linspace(-8, 8, 40001, dtype=torch.float64)
    low = at(RF(), LOW)
    share = torch.exp(-0.5 * ((x_s[:, None] - low.alpha * points) / low.sigma) ** 2).sum(1)
    kernel = Renoise(low, at(RF(), HIGH))
    e = (x_t - kernel.scale * x_s) / kernel.spread
    share = share * torch.exp(-0.5 * e**2)
    share = share / share.sum()
    tau = kernel.target(HEADS["velocity"], x_s, e)
    assert float((share * tau).sum()) == pytest.approx(true, abs=1e-6)
    assert float((share * (e - x_s)).sum()) == pytest.approx(biased, abs=1e-6)
    c = kernel.at_t
    fit = torch.softmax(-0.5 * ((x_t - c.alpha * points) / c.sigma) ** 2, dim=0)
    flow = (x_t - float((fit * points).sum())) / HIGH
    assert float((share * tau).sum()) == pytest.approx(flow, abs=1e-9)


def test_phased_kernel_keeps_the_marginal() -> None:
    for process, low, high in ((RF(), 0.5, 0.9), (EDM(), 0.5, 3.0), (VP(scaled_linear()), 0.2, 1)):
        kernel, x_s = noised(process, low, high, DATA_MEAN, DATA_STD**2)
        x_t, c = kernel.state(x_s, E), kernel.at_t
        mean, var = float((W * x_t).sum()), float((W * x_t**2).sum() - (W * x_t).sum() ** 2)
        assert mean == pytest.approx(float(c.alpha) * DATA_MEAN, abs=1e-9)
        expected = float((c.alpha * DATA_STD) ** 2 + c.sigma**2)
        assert var == pytest.approx(expected, rel=1e-9)


def test_phased_kernel_from_clean_samples_is_the_plain_one() -> None:
    t = torch.linspace(0.02, 1, 64)
    rng = torch.Generator().manual_seed(0)
    x, e = torch.randn(64, generator=rng), torch.randn(64, generator=rng)
    kernel = Renoise(RF().coefs(torch.zeros(64)), RF().coefs(t))
    assert torch.equal(kernel.state(x, e), RF().noise(x, e, t))  # to the bit
    torch.testing.assert_close(kernel.target(HEADS["velocity"], x, e), e - x)
    for kind in ("ratio", "none"):
        assert torch.equal(kernel.weight(kind), torch.ones(64))


def test_weight_of_clean_samples_never_exceeds_one() -> None:
    """Below the bound of B, too: a time drawn very near 0 must not blow the loss up."""
    t = torch.tensor([1e-7, 1e-5, 1e-3, 0.5])
    kernel = Renoise(RF().coefs(torch.zeros(4)), RF().coefs(t))
    assert float(kernel.weight("ratio").max()) <= 1
    target = kernel.target(HEADS["velocity"], torch.zeros(4), torch.ones(4))
    assert float(target.abs().max()) <= 1


def test_phased_weights_tame_the_target_near_its_level() -> None:
    t = torch.tensor([0.5 + 1e-6, 0.55, 0.75, 1.0], dtype=torch.float64)
    kernel = Renoise(at(RF(), LOW), RF().coefs(t))
    square = kernel.spread**2
    assert float(square[0]) < 1e-5
    torch.testing.assert_close(kernel.weight("ratio"), square / t**2)
    torch.testing.assert_close(kernel.weight("clamp"), square * (1 / square).clamp_max(10))
    assert float((kernel.weight("clamp") / square).max()) <= 10 + 1e-9
    variance = (kernel.target(HEADS["velocity"], torch.zeros(1), torch.ones(1)).square()).double()
    for kind in ("ratio", "clamp"):
        assert float((kernel.weight(kind) * variance).max()) < 40
    assert float(variance.max()) > 1e4


def test_phased_gradient_is_that_of_the_kl_at_the_noisier_level() -> None:
    """w (v_T - v_F) with w = a_t A / (a_t s_t + s_t^2), against KL's finite difference."""
    kernel, x_s = noised(RF(), LOW, HIGH, DATA_MEAN, DATA_STD**2)
    c, mu = kernel.at_t, 0.3
    var = 1.3 * float((W * x_s**2).sum() - (W * x_s).sum() ** 2)
    x_t = kernel.state(mu + math.sqrt(var) * Z, E)
    fake = line(x_t, kernel.target(HEADS["velocity"], mu + math.sqrt(var) * Z, E), W)
    gap = (SLOPE * x_t + INTERCEPT) - (fake[0] * x_t + fake[1])
    weight = c.alpha * kernel.scale / (c.alpha * c.sigma + c.sigma**2)
    total = float(kernel.scale**2 * var + kernel.spread**2)
    goal = float((c.alpha * DATA_STD) ** 2 + c.sigma**2)
    shift = float(kernel.scale) * mu - float(c.alpha) * DATA_MEAN
    slope = float(kernel.scale) * shift / goal
    assert total > goal
    assert float((W * weight * gap).sum()) == pytest.approx(slope, abs=2e-6)


def phased_objective(
    times: list[float], low: float, flow: Callable[[Coefs, Tensor], Tensor], *, biased: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """A student mu + u z at ``low`` against a flow, with the fake regressed on the target."""
    z, e, w = NODES

    def loss(mu: Tensor, u: Tensor) -> Tensor:
        x_s, value = mu + u * z, torch.zeros((), dtype=torch.float64)
        frozen = x_s.detach()
        for t in times:
            kernel = Renoise(at(RF(), low), at(RF(), t))
            x_t = kernel.state(frozen, e)
            target = e - frozen if biased else kernel.target(HEADS["velocity"], frozen, e)
            slope, intercept = line(x_t, target, w)
            gap = flow(kernel.at_t, x_t) - (slope * x_t + intercept)
            value = value + (w * gap * x_s).sum() / len(times)
        return value

    return loss


@pytest.mark.parametrize(("biased", "expected"), [(False, (0.2, 0.3725)), (True, (0.3308, 0.2330))])
def test_phased_fixed_point_at_one_time(biased, expected) -> None:
    def flow(c: Coefs, x_t: Tensor) -> Tensor:
        return SLOPE * x_t + INTERCEPT

    objective = phased_objective([HIGH], LOW, flow, biased=biased)
    mu, u = descend(objective, (0.0, 0.5), 0.03, 600)
    assert (mu, u * u) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("biased", "expected"), [(False, (0.250, 0.820)), (True, (0.483, 0.808))])
def test_phased_limit_over_nested_times(biased, expected) -> None:
    """Teacher N(.5, 1.3^2), t from .53 to .97: the limit is the teacher's law at t = .5."""

    def flow(c: Coefs, x_t: Tensor) -> Tensor:
        x = gaussian_clean(x_t, c.alpha, c.sigma, MEAN, STD**2)
        return (x_t - c.alpha * x) / c.sigma - x

    times = torch.linspace(0.53, 0.97, 10).tolist()
    objective = phased_objective(times, LOW, flow, biased=biased)
    assert descend(objective, (0.0, 0.5), 0.03, 500) == pytest.approx(expected, abs=1e-3)
