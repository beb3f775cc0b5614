"""SIM with any distance, SiD and Uni-Instruct on Gaussians, by quadrature in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.process import EDM, RF, VP, Coefs
from stepdistill.losses.distance import L2, Distance, Huber, Power, PseudoHuber
from stepdistill.losses.divergence import (
    ChiSquare,
    Divergence,
    ForwardKl,
    Jeffreys,
    JensenShannon,
    Neyman,
    ReverseKl,
    SoftenedReverseKl,
    SquaredHellinger,
)
from stepdistill.losses.gap import Likelihood, Seen
from stepdistill.losses.implicit import sid_loss, sim_loss, uni_loss
from stepdistill.run.errors import UserError
from tests.helpers import MEAN, STD, descend, gaussian_clean, hermite2, scaled_linear
from tests.test_score_losses import E, W, all_times, estimates, plain, student

MU, U = 0.2, 1.1  # the student of the spec's tables
WIDE = (1e-12, 1e12)
BUILT_IN = (
    PseudoHuber(),
    PseudoHuber(scale=0.3),
    Huber(),
    Huber(c=0.5),
    L2(),
    Power(),
    Power(p=1.0),
    Power(p=3.0),
)


class LogCosh(Distance):
    """A user's own: only d(y) is written."""

    def __call__(self, y: Tensor) -> Tensor:
        """Sum of log cosh."""
        return torch.log(torch.cosh(y)).flatten(1).sum(dim=1)


def differences(dtype: torch.dtype = torch.float64) -> Tensor:
    """Differences [5, 2, 3] of sizes from 0.1 to 2."""
    y = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (y * torch.tensor([0.1, 0.3, 0.6, 1.0, 2.0], dtype=torch.float64)[:, None, None]).to(
        dtype
    )


# Distances ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", BUILT_IN, ids=repr)
def test_closed_slopes_are_those_of_autograd(distance) -> None:
    """The slope itself, and its own derivative along a direction."""
    y, along = differences().requires_grad_(), differences().flip(0)
    closed, generic = distance.slope(y), Distance.slope(distance, y)
    torch.testing.assert_close(closed, generic, rtol=1e-12, atol=1e-14)
    (one,) = torch.autograd.grad(closed, y, along)
    (two,) = torch.autograd.grad(generic, y, along)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distance", [*BUILT_IN, LogCosh()], ids=repr)
def test_distances_are_zero_at_zero_alone_and_of_each_sample(distance) -> None:
    y = differences()
    assert (distance(y) > 0).all() and distance(y).shape == (5,)
    torch.testing.assert_close(distance(y[2:3]), distance(y)[2:3])
    torch.testing.assert_close(distance.slope(y[2:3]), distance.slope(y)[2:3])
    zero = torch.zeros(2, 3, requires_grad=True)
    slope = distance.slope(zero)
    assert not distance(zero).any() and not slope.any()
    (second,) = torch.autograd.grad(slope.sum() + distance(zero).sum(), zero)
    assert second.isfinite().all()


def test_a_slope_is_constant_where_its_difference_is() -> None:
    with torch.no_grad():
        slope = LogCosh().slope(differences())
    assert not slope.requires_grad
    torch.testing.assert_close(slope, differences().tanh())
    y = differences().requires_grad_()
    (second,) = torch.autograd.grad(LogCosh().slope(y).sum(), y)
    torch.testing.assert_close(second, 1 - differences().tanh() ** 2)


def test_powers_have_the_other_distances_as_limits() -> None:
    y = differences()
    torch.testing.assert_close(Power(p=2.0).slope(y), L2().slope(y))
    torch.testing.assert_close(Power(p=2.0)(y), L2()(y))
    sharp = PseudoHuber(scale=1e-9)
    torch.testing.assert_close(Power(p=1.0).slope(y), sharp.slope(y))
    length = Power(p=1.0).slope(y).flatten(1).norm(dim=1)
    torch.testing.assert_close(length, torch.ones_like(length))


def test_distances_that_make_no_sense_are_refused_in_one_line() -> None:
    class Batched(Distance):
        def __call__(self, y: Tensor) -> Tensor:
            return y.square().sum()

    class Flat(Distance):
        def __call__(self, y: Tensor) -> Tensor:
            return torch.ones(len(y))

    with pytest.raises(
        UserError, match=r"^distance: batched gives values of shape \[\] for .*one number a sample"
    ):
        Batched().slope(differences())
    with pytest.raises(UserError, match="flat has no gradient"):
        Flat().slope(differences())


