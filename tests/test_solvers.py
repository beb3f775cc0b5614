"""Solver steps and noise sources on flows that are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.process import EDM, RF, VP, Process, Trig
from stepdistill.diffusion.sampler import full, heun_step, move, sample
from stepdistill.diffusion.timesteps import uniform_grid
from stepdistill.oracles.denoiser import Oracle
from tests.helpers import close, karras_grid, noise, processes, scaled_linear

BATCH = 16


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
