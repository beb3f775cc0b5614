"""Closed-form teachers: identities, quadrature, flow maps, defects, and files that name them."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.data.digits import open_digits
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.heads import HEADS
from stepdistill.diffusion.process import RF, VP, Process
from stepdistill.diffusion.sampler import full, sample
from stepdistill.diffusion.timesteps import uniform_grid
from stepdistill.oracles.defects import NaNAt, Noisy, Scaled
from stepdistill.oracles.denoiser import Oracle
from stepdistill.oracles.empirical import Empirical
from stepdistill.oracles.flow import flow_map, form
from stepdistill.oracles.mixture import Mixture
from stepdistill.oracles.named import BUILT_IN, read_teacher
from stepdistill.run.errors import UserError
from tests.helpers import mlp_teacher, noise, processes, start_scale

PROCESSES = processes()
EACH_PROCESS = pytest.mark.parametrize("process", PROCESSES.values(), ids=list(PROCESSES))
BIMODAL = Mixture.of([[-2.0], [2.0]], stds=0.4)


def states(count: int = 16, dim: int = 2, seed: int = 0) -> Tensor:
    return noise(seed, (count, dim)).double()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def tilted(components: int = 4, dim: int = 2, labels=()) -> Mixture:
    """Components with covariances of their own, unequal weights."""
    roots = noise(3, (components, dim, dim)).double()
    spread = 0.2 * roots @ roots.mT + 0.1 * torch.eye(dim)
    means = 1.5 * states(components, dim, seed=4)
    return Mixture.of(
        means, covariances=spread, weights=range(1, components + 1), labels=tuple(labels)
    )


# The mixture --------------------------------------------------------------------------------


def test_posterior_mean_is_the_integral_over_clean_values() -> None:
    law, (alpha, sigma) = Mixture.of([[-1.0], [0.5], [2.0]], stds=[0.3, 0.6, 0.4]), (0.7, 0.5)
    y = torch.linspace(-2, 2.5, 9, dtype=torch.float64)
    x = torch.linspace(-6, 8, 40_001, dtype=torch.float64)
    prior = sum(
        torch.exp(-0.5 * ((x - m) / s) ** 2) / s
        for m, s in zip((-1.0, 0.5, 2.0), (0.3, 0.6, 0.4), strict=True)
    )
    weight = prior * torch.exp(-0.5 * ((y[:, None] - alpha * x) / sigma) ** 2)
    expected = (weight * x).sum(dim=1) / weight.sum(dim=1)
    close(law.posterior_mean(y[:, None], alpha, sigma)[:, 0], expected)
    size = weight.sum(dim=1) * (x[1] - x[0]) / (3 * 2 * math.pi * sigma)
    close(law.log_density(y[:, None], alpha, sigma), size.log())


def test_score_is_the_gradient_of_the_log_density() -> None:
    law, y = tilted(), states().requires_grad_()
    for alpha, sigma in ((1.0, 0.0), (0.6, 0.9), (0.0, 1.0)):
        (slope,) = torch.autograd.grad(law.log_density(y, alpha, sigma).sum(), y)
        close(law.score(y, alpha, sigma), slope)
        if alpha:
            close(law.posterior_mean(y, alpha, sigma), (y + sigma**2 * slope) / alpha)


def test_samples_have_the_moments_and_shares() -> None:
    law = tilted()
    z, u = states(100_000, 2), torch.rand(100_000, generator=torch.Generator().manual_seed(1))
    x, k = law.sample(z, u)
    assert torch.allclose(x.mean(dim=0), law.mean(), atol=0.03)
    assert torch.allclose(torch.cov(x.T), law.covariance(), atol=0.06)
    assert torch.allclose(torch.bincount(k) / len(k), law.weights.float(), atol=0.006)
    assert torch.allclose(law.shares(x), law.weights, atol=0.006)
    again = law.draw(8, torch.Generator().manual_seed(2))
    assert torch.equal(again, law.draw(8, torch.Generator().manual_seed(2)))
    whitened = (x - law.means[k])[k == 2] @ torch.linalg.inv(law.covariances[2])
    assert float((whitened * (x - law.means[k])[k == 2]).sum(dim=1).mean()) == pytest.approx(
        2, abs=0.05
    )


def test_noised_and_projected_laws_have_the_moments_that_algebra_says() -> None:
    law, way = tilted(), torch.tensor([0.3, -1.2], dtype=torch.float64)
    moved = law.noised(0.7, 0.4)
    close(moved.covariance(), 0.49 * law.covariance() + 0.16 * torch.eye(2).double())
    close(moved.log_density(states()), law.log_density(states(), 0.7, 0.4))
    flat = law.project(way)
    close(flat.mean(), (law.mean() @ way)[None])
    close(flat.covariance()[0, 0], way @ law.covariance() @ way)


@pytest.mark.parametrize("stds", [[0.5, 0.2, 0.4], [0.5, 0.0, 0.4]])
def test_quantiles_invert_the_distribution_function(stds) -> None:
    law = Mixture.of([[-1.0], [0.2], [1.5]], stds=stds, weights=[3, 1, 2])
    y = torch.linspace(-3, 3, 101, dtype=torch.float64)
    below = sum(
        w / 6 * torch.special.ndtr((y - m) / max(s, 1e-300))
        for w, m, s in zip((3, 1, 2), (-1.0, 0.2, 1.5), stds, strict=True)
    )
    close(law.cdf(y), below, 1e-14)
    smooth = y if min(stds) else y[(y - 0.2).abs() > 0.01]
    close(law.quantile(law.cdf(smooth)), smooth, 1e-12)
    ends = law.quantile(torch.tensor([0.0, 1e-300, 1.0], dtype=torch.float64))
    assert ends[0] == -math.inf and -30 < ends[1] < -15 and ends[2] == math.inf
    if not min(stds):
        step = law.cdf(torch.tensor([0.2 - 1e-9, 0.2 + 1e-9], dtype=torch.float64))
        assert float(law.quantile(step.mean()[None])) == pytest.approx(0.2, abs=1e-14)


def test_classes_may_have_several_components() -> None:
    law = tilted(labels=("b", "a", "b", "a"))
    assert law.classes == ("b", "a")
    assert tilted(labels=(7, 2, 7, 2)).classes == (2, 7)
    close(law.restrict("b").weights, torch.tensor([0.25, 0.75], dtype=torch.float64))
    parts = [law.restrict(name).log_density(states()).exp() for name in ("b", "a")]
    close(0.4 * parts[0] + 0.6 * parts[1], law.log_density(states()).exp())
    with pytest.raises(ValueError, match="no component of class 'c'"):
        law.restrict("c")


@pytest.mark.parametrize(
    "wrong",
    [
        {"stds": -1.0},
        {"stds": math.nan},
        {"stds": 1.0, "weights": [1.0]},
        {"stds": 1.0, "weights": [1.0, 0.0]},
        {"stds": 1.0, "labels": ("a",)},
        {"covariances": [[1.0, 2.0], [2.0, 1.0]]},
        {"covariances": [[1.0, 0.2], [0.1, 1.0]]},
        {"covariances": [1.0, 1.0]},
        {"stds": 1.0, "covariances": torch.eye(2)},
        {},
    ],
)
def test_what_is_no_mixture_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="mixture:"):
        Mixture.of([[0.0, 0.0], [1.0, 1.0]], **wrong)


# The denoiser -------------------------------------------------------------------------------


@EACH_PROCESS
@pytest.mark.parametrize("head", HEADS)
def test_every_head_in_every_process_says_the_same(process: Process, head: str) -> None:
    den, law = Oracle.of(process, head, tilted(labels="abab")), tilted(labels="abab")
    t = process.time_at(torch.linspace(4, -4, 16, dtype=torch.float64))
    c = process.coefs(t)
    x_t = c.alpha[:, None] * law.draw(16, torch.Generator().manual_seed(0))
    x_t = x_t + c.sigma[:, None] * states()
    label = torch.arange(16) % 3
    want = {"x": [], "score": []}
    for k in range(16):
        own = law if label[k] == 2 else law.restrict("ab"[int(label[k])])
        args = x_t[k : k + 1], float(c.alpha[k]), float(c.sigma[k])
        want["x"].append(own.posterior_mean(*args))
        want["score"].append(own.score(*args))
    x, score = (torch.cat(want[key]) for key in ("x", "score"))
    exact = den.exact(x_t, t, Cond(label))
    e = c.expand(x_t)
    close(exact.x, x)
    close(exact.score, score)
    close(e.alpha * exact.x + e.sigma * exact.z, x_t)
    close(exact.velocity, e.d_alpha * x - e.d_sigma * e.sigma * score)
    for view in ("x", "z"):  # the raw output, read back by the head
        read = den.prediction(exact.h, x_t, e)
        close(getattr(read, view), getattr(exact, view), 1e-8)
    rough = den(x_t.float(), t.float(), Cond(label))
    assert rough.h.dtype == torch.float32
    scale = 1 + exact.h.abs().amax()
    assert float(((rough.h - exact.h).abs().amax() / scale).detach()) < 2e-5
    assert torch.equal(den(x_t, t.float(), Cond()).h, den(x_t, t.float(), Cond(0 * label + 2)).h)


@EACH_PROCESS
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("std", [0.5, 0.0])
def test_outputs_are_finite_at_both_ends(process: Process, head: str, std: float) -> None:
    law = Mixture.of(1.5 * states(3), stds=std, labels=[0, 1, 1])
    den, label = Oracle.of(process, head, law), torch.tensor([0, 1, 2])
    for level in (process.t_min, process.t_max):
        t = torch.full((3,), level)
        x_t = process.noise(law.means.float(), noise(1, (3, 2)), t)
        assert den.raw(x_t, t, Cond(label)).isfinite().all()


def test_it_is_differentiated_cloned_copied_and_learns() -> None:
    den = Oracle.of(RF(), "velocity", tilted())
    x_t, t = states(), torch.linspace(0.05, 0.95, 16, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda y: den.exact(y, t).x.sum(dim=0))(x_t)
    step = 1e-6 * torch.tensor([1.0, 0.0], dtype=torch.float64)
    slope = (den.exact(x_t + step, t).x - den.exact(x_t - step, t).x) / 2e-6
    close(jacobian[:, :, 0].T, slope.detach(), 1e-7)
    (log_slope,) = torch.autograd.grad(den.log_density(x_t.requires_grad_(), t).sum(), x_t)
    close(log_slope, den.exact(x_t, t).score)
    other, twin = den.clone(), copy.deepcopy(den)
    with torch.no_grad():
        other.net.means.add_(1.0)
    args = x_t.detach().float(), t.float(), Cond()
    assert torch.equal(den(*args).h, twin(*args).h)
    assert not torch.equal(den(*args).h, other(*args).h)
    close(other.law().mean(), den.law().mean() + 1)
    loss = other(*args).h.square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in other.net.parameters())


def test_samples_of_any_shape_keep_it() -> None:
    den = Oracle(RF(), "x0", noise(0, (3, 1, 4, 4)), 0.2, [1.0, 2.0, 3.0])
    assert (den.sample_shape, den.classes, den.null_label) == ((1, 4, 4), ("0", "1", "2"), 3)
    x_t, t = noise(1, (5, 1, 4, 4)), torch.full((5,), 0.5)
    h = den(x_t, t, Cond(torch.arange(5) % 4)).h
    assert h.shape == x_t.shape
    flat = Mixture.of(noise(0, (3, 16)), stds=0.2, weights=[1, 2, 3])
    expected = flat.posterior_mean(x_t.flatten(1).double(), 0.5, 0.5)
    torch.testing.assert_close(h.flatten(1)[3:4].double(), expected[3:4], rtol=1e-4, atol=1e-4)


def test_bench_a_of_one_gaussian() -> None:
    """VP at alpha .8, sigma .6, data N(.5, 1.3^2): D(x) = m + a s^2 / (a^2 s^2 + b^2) (x - a m)."""
    den = Oracle(VP([0.9, 0.64]), "eps", torch.tensor([[0.5]], dtype=torch.float64), 1.3)
    t = torch.ones(3, dtype=torch.float64)
    c = den.process.coefs(t)
    close(torch.stack([c.alpha[0], c.sigma[0]]), torch.tensor([0.8, 0.6], dtype=torch.float64))
    x_t = torch.tensor([[-1.0], [0.4], [2.0]], dtype=torch.float64)
    slope = 0.8 * 1.69 / (0.64 * 1.69 + 0.36)
    made = den.exact(x_t, t)
    torch.testing.assert_close(made.x, 0.5 + slope * (x_t - 0.4), rtol=0, atol=1e-12)
    log = -0.5 * ((x_t[:, 0] - 0.4) ** 2 / 1.4416 + math.log(2 * math.pi * 1.4416))
    torch.testing.assert_close(den.log_density(x_t, t), log, rtol=0, atol=1e-12)


@EACH_PROCESS
def test_guided_classes_of_one_covariance_are_one_gaussian(process: Process) -> None:
    teacher = read_teacher("classes", process=process)
    den, null = teacher.oracle, teacher.null
    t = process.time_at(torch.linspace(5, -5, 16, dtype=torch.float64))
    label = torch.arange(16) % 2
    got = den.exact(states(), t, Cond(label), guidance=2.0)
    for k in range(2):
        law = den.law(k, 2.0)
        close(law.means, 2 * teacher.mixture.means[k : k + 1] - null.means)
        close(law.covariances, null.covariances)
        here = Oracle.of(process, "x0", law).exact(states(), t)
        close(got.x[label == k], here.x[label == k])
        close(got.z[label == k], here.z[label == k])
    rough = guided(den, states().float(), t.float(), Cond(label), 2.0)
    torch.testing.assert_close(rough.h.double(), got.h, rtol=1e-3, atol=1e-3)
    close(den.law(2, 2.0).means, null.means)
    close(den.law(None).means, null.means)


def test_guided_laws_without_a_closed_form_say_so() -> None:
    mixed = Oracle.of(RF(), "x0", tilted(labels="abcd"))
    assert mixed.law(0, 2.0) is None
    assert len(mixed.law(0, 1.0)) == 1 and len(mixed.law(0, 0.0)) == 4
    other = Mixture.of([[0.0, 0.0]], stds=1.0)
    assert Oracle.of(RF(), "x0", tilted(labels="abcd"), null=other).law(0, 2.0) is None
    with pytest.raises(ValueError, match="null="):
        Oracle.of(RF(), "x0", tilted(), null=other)


# The flow -----------------------------------------------------------------------------------


@EACH_PROCESS
def test_gaussian_flow_by_hand_and_by_integration(process: Process) -> None:
    """One DDIM step is (rho_r / rho_t) cos(phi_t - phi_r); the flow is that without the cosine."""
    m, s = 0.4, 0.7
    den = Oracle.of(process, "v", Mixture.of([[m]], stds=s))
    x_t = start_scale(process) * states(16, 1)
    c = process.coefs(torch.tensor([process.t_max], dtype=torch.float64))
    rho = torch.sqrt((c.alpha * s) ** 2 + c.sigma**2)
    close(flow_map(den, x_t, process.t_max, 0.0), m + s / rho * (x_t - c.alpha * m))
    t, r = process.time_at(torch.tensor([-1.0, 2.0], dtype=torch.float64)).tolist()
    a, b = (process.coefs(torch.tensor([v], dtype=torch.float64)) for v in (t, r))
    made = den.exact(x_t, torch.full((16,), t, dtype=torch.float64))
    step = b.alpha * made.x + b.sigma * made.z
    angle = torch.atan2(a.sigma, a.alpha * s) - torch.atan2(b.sigma, b.alpha * s)
    close(step - b.alpha * m, angle.cos() * (flow_map(den, x_t, t, r) - b.alpha * m))
    full_law = Oracle.of(process, "v", tilted(1))
    x_t = start_scale(process) * states()
    for ends in ((process.t_max, 0.0), (process.t_max, r), (r, t)):
        here = flow_map(full_law, x_t, *ends)
        scale = 1 + here.abs().max()
        close(flow_map(full_law, x_t, *ends, closed=False) / scale, here / scale, 1e-9)


@EACH_PROCESS
@pytest.mark.parametrize("law", [BIMODAL, read_teacher("gmm1d").mixture], ids=["far", "near"])
def test_flow_on_a_line_follows_quantiles(process: Process, law: Mixture) -> None:
    den, x_t = Oracle.of(process, "v", law), start_scale(process) * states(64, 1)
    x = flow_map(den, x_t, process.t_max, 0.0)
    close(flow_map(den, x_t, process.t_max, 0.0, closed=False), x, 1e-8)
    c = process.coefs(torch.tensor([process.t_max], dtype=torch.float64))
    start = law.noised(float(c.alpha), float(c.sigma))
    close(law.cdf(x[:, 0]), start.cdf(x_t[:, 0]), 1e-11)
    close(flow_map(den, x, 0.0, process.t_max), x_t, 1e-7)


def test_flow_of_any_law_returns_keeps_marginals_and_has_its_velocity() -> None:
    den, law, z = Oracle.of(RF(), "v", tilted()), tilted(), states(1000)
    assert form(den.law()) == "integral"
    x = flow_map(den, z, 1.0, 0.0)
    close(flow_map(den, x, 0.0, 1.0), z, 1e-7)
    halfway = flow_map(den, z, 1.0, 0.4)
    close(flow_map(den, halfway, 0.4, 0.0), x, 1e-8)
    assert torch.allclose(x.mean(dim=0), law.mean(), atol=0.15)
    assert torch.allclose(torch.cov(x.T), law.covariance(), atol=0.25)
    assert torch.allclose(law.shares(x), law.weights, atol=0.045)
    near = [flow_map(den, halfway, 0.4, 0.4 + d) for d in (-1e-4, 1e-4)]
    t = torch.full((1000,), 0.4, dtype=torch.float64)
    close((near[1] - near[0]) / 2e-4, den.exact(halfway, t).velocity.detach(), 1e-5)


def test_flow_of_classes_times_and_guidance_row_by_row() -> None:
    teacher = read_teacher("classes")
    mixed = Oracle.of(RF(), "v", tilted(labels="abab"))
    z, label = states(12), torch.arange(12) % 3
    t, s = torch.linspace(1, 0.5, 12).double(), torch.linspace(0, 0.4, 12).double()
    for den, guidance in ((teacher.oracle, 2.0), (mixed, 1.0), (mixed, 1.5)):
        whole = flow_map(den, z, t, s, Cond(label), guidance)
        for k in (0, 11):
            row = slice(k, k + 1)
            one = flow_map(den, z[row], float(t[k]), float(s[k]), Cond(label[row]), guidance)
            close(whole[row], one, 1e-8)
    integrated = flow_map(teacher.oracle, z, t, s, Cond(label), 2.0, closed=False)
    close(integrated, flow_map(teacher.oracle, z, t, s, Cond(label), 2.0), 1e-9)
    grid, ends = uniform_grid(RF(), 400), Cond(label)
    walked = sample(mixed, z.float(), grid, ends, guidance=1.5).detach().double()
    assert float((walked - flow_map(mixed, z, 1.0, 0.0, ends, 1.5)).abs().mean()) < 0.02


@EACH_PROCESS
def test_point_masses_end_in_points(process: Process) -> None:
    law = Mixture.of(1.5 * states(5, 2, seed=9), stds=0.0)
    den, x_t = Oracle.of(process, "v", law), start_scale(process) * states(64)
    x = flow_map(den, x_t, process.t_max, 0.0)
    gap = torch.cdist(x, law.means)
    assert float(gap.amin(dim=1).max()) < 1e-9
    assert len(gap.argmin(dim=1).unique()) > 2
    with pytest.raises(ValueError, match="no way back"):
        flow_map(den, x, 0.0, process.t_max)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.4, 0.7)])
def test_straightness_of_one_rectified_flow(mean, std) -> None:
    """s (2 - pi / 2), from the flow map and the velocities on it; z = 1 stands for the mean."""
    den = Oracle.of(RF(), "velocity", Mixture.of([[mean]], stds=std))
    t = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    z = torch.ones(256, 1, dtype=torch.float64)
    speed = den.exact(flow_map(den, z, 1.0, t), t).velocity.detach()
    x = flow_map(den, z, 1.0, 0.0)
    value = float((z - x - speed).square().mean())
    assert value == pytest.approx(std * (2 - math.pi / 2), rel=1e-4)


def test_the_flow_couples_closer_than_chance() -> None:
    """E |z - x|^2 is 1.50 by quantiles, 5.16 = 1 + 4.16 for independent pairs."""
    den = Oracle.of(RF(), "velocity", BIMODAL)
    z = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)[:, None]
    x = flow_map(den, z, 1.0, 0.0)
    assert float((z - x).square().mean()) == pytest.approx(1.50, abs=0.005)
    assert 1 + float(BIMODAL.covariance()) == pytest.approx(5.16)


def test_a_hundred_components_in_sixteen_dimensions() -> None:
    law = tilted(100, 16, labels=range(100))
    den, x = Oracle.of(RF(), "velocity", law), law.draw(64, torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 1, 64, dtype=torch.float64)
    x_t = RF().noise(x, states(64, 16), t)
    made = den.exact(x_t, t)
    (slope,) = torch.autograd.grad(den.log_density(x_t.requires_grad_(), t).sum(), x_t)
    close(made.score, slope)
    assert len(den.classes) == 100
    back = flow_map(den, flow_map(den, x_t[:4].detach(), t[:4], 0.05), 0.05, t[:4])
    close(back, x_t[:4].detach(), 1e-7)


# A data set ---------------------------------------------------------------------------------


@EACH_PROCESS
@pytest.mark.parametrize("std", [0.0, 0.3])
def test_a_data_set_is_a_mixture_around_its_images(process: Process, std: float) -> None:
    images, label = noise(2, (5, 1, 2, 2)), torch.tensor([0, 1, 1, 0, 1])
    den = Empirical(process, "velocity", images, label, std=std, chunk=2)
    law = Mixture.of(images.flatten(1), stds=std, labels=label.tolist())
    oracle = Oracle.of(process, "velocity", law)
    t = process.time_at(torch.linspace(3, -3, 9))
    x_t = process.noise(images[torch.arange(9) % 5], noise(5, (9, 1, 2, 2)), t)
    assert (den.sample_shape, den.classes, den.null_label) == ((1, 2, 2), ("0", "1"), 2)
    for cond in (Cond(), Cond(torch.arange(9) % 3)):
        got = den.raw(x_t, t, cond).flatten(1)
        want = oracle.exact(x_t.flatten(1).double(), t, cond).h.detach()
        scale = 1 + want.abs().max()
        torch.testing.assert_close(got.double() / scale, want / scale, rtol=0, atol=3e-5)
    wide = Empirical(process, "velocity", images, label, std=std)
    torch.testing.assert_close(wide.raw(x_t, t, cond), den.raw(x_t, t, cond), rtol=1e-4, atol=1e-4)
    leaf = x_t.clone().requires_grad_()
    (slope,) = torch.autograd.grad(den(leaf, t, cond).x.sum(), leaf)
    assert slope.isfinite().all() and slope.abs().sum() > 0


def test_one_image_is_all_there_is() -> None:
    image, t = noise(0, (1, 1, 3, 3)), torch.linspace(0.1, 1, 7)
    den = Empirical(RF(), "x0", image)
    got = den.clone()(noise(1, (7, 1, 3, 3)), t, Cond()).x
    torch.testing.assert_close(got, image.expand_as(got))
    assert den.classes == () and den.device.type == "cpu" and den.null_label is None


def test_digits_come_back_nearest_first_and_as_samples() -> None:
    digits = open_digits()
    images, labels = digits.load(range(len(digits)))
    den = Empirical(RF(), "velocity", images, labels, digits.classes)
    x_t = images[:32] * 0.9 + 0.1 * noise(0, (32, 1, 8, 8))
    made = den(x_t, full(x_t, 0.1), Cond())
    nearest = torch.cdist(x_t.flatten(1), 0.9 * images.flatten(1)).argmin(dim=1)
    torch.testing.assert_close(made.x, images[nearest], rtol=0, atol=1e-3)
    label = torch.arange(20) % 10
    ends = sample(den, noise(1, (20, 1, 8, 8)), uniform_grid(RF(), 32), Cond(label))
    gap, index = torch.cdist(ends.flatten(1), images.flatten(1)).min(dim=1)
    assert float(gap.max()) < 0.05 and torch.equal(labels[index], label)


def test_data_sets_that_do_not_fit_are_refused() -> None:
    images = noise(0, (3, 1, 2, 2))
    for labels, classes in (
        (None, ("a",)),
        (torch.tensor([0, 1]), ()),
        (torch.tensor([0, 2, 2]), ()),
    ):
        with pytest.raises(ValueError, match="empirical:"):
            Empirical(RF(), "x0", images, labels, classes)
    with pytest.raises(ValueError, match="no images"):
        Empirical(RF(), "x0", images[:0])


# Defects ------------------------------------------------------------------------------------


@torch.no_grad()
@EACH_PROCESS
@pytest.mark.parametrize("head", HEADS)
def test_a_noisy_teacher_is_off_by_its_size(process: Process, head: str) -> None:
    law = read_teacher("gmm2d").mixture
    den = Oracle.of(process, head, law)
    wrong = Noisy(den, 0.1)
    t = process.time_at(torch.full((4000,), 0.7))
    x_t = process.noise(
        law.draw(4000, torch.Generator().manual_seed(0)).float(), states(4000).float(), t
    )
    true, made = den(x_t, t, Cond()), wrong(x_t, t, Cond())
    c = process.coefs(t[:1])
    angle = math.atan2(float(c.sigma), float(c.alpha))
    off = (made.z - true.z).square().mean().sqrt(), (made.x - true.x).square().mean().sqrt()
    assert float(off[0]) == pytest.approx(0.1 * math.cos(angle), rel=0.05)
    assert float(off[1]) == pytest.approx(0.1 * math.sin(angle), rel=0.05)
    assert abs(float((made.z - true.z).mean())) < 0.01
    e = c.expand(x_t)
    torch.testing.assert_close(e.alpha * made.x + e.sigma * made.z, x_t, rtol=1e-4, atol=1e-4)
    assert torch.equal(made.h, Noisy(den, 0.1)(x_t, t, Cond()).h)
    assert torch.equal(made.h[:3], wrong(x_t[:3], t[:3], Cond()).h)
    assert not torch.equal(made.h, Noisy(den, 0.1, seed=1)(x_t, t, Cond()).h)


@EACH_PROCESS
@pytest.mark.parametrize("head", HEADS)
def test_a_scaled_teacher_is_wrong_by_its_factor(process: Process, head: str) -> None:
    den = Oracle.of(process, head, tilted())
    t, x_t = process.time_at(torch.full((16,), 0.4)), states().float()
    true = den(x_t, t, Cond())
    clean = Scaled(den, 1.2)(x_t, t, Cond())
    score = Scaled(den, 0.8, part="score")(x_t, t, Cond())
    torch.testing.assert_close(clean.x, 1.2 * true.x, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(score.score, 0.8 * true.score, rtol=1e-3, atol=1e-4)
    for level in (process.t_min, process.t_max):
        at = full(x_t, level)
        assert Scaled(den, 1.2).raw(x_t, at, Cond()).isfinite().all()
        assert Scaled(den, 1.2, part="score").raw(x_t, at, Cond()).isfinite().all()


def test_nan_comes_at_the_calls_and_times_that_were_named() -> None:
    den, t, x_t = mlp_teacher(), torch.linspace(0.1, 0.9, 9), noise(0, (9, 4))
    cond = Cond(torch.zeros(9, dtype=torch.int64))

    def bad(wrong: NaNAt) -> list[bool]:
        return [bool(wrong(x_t, t, cond).x.isnan().any()) for _ in range(5)]

    assert bad(NaNAt(den, calls={2, 4})) == [False, True, False, True, False]
    assert bad(NaNAt(den, since=3)) == [False, False, True, True, True]
    rows = NaNAt(den, times=(0.35, 0.65))(x_t, t, cond).h.isnan()
    assert rows.all(dim=1).tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert torch.equal(rows.all(dim=1), rows.any(dim=1))


@pytest.mark.parametrize("defect", [lambda d: Noisy(d, 0.1), lambda d: Scaled(d, 1.1), NaNAt])
def test_a_defect_stands_in_for_its_denoiser(defect) -> None:
    den = mlp_teacher()
    wrong = defect(den)
    x_t, t, cond = noise(), torch.linspace(0.1, 0.9, 16), Cond(torch.arange(16) % 4)
    same = ("process", "head", "classes", "null_label", "sample_shape", "device")
    assert all(getattr(wrong, name) == getattr(den, name) for name in same)
    h = wrong(x_t, t, cond).h
    twice = guided(wrong, x_t, t, cond, 2.0).h
    assert twice.isfinite().all() and not torch.equal(twice, h)
    other, twin = wrong.clone(), copy.deepcopy(wrong)
    assert len(list(wrong.parameters())) == len(list(den.parameters()))
    with torch.no_grad():
        for param in other.net.parameters():
            param.add_(0.1)
    assert torch.equal(wrong(x_t, t, cond).h, h) and torch.equal(twin(x_t, t, cond).h, h)
    assert not torch.equal(other(x_t, t, cond).h, h)
    calls = []
    wrong.route(lambda *args: calls.append(1) or den.net(*args))
    assert torch.equal(wrong(x_t, t, cond).h, h) and calls == [1]
    wrong.route(None)
    assert torch.equal(wrong(x_t, t, cond, taps=["enter"]).features["enter"], den.net.enter(x_t))


# By name ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_teachers(name: str) -> None:
    teacher = read_teacher(name)
    kinds = {
        "gaussian": "gaussian",
        "gmm1d": "quantile",
        "gmm2d": "integral",
        "classes": "gaussian",
        "mixed": "integral",
    }
    assert (teacher.name, teacher.kind) == (name, kinds[name])
    assert teacher.oracle.process.name == "rf" and teacher.oracle.head.name == "velocity"
    assert teacher.guidance == (2.0 if name in ("classes", "mixed") else 1.0)
    other = read_teacher(name, process=PROCESSES["edm"], head="edm-f").oracle
    assert (other.process.name, other.head.name) == ("edm", "edm-f")


@pytest.mark.parametrize("name", ["gmm1d", "gmm2d"])
def test_modes_are_apart_and_joined(name: str) -> None:
    """3 standard deviations or more between centres, and never below 2% of the peak on the way."""
    law = read_teacher(name).mixture
    gaps = torch.pdist(law.means)
    assert float(gaps.min()) >= 3 * 0.5
    assert len(law.weights.unique()) == len(law)
    peak = law.log_density(law.means).max()
    for k in range(len(law)):
        near = (law.means - law.means[k]).norm(dim=1).topk(2, largest=False).indices[1]
        way = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
        line = law.means[k] + way * (law.means[near] - law.means[k])
        assert float((law.log_density(line).min() - peak).exp()) > 0.02


GOOD = """\
kind: gaussian_mixture
weights: [1, 3]
means: [-1, 1.5]
stds: [0.3, 0]
labels: [left, right]
guidance: 2
"""


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    teacher = read_teacher(str(file))
    close(teacher.mixture.weights, torch.tensor([0.25, 0.75]).double())
    close(teacher.mixture.means, torch.tensor([[-1.0], [1.5]]).double())
    assert teacher.oracle.classes == ("left", "right") and teacher.oracle.null_label == 2
    assert (teacher.guidance, teacher.kind, teacher.null) == (2.0, "integral", None)
    file.write_text("kind: gaussian_mixture\nweights: [1]\nmeans: [[1, 2, 3]]\nstds: [1e-3]\n")
    assert read_teacher(str(file)).oracle.sample_shape == (3,)


@pytest.mark.parametrize(
    ("was", "now", "says"),
    [
        ("weights: [1, 3]", "weights: [1]", ":2: weights has length 1, means has 2"),
        ("weights: [1, 3]", "weights: [1, 0]", ":2: weights.1=0: input should be greater than 0"),
        ("weights: [1, 3]", "weights: [1, .inf]", ":2: weights.1=inf: input should be a finite"),
        ("weights: [1, 3]\n", "", "the key weights is missing"),
        ("stds: [0.3, 0]", "stds: [0.3]", ":4: stds has length 1, means has 2"),
        ("stds: [0.3, 0]", "stds: [0.3, -1]", ":4: stds.1=-1: input should be greater than or"),
        ("stds: [0.3, 0]", "stds: [0.3, .nan]", ":4: stds.1=nan"),
        ("stds: [0.3, 0]", "stds: 0.3", ":4: stds=0.3: this key holds a list; write it in [ ]"),
        ("means: [-1, 1.5]", "means: [-1, [1, 2]]", ":3: means.1 has length 2, means.0 has 1"),
        ("means: [-1, 1.5]", "means: [-1, []]", ":3: means.1=[]: value should have at least 1"),
        ("means: [-1, 1.5]", "means: [-1, far]", ":3: means.1.0='far': input should be a valid"),
        ("means: [-1, 1.5]", "means: []", ":3: means=[]: list should have at least 1"),
        ("means: [-1, 1.5]", f"means: {[0] * 101}", ":3: 101 components; give at most 100"),
        ("labels: [left, right]", "labels: [left]", ":5: labels has length 1, means has 2"),
        ("labels: [left, right]\n", "", ":5: guidance=2 needs labels"),
        ("guidance: 2", "guidance: -1", ":6: guidance=-1: input should be greater than or"),
        ("guidance: 2", "guide: 2", ":6: unknown key guide; did you mean guidance?"),
        ("gaussian_mixture", "gaussian", ":1: kind='gaussian': input should be 'gaussian_mixture'"),
        ("kind: gaussian_mixture\n", "", "the key kind is missing"),
        ("means: [-1, 1.5]", "means: [-1, 1.5", "not YAML"),
        (GOOD, "", "a config is a mapping"),
        (GOOD, "- 1\n", "a config is a mapping"),
    ],
)
def test_a_wrong_file_is_one_line_with_place_and_mend(tmp_path: Path, was, now, says) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace(was, now))
    with pytest.raises(UserError) as error:
        read_teacher(str(file))
    text = str(error.value)
    assert says in text and str(file) in text and "\n" not in text


def test_what_is_no_teacher_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="teacher gmm_2d: no such file; did you mean gmm2d"):
        read_teacher("gmm_2d")
    with pytest.raises(UserError, match="built in are gaussian, gmm1d, gmm2d, classes"):
        read_teacher("sim-digits")  # a config's name
    with pytest.raises(UserError, match="a folder"):
        read_teacher(str(tmp_path))
    for content in (b"\x00\x01\x02", b"\xff\xfe\x00\x80"):
        (tmp_path / "binary.yaml").write_bytes(content)
        with pytest.raises(UserError, match="binary.yaml: cannot be read as YAML") as error:
            read_teacher(str(tmp_path / "binary.yaml"))
        assert "\n" not in str(error.value)
