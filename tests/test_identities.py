"""Processes, heads, translation, densities and grids against their definitions, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.heads import HEADS
from stepdistill.diffusion.process import EDM, RF, VP, Coefs, Process, Trig, translate
from stepdistill.diffusion.timesteps import (
    LogitNormal,
    Uniform,
    UShaped,
    grid_between,
    raised,
    regular_start,
    share_below,
    uniform_grid,
)
from tests.helpers import hermite, karras_grid, processes, scaled_linear, start_scale

PROCESSES = processes()
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def close(a: Tensor, b: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(a, b, **{**TOLERANCE, **tolerance})


def levels(process: Process) -> Tensor:
    """Forty times of a process over most of its range, none of them on an entry of a table."""
    n = torch.logspace(-1.5, 1.15, 40, dtype=torch.float64)
    return process.time_at(-2 * n.log())


def samples(count: int) -> tuple[Tensor, Tensor]:
    """Clean and noise parts [count, 2, 3]."""
    rng = torch.Generator().manual_seed(1)
    x, z = (torch.randn(count, 2, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    return x, z


@pytest.fixture(params=PROCESSES)
def process(request) -> Process:
    return PROCESSES[request.param]


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_every_head_gives_back_clean_and_noise(process, head) -> None:
    t = levels(process)
    x, z = samples(len(t))
    c = process.coefs(t).expand(x)
    x_t = process.noise(x, z, t)
    h = head.output(x, z, c, process.sigma_data)
    close(head.clean(h, x_t, c, process.sigma_data), x)
    close(head.noise(h, x_t, c, process.sigma_data), z)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_det_is_alpha_b_minus_sigma_a(process, head) -> None:
    c = process.coefs(levels(process))
    a, b, det = head.weights(c, process.sigma_data)
    close(det, c.alpha * b - c.sigma * a)


@pytest.mark.parametrize("head", ["v", "velocity", "edm-f", "trig-f"])
@pytest.mark.parametrize("name", ["rf", "vp", "edm", "trig"])
def test_heads_that_need_no_clamp_are_finite_at_both_ends(name, head) -> None:
    process, head = PROCESSES[name], HEADS[head]
    t = torch.tensor([0.0, process.t_max], dtype=torch.float64)
    x, z = samples(2)
    c = process.coefs(t).expand(x)
    h = head.output(x, z, c, process.sigma_data)
    x_t = process.noise(x, z, t)
    assert all(part.isfinite().all() for part in vars(c).values())
    if (name, head.name) not in {("edm", "velocity"), ("edm", "v")}:  # ill-conditioned at 80
        close(head.clean(h, x_t, c, process.sigma_data), x, atol=1e-8)


def test_edm_head_is_karras_preconditioning() -> None:
    process, sd = EDM(), 0.5
    n = levels(process)
    x, z = samples(len(n))
    c, x_t, scale = process.coefs(n).expand(x), process.noise(x, z, n), n.reshape(-1, 1, 1)
    skip = sd**2 / (scale**2 + sd**2)
    out = scale * sd / (scale**2 + sd**2).sqrt()
    close(HEADS["edm-f"].output(x, z, c, sd), (x - skip * x_t) / out)
    close(process.scale_input(x_t, n), x_t / (scale**2 + sd**2).sqrt())
    close(process.network_time(n), n.log() / 4)


def test_derivatives_are_those_of_the_coefficients(process) -> None:
    t = levels(process).requires_grad_()
    c = process.coefs(t)
    for value, slope in ((c.alpha, c.d_alpha), (c.sigma, c.d_sigma)):
        (true,) = torch.autograd.grad((value + 0 * t).sum(), t, retain_graph=True)
        close(slope.detach(), true)


def test_vp_derivatives_below_the_first_entry() -> None:
    process, step = PROCESSES["vp"], 1e-7
    t = torch.tensor([0.0, 1e-4, 5e-4, 9e-4], dtype=torch.float64)
    c, ahead = process.coefs(t), process.coefs(t + step)
    close((ahead.alpha - c.alpha) / step, c.d_alpha, atol=1e-3, rtol=1e-3)
    close((ahead.sigma - c.sigma) / step, c.d_sigma, atol=1e-3, rtol=1e-3)


def test_time_at_inverts_log_snr(process) -> None:
    t = levels(process)
    assert process.log_snr(t).diff().lt(0).all()
    close(process.time_at(process.log_snr(t)), t)


def test_velocity_is_the_path_s_derivative(process) -> None:
    t = levels(process)
    x, z = samples(len(t))
    step = 1e-6 * t
    change = process.noise(x, z, t + step) - process.noise(x, z, t - step)
    c = process.coefs(t).expand(x)
    speed = c.d_alpha * x + c.d_sigma * z
    close(change / (2 * step).reshape(-1, 1, 1), speed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", PROCESSES)
@pytest.mark.parametrize("target", PROCESSES)
def test_translation_keeps_clean_and_noise(source, target) -> None:
    a, b = PROCESSES[source], PROCESSES[target]
    t = levels(a)
    x, z = samples(len(t))
    y, at = translate(a.noise(x, z, t), t, a, b)
    close(b.log_snr(at), a.log_snr(t))
    close(y, b.noise(x, z, at))


@pytest.mark.parametrize(("source", "target"), [("rf", "trig"), ("trig", "rf")])
def test_translation_is_finite_at_pure_noise(source, target) -> None:
    a, b = PROCESSES[source], PROCESSES[target]
    x, z = samples(1)
    t = torch.full((1,), a.t_max, dtype=torch.float64)
    y, at = translate(a.noise(x, z, t), t, a, b)
    close(at, torch.full((1,), b.t_max, dtype=torch.float64))
    close(y, start_scale(b) * z)


def test_flow_to_trig_closed_form() -> None:
    """tan tau = s / (1 - s), x_RF = q x_trig, F = ((1-2s) x_RF + (1-2s+2s^2) v) / q."""
    flow, trig = RF(), Trig(sigma_data=1.0)
    s = levels(flow)
    x, z = samples(len(s))
    y, tau = translate(flow.noise(x, z, s), s, flow, trig)
    s_, q = s.reshape(-1, 1, 1), torch.sqrt(s**2 + (1 - s) ** 2).reshape(-1, 1, 1)
    close(tau, torch.atan(s / (1 - s)))
    close(1 / (tau.sin() + tau.cos()), q.flatten())
    close(flow.noise(x, z, s), q * y)
    f = HEADS["trig-f"].output(x, z, trig.coefs(tau).expand(x), 1.0)
    close(f, ((1 - 2 * s_) * q * y + (1 - 2 * s_ + 2 * s_**2) * (z - x)) / q)
    close(f, q * (z - x) + (1 - 2 * s_) * y)


@pytest.mark.parametrize(
    ("angles", "sigmas"),
    [
        ((math.atan(80), 1.3, 1.0, 0.6), (0.98765, 0.78271, 0.60898, 0.40622)),
        ((math.atan(400), 1.3, 1.1, 0.6), (0.99751, 0.78271, 0.66270, 0.40622)),
    ],
)
def test_published_angles_as_flow_times(angles, sigmas) -> None:
    tau = torch.tensor(angles, dtype=torch.float64)
    s = RF().time_at(Trig(sigma_data=1.0).log_snr(tau))
    close(s, torch.tensor(sigmas, dtype=torch.float64), atol=5e-6)


def test_vp_table_is_the_scheduler_s() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    table = scheduler.alphas_cumprod.double()
    process = VP(table)
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    c = process.coefs(t)
    close(c.alpha**2, table)
    close(c.alpha**2 + c.sigma**2, torch.ones_like(t))
    close(process.network_time(t), torch.arange(1000, dtype=torch.float64))
    single = process.coefs(t.float())
    torch.testing.assert_close(single.alpha**2, scheduler.alphas_cumprod, rtol=2e-5, atol=1e-6)
    close(table.float(), scaled_linear().float(), rtol=1e-5, atol=1e-7)


def test_zero_terminal_snr_is_finite() -> None:
    from diffusers import DDIMScheduler

    table = DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    assert float(table[-1]) == 0
    process = VP(table)
    c = process.coefs(torch.tensor([0.5, 0.9995, 1.0], dtype=torch.float64))
    assert all(part.isfinite().all() for part in vars(c).values())
    assert float(c.alpha[-1]) == pytest.approx(2.0**-12)
    x, z = samples(3)
    v = HEADS["v"].output(x, z, c.expand(x))
    x_t = c.expand(x).alpha * x + c.expand(x).sigma * z
    close(HEADS["v"].clean(v, x_t, c.expand(x)), x)


def test_known_ranges_of_teachers_in_flow_time() -> None:
    def flow_time(process: Process, t: float) -> float:
        return float(RF().time_at(process.log_snr(torch.tensor([t], dtype=torch.float64))))

    assert flow_time(EDM(), 80.0) == pytest.approx(0.98765, abs=5e-6)
    assert flow_time(EDM(), 0.002) == pytest.approx(0.0020, abs=5e-5)
    assert flow_time(VP(scaled_linear()), 1.0) == pytest.approx(0.93596, abs=5e-6)
    assert flow_time(VP(scaled_linear()), 0.001) == pytest.approx(0.02834, abs=5e-6)


def test_shift_by_k_multiplies_the_noise_to_signal_ratio_by_k() -> None:
    u = torch.linspace(0.01, 0.99, 20, dtype=torch.float64)
    s = RF(shift=5.0).warp(u)
    close(s / (1 - s), 5 * u / (1 - u))


def test_grids() -> None:
    assert uniform_grid(RF(), 4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert uniform_grid(RF(shift=3.0), 4) == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))
    assert uniform_grid(Trig(), 2) == pytest.approx((math.pi / 2, math.pi / 4, 0.0))
    edm = uniform_grid(EDM(), 17)
    assert edm[:-1] == pytest.approx(karras_grid(18)[:-1])
    assert edm[-1] == 0.0
    assert karras_grid(18)[-1] == pytest.approx(0.002)


def ddpm_linear() -> VP:
    return VP(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0))


def test_few_step_grids_start_where_the_clean_estimate_is_regular(process) -> None:
    for head in set(HEADS) - {"eps"}:
        assert regular_start(process, head) == 1.0
        assert regular_start(ddpm_linear(), head) == 1.0
    alphas = [
        float(process.coefs(process.warp(torch.tensor([u], dtype=torch.float64))).alpha)
        for u in (regular_start(process, "eps"), regular_start(process, "eps") + 1 / 125)
    ]
    assert alphas[0] >= 0.05
    assert alphas[1] < 0.05 or regular_start(process, "eps") == 1.0


def test_starts_of_noise_predictors() -> None:
    assert regular_start(ddpm_linear(), "eps") == 0.768  # alpha is 0.0064 at 1
    assert regular_start(VP(scaled_linear()), "eps") == 1.0  # alpha is 0.068 there
    assert regular_start(EDM(), "eps") == 1.0
    assert regular_start(RF(), "eps") == 0.944


def uniforms(count: int = 200_000) -> Tensor:
    """The midpoints of ``count`` equal parts of (0, 1), fp64: a mean over them is an integral."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_u_shaped_density() -> None:
    s = UShaped(eps=0.0).sample(uniforms(), RF())
    assert float(s.mean()) == pytest.approx(0.5, abs=1e-9)
    assert float(s.var()) == pytest.approx(0.11567, abs=5e-6)
    assert float(s.var()) == pytest.approx(0.25 - 1 / math.tanh(2) / 4 + 2 / 16, abs=2e-6)
    assert float(((s < 0.1) | (s > 0.9)).double().mean()) == pytest.approx(0.3450, abs=5e-5)
    width = 1e-3  # the density at its ends and middle
    assert float((s < width).double().mean()) / width == pytest.approx(2.0746, rel=5e-3)
    assert float((s > 1 - width).double().mean()) / width == pytest.approx(2.0746, rel=5e-3)
    middle = ((s - 0.5).abs() < width / 2).double().mean()
    assert float(middle) / width == pytest.approx(0.5514, rel=5e-3)