def test_sim_with_a_distance_of_one_s_own_is_its_total_derivative() -> None:
    """SIM's "full" form with log cosh against finite differences of E d(y), the fake score
    following the student; and its "score" form in closed terms."""
    c = plain(0.8, 0.6)

    def value(mu: float, u: float) -> float:
        x, _, _ = student(mu, u)
        fake, real = estimates(x, c, mu, u, MEAN, STD)
        return float((W * LogCosh()(c.alpha / c.sigma**2 * (fake - real))).sum().detach())

    x, mu, u = student(MU, U)
    fake, real = estimates(x, c, MU, U, MEAN, STD)
    keys = {"distance": LogCosh(), "space": "score"}
    (W * sim_loss(x, fake, real, c, form="full", **keys)).sum().backward()
    step = 1e-5
    slopes = (
        (value(MU + step, U) - value(MU - step, U)) / (2 * step),
        (value(MU, U + step) - value(MU, U - step)) / (2 * step),
    )
    assert (float(mu.grad), float(u.grad)) == pytest.approx(slopes, abs=2e-6)
    rate = c.alpha / c.sigma**2
    expected = -((rate * (fake - real)).tanh() * rate * (fake - x)).flatten()
    torch.testing.assert_close(sim_loss(x, fake, real, c, **keys), expected)


# SiD ----------------------------------------------------------------------------------------------

SID = {
    0.0: (-0.03245, -0.06603),
    0.5: (-0.04146, -0.07321),
    1.0: (-0.05046, -0.08038),
    1.2: (-0.05407, -0.08324),
}


def sid_gradient(alpha: float, mean: float = MEAN, std: float = STD) -> tuple[float, float]:
    """At sigma = 1 of EDM, without the normaliser."""
    x, mu, u = student(MU, U)
    fake, real = estimates(x, plain(1, 1), MU, U, mean, std)
    (W * sid_loss(x, fake, real, alpha)).sum().backward()
    return float(mu.grad), float(u.grad)


@pytest.mark.parametrize(("alpha", "expected"), SID.items())
def test_sid_gradient(alpha, expected) -> None:
    assert sid_gradient(alpha) == pytest.approx(expected, abs=1e-5)
    assert sid_gradient(alpha, MU, U) == (0.0, 0.0)


def pictures() -> tuple[Tensor, Tensor, Tensor]:
    """x, fake and real [4, 1, 3, 3], of which the latter two depend on x."""
    rng = torch.Generator().manual_seed(1)
    x, a, b = (torch.randn(4, 1, 3, 3, generator=rng).double() for _ in range(3))
    x.requires_grad_()
    return x, torch.sin(x) + a, torch.cos(x * b)


@pytest.mark.parametrize(("alpha", "form"), [(1.0, "score"), (0.5, "full")])
def test_sid_is_half_of_sim_with_l2_to_the_bit(alpha, form) -> None:
    x, fake, real = pictures()
    sid = sid_loss(x, fake, real, alpha)
    sim = sim_loss(x, fake, real, plain(0.8, 0.6), distance=L2(), form=form)
    slopes = [torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in (2 * sid, sim)]
    assert torch.equal(2 * sid, sim) if alpha == 1 else torch.allclose(2 * sid, sim, rtol=1e-6)
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-6)
    assert torch.equal(*slopes) or alpha != 1


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.2])
def test_sid_is_its_code_s_form(alpha) -> None:
    """(D_T - D_F) ((D_T - x) - alpha (D_T - D_F)), summed."""
    x, fake, real = pictures()
    expected = ((real - fake) * ((real - x) - alpha * (real - fake))).flatten(1).sum(1)
    torch.testing.assert_close(sid_loss(x, fake, real, alpha), expected)


# Uni-Instruct -------------------------------------------------------------------------------------

