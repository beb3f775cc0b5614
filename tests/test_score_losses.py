"""Distribution matching and score implicit matching on Gaussians, by quadrature in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.heads import HEADS
from stepdistill.diffusion.process import EDM, RF, VP, Coefs, Process, Trig
from stepdistill.losses.distribution import Renoise, dmd_direction
from stepdistill.losses.implicit import sim_loss
from stepdistill.losses.regression import pull
from tests.helpers import MEAN, STD, gaussian_clean, hermite2, scaled_linear

Z, E, W = hermite2(80)


def at(process: Process, t: float) -> Coefs:
    """Coefficients at one time, fp64 [1]."""
    return process.coefs(torch.tensor([t], dtype=torch.float64))


def plain(alpha: float, sigma: float) -> Coefs:
    """Coefficients given outright, without derivatives."""
    parts = (torch.tensor([[value]], dtype=torch.float64) for value in (alpha, sigma, 0, 0))
    return Coefs(*parts)


def student(mu: float, u: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sample mu + u Z [N, 1] and its leaves."""
    mu_, u_ = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mu, u))
    return (mu_ + u_ * Z)[:, None], mu_, u_


def estimates(
    x: Tensor, c: Coefs, mu: float, u: float, mean: float, std: float
) -> tuple[Tensor, Tensor]:
    """Exact fake and real clean estimates at the noised x; differentiable in x alone."""
    x_t = c.alpha * x + c.sigma * E[:, None]
    fake = gaussian_clean(x_t, c.alpha, c.sigma, mu, u * u)
    return fake, gaussian_clean(x_t, c.alpha, c.sigma, mean, std * std)


# The two engines against published gradients ------------------------------------------------


def sim_gradient(
    mu: float, u: float, coefs: Coefs, mean: float, std: float, **keys: object
) -> tuple[float, float]:
    x, mu_, u_ = student(mu, u)
    fake, real = estimates(x, coefs, mu, u, mean, std)
    (W * sim_loss(x, fake, real, coefs, **keys)).sum().backward()
    return float(mu_.grad), float(u_.grad)


@pytest.mark.parametrize(
    ("form", "expected"), [("score", (-0.42292, -0.98889)), ("full", (-0.22229, -0.75432))]
)
def test_sim_gradient(form, expected) -> None:
    got = sim_gradient(0, 0.7, plain(0.8, 0.6), 0.5, 1.2, c=0.3, space="score", form=form)
    assert got == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    ("form", "expected"), [("score", (-0.05046, -0.08038)), ("full", (-0.04146, -0.07321))]
)
def test_l2_sim_is_twice_sid(form, expected) -> None:
    """alpha = 1 is the score form, alpha = 1/2 the full one."""
    got = sim_gradient(0.2, 1.1, plain(1, 1), MEAN, STD, distance="l2", form=form)
    assert tuple(g / 2 for g in got) == pytest.approx(expected, abs=1e-5)


def test_sim_full_is_the_total_derivative() -> None:
    """Against finite differences of E d(y), with the fake score following the student."""
    c, k = plain(0.8, 0.6), 0.3

    def value(mu: float, u: float) -> float:
        x, _, _ = student(mu, u)
        fake, real = estimates(x, c, mu, u, 0.5, 1.2)
        y = c.alpha / c.sigma**2 * (fake - real)
        return float((W * ((y**2 + k * k).sqrt() - k).flatten()).sum().detach())

    step = 1e-5
    slopes = (
        (value(step, 0.7) - value(-step, 0.7)) / (2 * step),
        (value(0, 0.7 + step) - value(0, 0.7 - step)) / (2 * step),
    )
    got = sim_gradient(0, 0.7, c, 0.5, 1.2, c=k, space="score", form="full")
    assert got == pytest.approx(slopes, abs=2e-5)


def test_detached_norm_is_another_gradient() -> None:
    """The normaliser depends on x_t, so holding it changes the gradient, not the value."""
    exact = sim_gradient(0, 0.7, plain(0.8, 0.6), 0.5, 1.2, c=0.3)
    held = sim_gradient(0, 0.7, plain(0.8, 0.6), 0.5, 1.2, c=0.3, detach_norm=True)
    assert abs(exact[1] - held[1]) > 0.05
    assert held[0] * exact[0] > 0