def test_u_shaped_keeps_off_the_ends() -> None:
    s = UShaped(eps=1e-3).sample(torch.tensor([1e-7, 1 - 1e-7], dtype=torch.float64), RF())
    assert 1e-3 <= float(s[0]) < 1.001e-3
    assert 1 - 1.001e-3 < float(s[1]) <= 1 - 1e-3


def test_u_shaped_in_another_process_has_the_same_log_snr() -> None:
    u = uniforms(50)
    s = UShaped().sample(u, RF()).clamp_max(80 / 81)  # EDM's largest level
    close(EDM().log_snr(UShaped().sample(u, EDM())), -2 * torch.logit(s), rtol=1e-9)
    close(Trig().time_of_flow(s).tan() * 0.5, s / (1 - s), rtol=1e-9)


@pytest.mark.parametrize("name", ["rf", "edm", "trig"])
def test_logit_normal_is_lognormal_in_the_noise_to_signal_ratio(name) -> None:
    process, density = PROCESSES[name], LogitNormal(mean=-1.1, std=0.7)
    c = process.coefs(density.sample(uniforms(), process))
    log_n = (c.sigma / c.alpha).log()
    assert float(log_n.mean()) == pytest.approx(-1.1, abs=1e-4)
    assert float(log_n.std()) == pytest.approx(0.7, abs=1e-3)