F_OF: dict[str, tuple[Divergence, Callable[[Tensor], Tensor]]] = {
    "reverse KL": (ReverseKl(), lambda r: -r.log()),
    "forward KL": (ForwardKl(), lambda r: r * r.log()),
    "chi square": (ChiSquare(), lambda r: (r - 1) ** 2),
    "Jensen-Shannon": (
        JensenShannon(),
        lambda r: (r * r.log() - (r + 1) * ((r + 1) / 2).log()) / 2,
    ),
    "Jeffreys": (Jeffreys(), lambda r: (r - 1) * r.log()),
    "softened": (SoftenedReverseKl(), lambda r: (r + 1) * ((r + 1) / r).log()),
    "Neyman": (Neyman(), lambda r: (1 - r) ** 2 / r / 2),
    "Hellinger": (SquaredHellinger(), lambda r: 2 * (1 - r.sqrt()) ** 2),
}
VALUES = {
    "reverse KL": 0.051669,
    "forward KL": 0.068483,
    "chi square": 0.232321,
    "Jensen-Shannon": 0.014240,
}
GRADIENTS = {
    "reverse KL": (-0.17751, -0.25820),
    "forward KL": (-0.24793, -0.42825),
    "Jensen-Shannon": (-0.049192, -0.075462),
}
NODES, POINTS = np.polynomial.legendre.leggauss(48)
LOG_S = torch.from_numpy(math.log(1e-4) + (NODES + 1) / 2 * math.log(2000 / 1e-4))
STEP = torch.from_numpy(POINTS / 2 * math.log(2000 / 1e-4))


