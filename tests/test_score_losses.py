"""Distribution matching and score implicit matching on Gaussians, by quadrature in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.process import RF, Coefs
from stepdistill.losses.distance import L2, Distance, Power, PseudoHuber
from stepdistill.losses.gap import MeanAbs, Seen, product
from stepdistill.losses.implicit import Form, sim_loss
from stepdistill.losses.regression import pull
from stepdistill.losses.transport import Plain
from tests.helpers import MEAN, STD, descend, gaussian_clean, hermite2

Z, E, W = hermite2(80)


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


def huber(c: float, **keys: bool) -> PseudoHuber:
    """The distance with constant c on one dimension."""
    return PseudoHuber(scale=c, **keys)


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
    got = sim_gradient(
        0, 0.7, plain(0.8, 0.6), 0.5, 1.2, distance=huber(0.3), space="score", form=form
    )
    assert got == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    ("form", "expected"), [("score", (-0.05046, -0.08038)), ("full", (-0.04146, -0.07321))]
)
def test_l2_sim_is_twice_sid(form, expected) -> None:
    """alpha = 1 is the score form, alpha = 1/2 the full one."""
    got = sim_gradient(0.2, 1.1, plain(1, 1), MEAN, STD, distance=L2(), form=form)
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
    got = sim_gradient(0, 0.7, c, 0.5, 1.2, distance=huber(k), space="score", form="full")
    assert got == pytest.approx(slopes, abs=2e-5)


def test_detached_norm_is_another_gradient() -> None:
    """The normaliser depends on x_t, so holding it changes the gradient, not the value."""
    exact, held = (
        sim_gradient(0, 0.7, plain(0.8, 0.6), 0.5, 1.2, distance=huber(0.3, detach_norm=hold))
        for hold in (False, True)
    )
    assert abs(exact[1] - held[1]) > 0.05
    assert held[0] * exact[0] > 0


@pytest.mark.parametrize("form", ["score", "full"])
@pytest.mark.parametrize("distance", [PseudoHuber(), L2(), Power(), Power(p=1.0)])
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
    wide = 2 * 1e6 * sim_loss(x, fake, real, c, distance=huber(1e6))
    torch.testing.assert_close(wide, sim_loss(x, fake, real, c, distance=L2()), rtol=1e-9, atol=0)
    sharp = sim_loss(x, fake, real, c, distance=huber(1e-12))
    expected = ((real - fake).sign() * (fake - x)).flatten()
    torch.testing.assert_close(sharp, expected, rtol=1e-6, atol=1e-9)


def test_sim_norm_is_over_a_whole_sample() -> None:
    rng = torch.Generator().manual_seed(0)
    x, fake, real = (torch.randn(5, 2, 3, 3, generator=rng) for _ in range(3))
    gap = (fake - real).flatten(1)
    expected = -(gap * (fake - x).flatten(1)).sum(1) / (gap.square().sum(1) + 0.04).sqrt()
    c = Coefs(*(torch.ones(5, 1, 1, 1) for _ in range(4)))
    got = sim_loss(x, fake, real, c, distance=huber(0.2 / 18**0.5))
    torch.testing.assert_close(got, expected)


def dmd_direction(fake: Tensor, real: Tensor, reference: Tensor, **keys: float) -> Tensor:
    """The direction of ``dmd``: the plain gap under DMD's normaliser."""
    t = reference.new_zeros(len(reference))
    at = Coefs(t, t, t, t)
    seen = Seen(reference, reference, None, t, at, reference, fake, real)
    return product((MeanAbs(**keys),), seen) * Plain()(fake, real)


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
        loss = sim_loss(x, fake, real, c, distance=L2(), form=form) / 2
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


def sim_objective(distance: Distance, form: Form = "score") -> Callable[[Tensor, Tensor], Tensor]:
    def loss(mu: Tensor, u: Tensor) -> Tensor:
        x, fake, real, c, w = all_times(mu, u)
        flat = Coefs(*(p.expand_as(x).reshape(-1, 1) for p in vars(c).values()))
        x, fake, real = (v.reshape(-1, 1) for v in (x, fake, real))
        each = sim_loss(x, fake, real, flat, distance=distance, form=form)
        return (each * w.repeat(len(TIMES))).sum() / 10

    return loss


OBJECTIVES = {
    "dmd": dmd_objective,
    "sim": sim_objective(huber(0.1)),
    "sim-full": sim_objective(huber(0.1), "full"),
    "sim-l2": sim_objective(L2()),
    "sim-power": sim_objective(Power(p=1.5)),
    "sim-detached": sim_objective(huber(0.1, detach_norm=True)),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_exact_fake_score_leads_to_the_target(objective) -> None:
    assert descend(objective, (0.0, 0.5), 0.03, 800) == pytest.approx((MEAN, STD), abs=1e-3)