def test_logit_normal_density() -> None:
    """Mean of a smooth function of s under logit s ~ N(0, 1), against quadrature."""
    nodes, weights = hermite(60)
    s = LogitNormal().sample(uniforms(), RF())
    assert float((s**3).mean()) == pytest.approx(
        float((weights * torch.sigmoid(nodes) ** 3).sum()), abs=1e-6
    )


def test_uniform_density_follows_the_process_s_warp() -> None:
    u = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    close(Uniform(low=0.25, high=0.75).sample(u, RF()), torch.tensor([0.25, 0.5, 0.75]).double())
    shifted = Uniform().sample(u, RF(shift=3.0))
    close(shifted, torch.tensor([0.0, 0.75, 1.0]).double())


@pytest.mark.parametrize("kind", [Uniform(low=0.02, high=0.98), LogitNormal(std=3.0), UShaped()])
def test_densities_stay_in_the_trained_range(process, kind) -> None:
    t = kind.sample(torch.tensor([2.0**-24, 0.5, 1 - 2.0**-24]), process)
    assert t.dtype == torch.float32
    assert t.diff().gt(0).all()
    assert float(t[0]) >= process.t_min * (1 - 1e-6)
    assert float(t[-1]) <= process.t_max * (1 + 1e-6)


def test_coefs_keep_the_dtype_of_the_time(process) -> None:
    for dtype in (torch.float32, torch.float64):
        c: Coefs = process.coefs(torch.full((2,), 0.5, dtype=dtype))
        assert {part.dtype for part in vars(c).values()} == {dtype}