@pytest.mark.parametrize("name", F_OF)
def test_a_weight_is_r_squared_times_the_second_derivative(name) -> None:
    """F = r^2 f'', and F - r F', both of which carry a graph where r does."""
    divergence, f = F_OF[name]
    r = torch.tensor([0.2, 0.9, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    (one,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    (two,) = torch.autograd.grad(one.sum(), r, create_graph=True)
    torch.testing.assert_close(divergence.weight(r), r**2 * two)
    (three,) = torch.autograd.grad((r**2 * two).sum(), r, create_graph=True)
    torch.testing.assert_close(divergence.rest(r), r**2 * two - r * three)
    (a,) = torch.autograd.grad((r**2 * two - r * three).sum(), r)
    rest = divergence.rest(r)
    b = torch.autograd.grad(rest.sum(), r)[0] if rest.requires_grad else torch.zeros_like(r)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert not divergence.rest(r.detach()).requires_grad


def log_ratio(x_t: Tensor, c: Coefs, mu: float, u: float) -> Tensor:
    """log q_t / p_t of the target over the student, both noised."""
    parts = []
    for mean, std in ((MEAN, STD), (mu, u)):
        var = c.alpha**2 * std**2 + c.sigma**2
        parts.append(-0.5 * (x_t - c.alpha * mean) ** 2 / var - 0.5 * torch.log(var))
    return parts[0] - parts[1]


def along_diffusion() -> tuple[Tensor, Tensor, Coefs, Tensor, Tensor, Tensor]:
    """Normals [N, 1] and coefficients [N, 1] over all noise levels of EDM; weights [N] of a level's
    g^2 / 2 ds and of the exact loss."""
    z, e, w = hermite2(40)
    s = LOG_S.exp()
    z, e, w = (v.repeat(len(s)) for v in (z, e, w))
    each = s.repeat_interleave(1600)[:, None]
    ds = (STEP * s).repeat_interleave(1600)
    c = Coefs(*(p.expand_as(each) for p in vars(EDM().coefs(each)).values()))
    half = w * ds * each[:, 0]  # E over noise, g^2 / 2 ds = s ds
    return z[:, None], e[:, None], c, half, half * (c.alpha**2 / c.sigma**4)[:, 0], ds * w


@pytest.mark.parametrize("name", VALUES)
def test_a_divergence_is_the_sum_of_score_gaps_along_diffusion(name) -> None:
    z, e, c, half, _, _ = along_diffusion()
    x_t = MU + U * z + c.sigma * e
    fake = gaussian_clean(x_t, c.alpha, c.sigma, MU, U * U)
    real = gaussian_clean(x_t, c.alpha, c.sigma, MEAN, STD**2)
    gap = (c.alpha / c.sigma**2 * (fake - real)).flatten()
    r = log_ratio(x_t, c, MU, U).exp().flatten()
    divergence, f = F_OF[name]
    found = float((half * divergence.weight(r) * gap**2).sum())
    x, _, _ = student(MU, U)
    clean = log_ratio(x.detach(), plain(1, 0), MU, U).exp().flatten()
    assert float((W * f(clean)).sum()) == pytest.approx(VALUES[name], abs=2e-6)
    assert found == pytest.approx(VALUES[name], abs=2e-5)


def uni_gradient(divergence: Divergence, ratio: str, seen: str = "held") -> tuple[float, float]:
    """Of the loss summed along diffusion; with "open" the ratio's own graph is used."""
    z, e, c, _, weight, _ = along_diffusion()
    mu, u = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (MU, U))
    x = mu + u * z
    x_t = x + c.sigma * e
    fake = gaussian_clean(x_t, c.alpha, c.sigma, MU, U * U)
    real = gaussian_clean(x_t, c.alpha, c.sigma, MEAN, STD**2)
    r = log_ratio(x_t, c, MU, U).exp().flatten()
    r = r if seen == "open" else r.detach()
    loss = uni_loss(x, fake, real, x_t, c, r, divergence=divergence, ratio=ratio, bounds=WIDE)
    (weight * loss).sum().backward()
    return float(mu.grad), float(u.grad)


@pytest.mark.parametrize("name", GRADIENTS)
def test_uni_instruct_gradient_is_the_divergence_s(name) -> None:
    got = uni_gradient(F_OF[name][0], "exact")
    assert got == pytest.approx(GRADIENTS[name], abs=2e-5)


@pytest.mark.parametrize("name", ["forward KL", "chi square", "Jensen-Shannon"])
def test_the_linearised_ratio_has_the_ratio_s_own_gradient(name) -> None:
    divergence = F_OF[name][0]
    exact = uni_gradient(divergence, "exact")
    assert exact == pytest.approx(uni_gradient(divergence, "stopped", "open"), rel=1e-8)


def test_a_stopped_ratio_is_biased() -> None:
    """In the spread alone, on Gaussians."""
    exact, stopped = (uni_gradient(ForwardKl(), ratio) for ratio in ("exact", "stopped"))
    assert exact == pytest.approx((-0.24793, -0.42825), abs=2e-5)
    assert stopped == pytest.approx((-0.24793, -0.3575), abs=1e-4)


def two_levels() -> tuple[Tensor, Tensor, Tensor, Tensor, Coefs]:
    """x, x_t, fake, real [N, 1] at one level."""
    c = plain(0.8, 0.6)
    x, _, _ = student(MU, U)
    x_t = c.alpha * x + c.sigma * E[:, None]
    fake = gaussian_clean(x_t, c.alpha, c.sigma, MU, U * U)
    return x, x_t, fake, gaussian_clean(x_t, c.alpha, c.sigma, MEAN, STD**2), c


@pytest.mark.parametrize("ratio", ["exact", "stopped"])
def test_uni_instruct_with_the_reverse_kl_is_sid_at_one_half(ratio) -> None:
    x, x_t, fake, real, c = two_levels()
    r = torch.full_like(x_t.flatten(), 3.0)
    uni = uni_loss(x, fake, real, x_t, c, r, divergence=ReverseKl(), ratio=ratio)
    torch.testing.assert_close(uni, 2 * sid_loss(x, fake, real, 0.5), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        uni, sim_loss(x, fake, real, c, distance=L2(), form="full"), rtol=1e-12, atol=1e-14
    )


def test_uni_instruct_with_the_forward_kl_is_sim_weighted_by_the_ratio() -> None:
    """Without a term of the squared gap; and the ratio is clipped, where it is constant."""
    x, x_t, fake, real, c = two_levels()
    r = log_ratio(x_t, c, MU, U).exp().flatten().detach()
    keys = {"divergence": ForwardKl(), "ratio": "stopped", "bounds": (0.95, 1.2)}
    uni = uni_loss(x, fake, real, x_t, c, r, **keys)
    assert (r < 0.95).any() and (r > 1.2).any()
    sim = sim_loss(x, fake, real, c, distance=L2())
    torch.testing.assert_close(uni, r.clamp(0.95, 1.2) * sim)
    out = (r < 0.95) | (r > 1.2)
    slopes = [
        torch.autograd.grad(
            uni_loss(x, fake, real, x_t, c, r, **{**keys, "ratio": ratio}).sum(),
            x,
            retain_graph=True,
        )[0].flatten()
        for ratio in ("stopped", "exact")
    ]
    torch.testing.assert_close(slopes[0][out], slopes[1][out])
    assert not torch.allclose(slopes[0][~out], slopes[1][~out])


@pytest.mark.parametrize("divergence", [ForwardKl(), JensenShannon(), ChiSquare()], ids=repr)
def test_uni_instruct_is_exactly_zero_where_the_scores_agree(divergence) -> None:
    x, x_t, fake, _, c = two_levels()
    r = torch.full_like(x_t.flatten(), 2.0)
    loss = uni_loss(x, fake, fake.clone(), x_t, c, r, divergence=divergence)
    assert not loss.any()
    assert not torch.autograd.grad(loss.sum(), x)[0].any()


# Both kinds of gradient; weights ------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, f, r, x_t, c: sid_loss(x, f, r, 1.2),
        lambda x, f, r, x_t, c: sid_loss(x, f, r, 0.0),
        lambda x, f, r, x_t, c: sim_loss(x, f, r, c, distance=L2()) / 2,
        lambda x, f, r, x_t, c: sim_loss(x, f, r, c, distance=L2(), form="full") / 2,
        lambda x, f, r, x_t, c: (
            uni_loss(
                x, f, r, x_t, c, x.new_ones(len(x)), divergence=JensenShannon(), ratio="stopped"
            )
            / (2 * 0.25)
        ),
    ],
    ids=["sid 1.2", "sid 0", "sim", "sim full", "uni"],
)
def test_with_estimates_held_an_implicit_loss_pulls_along_the_gap(loss) -> None:
    """Kind I under no_grad is kind K, whatever alpha or form."""
    x, fake, real = pictures()
    fake, real = fake.detach(), real.detach()
    (slope,) = torch.autograd.grad(loss(x, fake, real, x.detach(), plain(0.8, 0.6)).sum(), x)
    torch.testing.assert_close(slope, fake - real)