@pytest.mark.parametrize("form", ["score", "full"])
@pytest.mark.parametrize("distance", ["pseudo_huber", "l2"])
@pytest.mark.parametrize("space", ["x0", "score"])
def test_sim_is_exactly_zero_where_the_scores_agree(form, distance, space) -> None:
    x, mu_, u_ = student(MEAN, STD)
    fake, real = estimates(x, plain(0.8, 0.6), MEAN, STD, MEAN, STD)
    c = plain(0.8, 0.6)
    loss = sim_loss(x, fake, real, c, distance=distance, space=space, form=form)
    assert not loss.any()  # every sample, not just their mean
    (slope,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    assert not slope.any()


def test_sim_limits_of_the_constant() -> None:
    c = plain(0.8, 0.6)
    x, _, _ = student(0.2, 1.1)
    fake, real = estimates(x, c, 0.2, 1.1, MEAN, STD)
    wide = 2 * 1e6 * sim_loss(x, fake, real, c, c=1e6)
    torch.testing.assert_close(wide, sim_loss(x, fake, real, c, distance="l2"), rtol=1e-9, atol=0)
    sharp = sim_loss(x, fake, real, c, c=1e-12)
    expected = ((real - fake).sign() * (fake - x)).flatten()
    torch.testing.assert_close(sharp, expected, rtol=1e-6, atol=1e-9)


def test_sim_norm_is_over_a_whole_sample() -> None:
    rng = torch.Generator().manual_seed(0)
    x, fake, real = (torch.randn(5, 2, 3, 3, generator=rng) for _ in range(3))
    gap = (fake - real).flatten(1)
    expected = -(gap * (fake - x).flatten(1)).sum(1) / (gap.square().sum(1) + 0.04).sqrt()
    c = Coefs(*(torch.ones(5, 1, 1, 1) for _ in range(4)))
    torch.testing.assert_close(sim_loss(x, fake, real, c, c=0.2), expected)


BENCH = (-0.133185, -0.132246)  # KL(p_t || q_t) at a = .8, s = .6, student (.2, 1.1)


def dmd_gradient(mu: float, u: float, c: Coefs) -> tuple[float, float]:
    """KL's gradient from DMD's direction, its normaliser undone."""
    x, mu_, u_ = student(mu, u)
    with torch.no_grad():
        fake, real = estimates(x, c, mu, u, MEAN, STD)
        size = (x - real).abs()
        weight = (W * size.flatten() * (c.alpha**2 / c.sigma**2).flatten()).flatten()
    direction = dmd_direction(fake, real, x.detach(), floor=1e-12)
    (weight * pull(x, direction)).sum().backward()
    return float(mu_.grad), float(u_.grad)


def test_dmd_gradient_is_that_of_the_kl() -> None:
    assert dmd_gradient(0.2, 1.1, plain(0.8, 0.6)) == pytest.approx(BENCH, abs=1e-6)


def test_implicit_loss_under_no_grad_is_dmd() -> None:
    """With frozen estimates the implicit loss pulls along D_F - D_T, whatever its form."""
    c = plain(0.8, 0.6)
    for form in ("score", "full"):
        x, mu_, u_ = student(0.2, 1.1)
        with torch.no_grad():
            fake, real = estimates(x, c, 0.2, 1.1, MEAN, STD)
        loss = sim_loss(x, fake, real, c, distance="l2", form=form) / 2
        (0.64 / 0.36 * W * loss).sum().backward()
        assert (float(mu_.grad), float(u_.grad)) == pytest.approx(BENCH, abs=1e-6)


def test_dmd_normaliser_is_one_number_a_sample() -> None:
    rng = torch.Generator().manual_seed(0)
    fake, real, x = (torch.randn(3, 2, 4, 4, generator=rng) for _ in range(3))
    direction = dmd_direction(fake, real, x)
    for i in range(3):
        expected = (fake[i] - real[i]) / (x[i] - real[i]).abs().mean()
        torch.testing.assert_close(direction[i], expected)
    assert dmd_direction(fake, real, real).isfinite().all()


def test_pull_s_gradient_is_the_direction() -> None:
    rng = torch.Generator().manual_seed(0)
    x, direction = torch.randn(3, 2, 2, generator=rng), torch.randn(3, 2, 2, generator=rng)
    x.requires_grad_()
    loss = pull(x, direction)
    loss.sum().backward()
    torch.testing.assert_close(x.grad, direction)
    torch.testing.assert_close(loss, 0.5 * direction.flatten(1).square().sum(1))


# Convergence with an exact fake score -------------------------------------------------------

NODES = hermite2(20)
TIMES = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)


def descend(
    loss: Callable[[Tensor, Tensor], Tensor], start: tuple[float, float], lr: float, steps: int
) -> tuple[float, float]:
    """Follow the gradient of loss(mu, u), which freezes what it should, by Adam to rest."""
    mu, u = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in start)
    optimizer = torch.optim.Adam([mu, u], lr=lr, betas=(0.0, 0.999))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss(mu, u).backward()
        optimizer.step()
    return float(mu.detach()), abs(float(u.detach()))


def all_times(mu: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Coefs, Tensor]:
    """x, fake, real [10, N], coefficients [10, 1] and weights [N] at ten times of the flow."""
    z, e, w = NODES
    parts = RF().coefs(TIMES)
    c = Coefs(*(p[:, None] for p in vars(parts).values()))
    x = (mu + u * z).expand(len(TIMES), -1)
    x_t = c.alpha * x + c.sigma * e
    fake = gaussian_clean(x_t, c.alpha, c.sigma, mu.detach(), u.detach() ** 2)
    return x, fake, gaussian_clean(x_t, c.alpha, c.sigma, MEAN, STD**2), c, w


def dmd_objective(mu: Tensor, u: Tensor) -> Tensor:
    """One "image" a time, whose pixels are the quadrature's nodes."""
    x, fake, real, _, w = all_times(mu, u)
    direction = dmd_direction(fake.detach(), real.detach(), x.detach())
    return ((x * direction) * w).sum() / len(TIMES)


def sim_objective(**keys: object) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(mu: Tensor, u: Tensor) -> Tensor:
        x, fake, real, c, w = all_times(mu, u)
        flat = Coefs(*(p.expand_as(x).reshape(-1, 1) for p in vars(c).values()))
        x, fake, real = (v.reshape(-1, 1) for v in (x, fake, real))
        return (sim_loss(x, fake, real, flat, c=0.1, **keys) * w.repeat(len(TIMES))).sum() / 10

    return loss


OBJECTIVES = {
    "dmd": dmd_objective,
    "sim": sim_objective(),
    "sim-full": sim_objective(form="full"),
    "sim-l2": sim_objective(distance="l2"),
    "sim-detached": sim_objective(detach_norm=True),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_exact_fake_score_leads_to_the_target(objective) -> None:
    assert descend(objective, (0.0, 0.5), 0.03, 800) == pytest.approx((MEAN, STD), abs=1e-3)


# Phased targets -----------------------------------------------------------------------------

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
