"""sample() against diffusers' own schedulers, and solver steps against closed-form flows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser, Experts
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.oracles import Oracle
from stepdistill.diffusion.process import EDM, RF, VP, Process, Trig
from stepdistill.diffusion.sampler import full, heun_step, move, sample
from stepdistill.diffusion.timesteps import karras_grid, uniform_grid
from tests.helpers import mlp_teacher, processes, scaled_linear, small_mlp

BATCH = 16


def noise(seed: int = 0, shape: tuple[int, ...] = (BATCH, 4)) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draws(seed: int, count: int) -> list[Tensor]:
    """The noise that a scheduler given the generator of ``seed`` draws, step by step."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, 4, generator=rng) for _ in range(count)]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to ``tolerance``, or to that share of the values' size where it is above 1."""
    size = max(1.0, float(b.abs().mean()))
    torch.testing.assert_close(a / size, b / size, rtol=0, atol=tolerance)


def walk(scheduler: Any, x: Tensor, output: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A diffusers sampling loop; the scheduler draws from the generator of seed 5."""
    rng = torch.Generator().manual_seed(5)
    for t in scheduler.timesteps:
        args = {} if type(scheduler).__name__ == "DDIMScheduler" else {"generator": rng}
        x = scheduler.step(output(x, t), t, x, **args).prev_sample
    return x


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_match_euler(steps, stochastic) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    den = Denoiser(small_mlp(num_classes=0), RF(), "velocity")
    grid = uniform_grid(den.process, steps)
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=list(grid[:-1]))
    z, fresh = noise(), draws(5, steps)
    theirs = walk(scheduler, z, lambda x, t: den.net(x, t.expand(BATCH)))
    ours = sample(
        den,
        z,
        grid,
        Cond(),
        noise="fresh" if stochastic else "predicted",
        fresh=lambda i: fresh[i - 1],
    )
    close(ours, theirs)


@torch.no_grad()
def test_flow_match_euler_with_shift() -> None:
    """The shifted even grid is the scheduler's own, once its sigmas are given unshifted."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    den = Denoiser(small_mlp(num_classes=0), RF(shift=3.0), "velocity")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    theirs = walk(scheduler, noise(), lambda x, t: den.net(x, t.expand(BATCH)))
    close(sample(den, noise(), uniform_grid(den.process, 4), Cond()), theirs)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 4, 10])