@pytest.mark.parametrize("process", [RF(), EDM(), VP(scaled_linear())], ids=lambda p: p.name)
def test_the_likelihood_weight_is_half_the_growth_of_the_noise_to_signal_ratio(process) -> None:
    """g^2 / (2 alpha^2) = n dn/dt, so that it is alpha^4 / sigma^4 n n'; by differences in t."""
    t = torch.tensor([0.2003, 0.5003, 0.8003], dtype=torch.float64) * process.t_max
    x, step = torch.zeros(3, 1, dtype=torch.float64), 1e-7 * process.t_max
    c = process.coefs(t)
    before, after = (
        (process.coefs(t + d).sigma / process.coefs(t + d).alpha) for d in (-step, step)
    )
    expected = c.alpha**4 / c.sigma**4 * (after**2 - before**2) / (4 * step)
    seen = Seen(x, x, None, t, c.expand(x), x, x, x)
    torch.testing.assert_close(Likelihood()(seen).flatten(), expected, rtol=1e-4, atol=0)


# Convergence with an exact fake score -------------------------------------------------------------


def objective(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss over ten times of the flow, its fake score exact."""

    def loss(mu: Tensor, u: Tensor) -> Tensor:
        x, fake, real, c, w = all_times(mu, u)
        z, e, _ = hermite2(20)
        c = Coefs(*(p.expand_as(x).reshape(-1, 1) for p in vars(c).values()))
        x_t = c.alpha * x.reshape(-1, 1) + c.sigma * e.repeat(10)[:, None]
        x = x.reshape(-1, 1)
        fake = gaussian_clean(x_t, c.alpha, c.sigma, mu.detach(), u.detach() ** 2)
        real = gaussian_clean(x_t, c.alpha, c.sigma, MEAN, STD**2)
        if kind.startswith("sid"):
            each = sid_loss(x, fake, real, float(kind.split()[1]))
        else:
            r = log_ratio(x_t, c, mu.detach(), u.detach()).exp().flatten().detach()
            divergence, ratio = kind.split(", ")
            each = uni_loss(x, fake, real, x_t, c, r, divergence=F_OF[divergence][0], ratio=ratio)
        return (each * w.repeat(10)).sum() / 10

    return loss


@pytest.mark.parametrize(
    "kind",
    ["sid 0.5", "sid 1.0", "sid 1.2", "forward KL, exact", "forward KL, stopped"]
    + ["Jensen-Shannon, exact", "reverse KL, exact"],
)
def test_an_exact_fake_score_leads_to_the_target(kind) -> None:
    found = descend(objective(kind), (0.0, 0.5), 0.03, 500)
    assert found == pytest.approx((MEAN, STD), abs=2e-3)
