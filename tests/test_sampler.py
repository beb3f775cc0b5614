"""sample() against diffusers' own schedulers, and solver steps against closed-form flows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser, Experts
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.process import EDM, RF, VP
from stepdistill.diffusion.sampler import full, heun_step, move, sample, twice
from stepdistill.diffusion.timesteps import grid_between, uniform_grid
from stepdistill.oracles.denoiser import Oracle
from tests.helpers import (
    close,
    karras_grid,
    mlp_teacher,
    noise,
    processes,
    small_mlp,
    start_scale,
)

BATCH = 16


def draws(seed: int, count: int) -> list[Tensor]:
    """The noise that a scheduler given the generator of ``seed`` draws, step by step."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, 4, generator=rng) for _ in range(count)]


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
        start_scale(den.process) * noise(),
        lambda x, t: den.net(x, t.float().expand(BATCH)),
    )
    close(sample(den, noise(), uniform_grid(den.process, steps), Cond()), theirs)


@torch.no_grad()
@pytest.mark.parametrize(("head", "kind"), [("eps", "epsilon"), ("v", "v_prediction")])
def test_ddim_trailing_with_a_unet(head, kind) -> None:
    """Times as diffusers tells them to its own networks, by sinusoids of the index."""
    from diffusers import DDIMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
        )
    scheduler = DDIMScheduler(
        timestep_spacing="trailing", prediction_type=kind, clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(8)
    den = Denoiser(net, VP(scheduler.alphas_cumprod), head)
    z = noise(shape=(BATCH, 1, 8, 8))
    theirs = walk(scheduler, start_scale(den.process) * z, lambda x, t: net(x, t).sample)
    close(sample(den, z, uniform_grid(den.process, 8), Cond()), theirs)


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
        start_scale(den.process) * noise(),
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
@pytest.mark.parametrize("name", ["rf", "vp", "edm", "trig"])
def test_heun_s_walk_is_of_the_second_order(name) -> None:
    """On the way, whose last step is one of Euler's; halved steps leave a quarter of the error."""
    process = processes()[name]
    z, std, low = noise(), 0.6, uniform_grid(process, 4)[3]
    den = Oracle(process, "x0", torch.zeros(1, *z.shape[1:]), std)
    t = torch.tensor([process.t_max, low], dtype=torch.float64)
    c = process.coefs(t)
    radius = torch.sqrt((c.alpha * std) ** 2 + c.sigma**2)
    exact = (c.sigma[0] * z * radius[1] / radius[0]).float()
    errors = []
    for steps in (16, 32):
        even = grid_between(process.t_max, low, steps, process)
        grid = twice((*even, 0.0))  # left before its last step, which is Euler's
        state = sample(den, z, grid, Cond(), noise="heun", stop=2 * steps)
        errors.append(float((state - exact).square().mean().sqrt()))
    assert 3.2 < errors[0] / errors[1] < 5


@torch.no_grad()
def test_heun_of_rectified_flow_is_the_solver_s() -> None:
    den, z, cond = mlp_teacher(), noise(), Cond(torch.arange(BATCH) % 3)
    walked = sample(den, z, twice((1.0, 0.6, 0.3, 0.0)), cond, noise="heun")
    x_t = z
    for t, r in ((1.0, 0.6), (0.6, 0.3), (0.3, 0.0)):
        x_t = heun_step(den, x_t, full(z, t), full(z, r), cond)
    close(walked, x_t)


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
    with pytest.raises(ValueError, match="each inner time of the grid twice"):
        sample(mlp_teacher(), noise(), (1.0, 0.6, 0.3, 0.0), Cond(), noise="heun")


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
    t = torch.full((BATCH,), 0.5)
    with pytest.raises(ValueError, match="no class"):
        guided(den, noise(), t, Cond(), 2.0)
    for one in (1, 1.0):
        assert torch.equal(guided(den, noise(), t, Cond(), one).h, den(noise(), t, Cond()).h)