@pytest.mark.parametrize(
    ("head", "kind"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")]
)
def test_ddim_trailing(steps, head, kind) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type=kind,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(steps)
    den = Denoiser(small_mlp(num_classes=0), VP(scheduler.alphas_cumprod), head)
    theirs = walk(
        scheduler,
        den.process.start_scale * noise(),
        lambda x, t: den.net(x, t.float().expand(BATCH)),
    )
    close(sample(den, noise(), uniform_grid(den.process, steps), Cond()), theirs)


@torch.no_grad()
@pytest.mark.parametrize("indices", [[999], [999, 499], [999, 759, 499, 259]])
def test_lcm(indices) -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    scheduler.set_timesteps(timesteps=indices)
    den = Denoiser(small_mlp(num_classes=0), VP(scheduler.alphas_cumprod), "eps")
    for index in indices:  # its boundary scalings are those of a plain estimate at these times
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(index)
        assert skip < 1e-6
        assert out > 1 - 1e-6
    fresh = draws(5, len(indices))
    theirs = walk(
        scheduler,
        den.process.start_scale * noise(),
        lambda x, t: den.net(x, t.float().expand(BATCH)),
    )
    grid = (*((k + 1) / 1000 for k in indices), 0.0)
    ours = sample(den, noise(), grid, Cond(), noise="fresh", fresh=lambda i: fresh[i - 1])
    close(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("indices", [[0], [0, 22], [0, 10, 30]])
def test_cm_stochastic_iterative(indices) -> None:
    """Its output is scaled to be exact at n_min = 0.002 and its noise falls short by n_min.

    The network's estimate is handed over through the inverse of its scaling, and our noise is
    shortened as its own is: what is left is the sampler.
    """
    from diffusers import CMStochasticIterativeScheduler

    scheduler = CMStochasticIterativeScheduler(clip_denoised=False)
    scheduler.set_timesteps(timesteps=sorted(indices, reverse=True))
    sigmas = scheduler.sigmas.tolist()[: len(indices)]
    assert sigmas == pytest.approx([karras_grid(40)[i] for i in indices], rel=1e-6)
    den = Denoiser(small_mlp(num_classes=0, time_scale=8.0), EDM(), "edm-f")

    def output(x: Tensor, t: Tensor) -> Tensor:
        scaled = scheduler.scale_model_input(x, t)
        sigma = scheduler.sigmas[scheduler.step_index]
        close(scaled, den.process.scale_input(x, sigma.expand(BATCH)))
        assert float(den.process.network_time(sigma)) == pytest.approx(float(t) / 1000, abs=1e-5)
        plain_skip, plain_out = scheduler.get_scalings(sigma)
        clean = plain_skip * x + plain_out * den.net(scaled, (t / 1000).float().expand(BATCH))
        skip, out = scheduler.get_scalings_for_boundary_condition(sigma)
        return (clean - skip * x) / out

    theirs = walk(scheduler, sigmas[0] * noise(), output)
    fresh = draws(5, len(indices))

    def short(i: int) -> Tensor:
        return fresh[i - 1] * math.sqrt(sigmas[i] ** 2 - 0.002**2) / sigmas[i]

    grid = (*sigmas, 0.0)
    close(sample(den, noise(), grid, Cond(), noise="fresh", fresh=short), theirs)


# Noise sources, exits, experts, guidance -----------------------------------------------------


@torch.no_grad()
def test_all_noise_sources_agree_on_the_first_step() -> None:
    den, z = mlp_teacher(), noise()
    cond = Cond(torch.zeros(BATCH, dtype=torch.long))
    ends = [
        sample(den, z, (1.0, 0.3, 0.0), cond, noise=source, fresh=lambda i: z, stop=1)
        for source in ("predicted", "fresh", "initial")
    ]
    close(ends[1], ends[0])
    close(ends[2], ends[0])


@torch.no_grad()
def test_stop_leaves_on_the_way() -> None:
    den, z, grid = mlp_teacher(), noise(), (1.0, 0.6, 0.3, 0.0)
    cond = Cond(torch.arange(BATCH) % 3)
    x_t = z
    for i, (t, r) in enumerate(zip(grid, grid[1:], strict=False)):
        assert torch.equal(sample(den, z, grid, cond, stop=i), x_t)
        x_t = move(den(x_t, full(z, t), cond), den.process, full(z, r))
    torch.testing.assert_close(sample(den, z, grid, cond), x_t)


def test_fresh_noise_needs_a_source() -> None:
    with pytest.raises(ValueError, match="fresh="):
        sample(mlp_teacher(), noise(), (1.0, 0.5, 0.0), Cond(), noise="fresh")


@torch.no_grad()
def test_experts_own_the_times_above_their_boundary() -> None:
    class Constant(Denoiser):
        def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return torch.full_like(x_t, self.value)

    parts = []
    for value in (1.0, 2.0, 3.0):
        den = Constant(small_mlp(), RF(), "velocity")
        den.value = value
        parts.append(den)
    experts = Experts(parts, (0.6, 0.2))
    owners = {1.0: 1.0, 0.61: 1.0, 0.6: 2.0, 0.21: 2.0, 0.2: 3.0, 0.0: 3.0}
    assert {level: experts.at(level).value for level in owners} == owners
    z = noise()
    end = sample(experts, z, (1.0, 0.6, 0.2, 0.0), Cond())
    close(end, z - 0.4 * 1 - 0.4 * 2 - 0.2 * 3)


@torch.no_grad()
def test_guidance_is_linear_in_every_view() -> None:
    den, x_t, t = mlp_teacher(), noise(), torch.linspace(0.1, 0.9, BATCH)
    label = torch.arange(BATCH) % 3
    with_label = den(x_t, t, Cond(label))
    without = den(x_t, t, Cond(torch.full_like(label, 3)))
    scales = torch.linspace(0, 4, BATCH)
    for scale, column in ((2.5, 2.5), (scales, scales[:, None])):
        got = guided(den, x_t, t, Cond(label), scale)
        for view in ("x", "z", "velocity"):
            plain, null = getattr(with_label, view), getattr(without, view)
            close(getattr(got, view), null + column * (plain - null))
    assert torch.equal(guided(den, x_t, t, Cond(label), 1.0).h, with_label.h)


@torch.no_grad()
def test_guided_gaussian_is_a_gaussian_at_the_guided_mean() -> None:
    """Equal variances: N(mu_0 + g (mu_1 - mu_0), v) at every time."""
    den = Oracle(RF(), "velocity", torch.tensor([[0.2], [1.1]]), 0.7)
    den.null_label = 0
    moved = Oracle(RF(), "velocity", torch.tensor([[0.2 + 3.0 * 0.9]]), 0.7)
    x_t, t = noise(shape=(BATCH, 1)), torch.linspace(0.05, 1, BATCH)
    got = guided(den, x_t, t, Cond(torch.ones(BATCH, dtype=torch.long)), 3.0)
    close(got.x, moved(x_t, t, Cond()).x)


def test_guidance_without_a_null_label_is_refused() -> None:
    den = Denoiser(small_mlp(num_classes=0), RF(), "velocity")
    with pytest.raises(ValueError, match="no class"):
        guided(den, noise(), torch.full((BATCH,), 0.5), Cond(), 2.0)


# Solvers on closed-form flows ----------------------------------------------------------------


def gain(process: Process, std: float, grid: tuple[float, ...], solver: str = "euler") -> float:
    """How much longer a solver makes a state than the exact flow of N(0, std^2) does."""

    def radius(level: float) -> float:
        c = process.coefs(torch.tensor([level], dtype=torch.float64))
        return float(torch.sqrt((c.alpha * std) ** 2 + c.sigma**2))

    den = Oracle(process, "x0", torch.zeros(1, 1), std)
    x = torch.full((1, 1), radius(grid[0]))
    with torch.no_grad():
        for level, after in zip(grid, grid[1:], strict=False):
            t, r = full(x, level), full(x, after)
            if solver == "heun":
                x = heun_step(den, x, t, r, Cond())
            else:
                x = move(den(x, t, Cond()), process, r)
    return float(x) / radius(grid[-1])


@pytest.mark.parametrize(
    ("solver", "count", "expected"),
    [
        ("euler", 18, 0.84609),
        ("euler", 40, 0.92973),
        ("heun", 18, 1.05528),
        ("heun", 40, 1.00978),
    ],
)
def test_karras_solver_gains(solver, count, expected) -> None:
    assert gain(EDM(), 0.5, karras_grid(count), solver) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("std", "expected"), [(1.0, 0.97290), (0.5, 0.95119), (0.2, 0.87042)])
def test_ddim_50_gains(std, expected) -> None:
    grid = (*(t / 1000 for t in range(1000, 0, -20)), 0.001)
    assert gain(VP(scaled_linear()), std, grid) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("steps", [2, 4, 8, 16, 32])
def test_trig_uniform_gains(steps) -> None:
    process = Trig()
    expected = math.cos(math.pi / 2 / steps) ** steps
    assert gain(process, 0.5, uniform_grid(process, steps)) == pytest.approx(expected, abs=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rf", "vp", "edm", "trig"])
def test_one_step_gain_is_a_cosine(name) -> None:
    """(rho_r / rho_t) cos(phi_t - phi_r) with phi = atan2(sigma, alpha s), whatever the process."""
    process, std = processes()[name], 0.7
    t, r = (float(process.time_at(-2 * torch.tensor([n]).log())) for n in (3.0, 0.4))
    expected = math.cos(math.atan2(3.0, std) - math.atan2(0.4, std))
    assert gain(process, std, (t, r)) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_euler_is_one_method_in_every_process(steps) -> None:
    """Equal log-SNR grids, equal noise: the same images."""
    n = torch.logspace(0.9, -1, steps + 1, dtype=torch.float64)
    means, z, ends = torch.tensor([[-1.0, 0.5], [2.0, 0.0]]), noise(shape=(BATCH, 2)), {}
    for name, process in processes().items():
        grid = (*process.time_at(-2 * n.log()).tolist(), 0.0)
        ends[name] = sample(Oracle(process, "v", means, 0.4), z, grid, Cond())
    for end in ends.values():
        close(end, ends["rf"], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rf", "vp", "edm", "trig"])
def test_heun_is_second_order(name) -> None:
    """The error falls by four when steps double (Euler's by two), towards the exact flow."""
    process = processes()[name]

    def error(steps: int, solver: str) -> float:
        n = torch.logspace(0.8, -0.8, steps + 1, dtype=torch.float64)
        return abs(gain(process, 0.7, tuple(process.time_at(-2 * n.log()).tolist()), solver) - 1)

    assert error(16, "euler") / error(32, "euler") == pytest.approx(2, abs=0.2)
    assert error(8, "heun") / error(16, "heun") == pytest.approx(4, abs=0.9)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rf", "vp", "edm", "trig"])
def test_heun_ends_with_the_first_order_step(name) -> None:
    process = processes()[name]
    den = Oracle(process, "x0", torch.zeros(1, 1), 0.7)
    t = process.time_at(torch.tensor([0.0, 0.0]))
    r = torch.stack([torch.tensor(0.0), process.time_at(torch.tensor(4.0))])
    x_t = torch.ones(2, 1)
    got = heun_step(den, x_t, t, r, Cond())
    assert torch.equal(got[0], den(x_t, t, Cond()).x[0])
    assert not torch.equal(got[1], move(den(x_t, t, Cond()), process, r)[1])


@torch.no_grad()
def test_sampling_steps_on_a_curved_flow() -> None:
    """Standard deviations of N(0, 1) data: Euler approaches 1, anchored noise runs away."""
    den = Oracle(RF(), "velocity", torch.zeros(1, 1), 1.0)
    predicted = {2: 0.5, 4: 0.72, 8: 0.85, 32: 0.96, 128: 0.99}
    initial = {2: 0.5, 4: 0.885, 8: 1.317, 32: 2.46, 128: 4.22}
    for steps in predicted:
        grid = uniform_grid(den.process, steps)
        ends = {
            source: float(sample(den, torch.ones(1, 1), grid, Cond(), noise=source))
            for source in ("predicted", "initial")
        }
        assert ends["predicted"] == pytest.approx(predicted[steps], abs=0.006)
        assert ends["initial"] == pytest.approx(initial[steps], rel=0.003)


@torch.no_grad()
def test_one_step_from_pure_noise_is_the_mean() -> None:
    den = Oracle(RF(), "velocity", torch.tensor([[0.3, -0.8]]), 0.6)
    end = sample(den, noise(shape=(BATCH, 2)), (1.0, 0.0), Cond())
    close(end, torch.tensor([0.3, -0.8]).expand(BATCH, 2))


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_exact_map_with_fresh_noise_keeps_the_distribution(steps) -> None:
    """An exact consistency map and fresh noise: N(m, s^2) after any number of steps."""
    m, s = 0.4, 0.7

    class Exact(Oracle):
        def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            c = self.process.coefs(t).expand(x_t)
            radius = torch.sqrt((c.alpha * s) ** 2 + c.sigma**2)
            return m + s / radius * (x_t - c.alpha * m)

    den = Exact(RF(), "x0", torch.tensor([[m]]), s)
    count = 40_000
    z = [noise(seed, (count, 1)) for seed in range(steps)]
    end = sample(
        den, z[0], uniform_grid(den.process, steps), Cond(), noise="fresh", fresh=lambda i: z[i]
    )
    assert float(end.mean()) == pytest.approx(m, abs=4 * s / count**0.5)
    assert float(end.std()) == pytest.approx(s, abs=4 * s / (2 * count) ** 0.5)