def test_progress_is_the_inverse_of_the_warp(process) -> None:
    u = torch.linspace(0, 1, 33, dtype=torch.float64)
    close(process.unwarp(process.warp(u)), u)
    k = RF(shift=7.0)
    close(k.unwarp(k.warp(u)), u)


def test_grids_of_phases_join_to_the_grid_of_the_whole(process) -> None:
    """Where their border is on it: steps are even in progress, whatever the process's shift."""
    for kind in (process, RF(shift=7.0)):
        whole = uniform_grid(kind, 6)
        parts = [grid_between(*ends, 3, kind) for ends in (whole[:4:3], whole[3::3])]
        close(torch.tensor(parts[0][:-1] + parts[1]), torch.tensor(whole))
        assert (parts[0][0], parts[0][-1], parts[1][-1]) == (whole[0], whole[3], 0.0)


def test_raised_times_lie_above_a_level_evenly_in_progress(process) -> None:
    top, low = uniform_grid(process, 4)[1:3]
    share = torch.tensor([1e-6, 0.25, 0.5, 1.0], dtype=torch.float64)
    t = raised(process.warp(0.75 * share), low, top, process)
    close(process.unwarp(t), 0.5 + 0.25 * share, rtol=1e-9)


def test_a_share_of_times_is_the_distribution_function() -> None:
    below = share_below(lambda u: LogitNormal(mean=-1.0).sample(u, EDM()), math.exp(-0.5))
    assert below == pytest.approx(float(torch.special.ndtr(torch.tensor(0.5).double())), abs=1e-9)
    assert share_below(lambda u: Uniform(low=0.5).sample(u, RF()), 0.25) == 0
