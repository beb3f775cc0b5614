"""Rectified flow and reflow against closed form: straightness, loss floors, couplings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import RF
from stepdistill.diffusion.sampler import full, heun_step, sample
from stepdistill.diffusion.timesteps import uniform_grid
from stepdistill.losses.reflow import velocity_loss
from stepdistill.oracles.denoiser import Oracle
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from tests.helpers import hermite, hermite2, make, small_mlp

MEAN, STD = 0.4, 0.7
MIDPOINTS = ((torch.arange(256) + 0.5) / 256).tolist()


def gaussian(mean: float = MEAN, std: float = STD) -> Oracle:
    return Oracle(RF(), "velocity", torch.tensor([[mean]]), std)


def mixture() -> Oracle:
    return Oracle(RF(), "velocity", torch.tensor([[-2.0], [2.0]]), 0.4)


@torch.no_grad()
def test_one_rectified_flow_velocity() -> None:
    """v = -m + (t - (1-t) s^2) / ((1-t)^2 s^2 + t^2) (x_t - (1-t) m), for every head."""
    t = torch.linspace(0.02, 0.98, 9)
    x_t = torch.linspace(-2, 2, 9)[:, None]
    a, b = 1 - t[:, None], t[:, None]
    slope = (b - a * STD**2) / (a**2 * STD**2 + b**2)
    for head in ("velocity", "x0", "eps", "v"):
        den = Oracle(RF(), head, torch.tensor([[MEAN]]), STD)
        got = den(x_t, t, Cond()).velocity
        torch.testing.assert_close(got, -MEAN + slope * (x_t - a * MEAN), rtol=1e-4, atol=1e-4)
        score = -(x_t - a * MEAN) / (a**2 * STD**2 + b**2)
        torch.testing.assert_close(den(x_t, t, Cond()).score, score, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.4, 0.7), (-1.0, 0.3)])
def test_straightness_of_one_rectified_flow(mean, std) -> None:
    """S = s (2 - pi/2), whatever the mean; the deviation is linear in z, so z = 1 is its mean."""
    den, total = gaussian(mean, std), 0.0
    for t in MIDPOINTS:
        x_t = torch.tensor([[(1 - t) * mean + math.hypot((1 - t) * std, t)]])
        straight = 1 - (mean + std)
        speed = float(den(x_t, full(x_t, t), Cond()).velocity)
        total += (straight - speed) ** 2 / len(MIDPOINTS)
    assert total == pytest.approx(std * (2 - math.pi / 2), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.4, 0.7)])
def test_loss_floor_of_one_rectified_flow(mean, std) -> None:
    """V = s pi / 2 (1.5708 for s = 1): velocity_loss of the exact velocity on random pairs."""
    den, (z, e, w) = gaussian(mean, std), hermite2(12)
    z, x = z.float()[:, None], (mean + std * e).float()[:, None]
    total = 0.0
    for t in MIDPOINTS:
        x_t = (1 - t) * x + t * z
        v = den(x_t, full(x_t, t), Cond()).h
        total += float((w * velocity_loss(v, x, z, full(x, t))).sum()) / len(MIDPOINTS)
    assert total == pytest.approx(std * math.pi / 2, rel=1e-4)
    straightness = std * (2 - math.pi / 2)
    before, after = 1 + std**2 + mean**2, (1 - std) ** 2 + mean**2
    assert before - after == pytest.approx(straightness + total, rel=1e-4)


@torch.no_grad()
def test_flow_of_a_gaussian_is_affine() -> None:
    den, z = gaussian(), torch.linspace(-2, 2, 9)[:, None]
    x = z
    grid = uniform_grid(RF(), 200)
    for t, r in zip(grid, grid[1:], strict=False):
        x = heun_step(den, x, full(x, t), full(x, r), Cond())
    torch.testing.assert_close(x, MEAN + STD * z, rtol=0, atol=2e-3)


class Straight(Denoiser):
    """The exact 2-rectified flow of N(MEAN, STD^2)."""

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        t = t[:, None]
        return -MEAN + (1 - STD) * (x_t - (1 - t) * MEAN) / (STD * (1 - t) + t)


def straight() -> Straight:
    oracle = gaussian()
    return Straight(oracle.net, RF(), "velocity", adapter=oracle.adapter)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 4, 16])
def test_two_rectified_flow_is_exact_in_any_number_of_steps(steps) -> None:
    z = torch.linspace(-2, 2, 9)[:, None]
    for source in ("predicted", "initial"):
        end = sample(straight(), z, uniform_grid(RF(), steps), Cond(), noise=source)
        torch.testing.assert_close(end, MEAN + STD * z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["huber", "l2"])
def test_two_rectified_flow_is_reflow_s_fixed_point(metric) -> None:
    """The trainer's own loss on the flow's pairs; on shuffled ones it is the 1-flow's floor."""
    made = make("reflow", gaussian(), metric=metric, batch_size=512, t={"kind": "uniform"})
    made.players["student"].denoiser = straight()
    z = Rng(1).normal("pair", made.batch(0).index, (1,))
    x = MEAN + STD * z
    assert float(made.loss(made.batch(0, x=x, z=z), Rng(0)).value) < 1e-9
    assert float(made.loss(made.batch(0, x=x.roll(1, 0), z=z), Rng(0)).value) > 0.1


def test_pairs_refuse_velocities_that_are_singular_at_the_clean_end() -> None:
    teacher = Oracle(RF(), "x0", torch.zeros(1, 1))
    for method in ("reflow", "kd", "slim_flow", "perflow"):
        with pytest.raises(UserError, match=f"teacher: {method} regresses velocities"):
            make(method, teacher)


def test_velocity_loss_values() -> None:
    """l2 is a mean over dimensions; huber is (sqrt(sum + c^2) - c) / d with c = .00054 d."""
    x, z = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    t = torch.tensor([0.25, 1.0])
    v = z - x + torch.tensor([0.5, 2.0])[:, None, None, None]
    got = velocity_loss(v, x, z, t)
    torch.testing.assert_close(got, torch.tensor([0.25, 4.0]))
    d = 12
    c = 0.00054 * d
    expected = torch.tensor([(math.sqrt(s * d + c * c) - c) / d for s in (0.25, 4.0)])
    torch.testing.assert_close(velocity_loss(v, x, z, t, "huber"), expected)
    faded = velocity_loss(v, x, z, t, "faded_huber")
    torch.testing.assert_close(faded, torch.tensor([0.75, 0.0]) * expected)
    assert not velocity_loss(z - x, x, z, t, "huber").any()


# A mixture: the coupling is the quantile map -----------------------------------------------


def quantile_map(z: Tensor) -> Tensor:
    """x with F(x) = Phi(z) for the mixture 1/2 N(-2, .4^2) + 1/2 N(2, .4^2), fp64."""
    low, high = torch.full_like(z, -9.0), torch.full_like(z, 9.0)
    goal = torch.special.ndtr(z)
    for _ in range(60):
        middle = (low + high) / 2
        value = (
            torch.special.ndtr((middle + 2) / 0.4) + torch.special.ndtr((middle - 2) / 0.4)
        ) / 2
        low, high = torch.where(value < goal, middle, low), torch.where(value < goal, high, middle)
    return (low + high) / 2


def points() -> tuple[Tensor, Tensor]:
    """Noise at 200 equally likely places, and where the flow takes it, fp32 [200, 1]."""
    places = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    z = torch.special.ndtri(places)
    return z.float()[:, None], quantile_map(z).float()[:, None]


@torch.no_grad()
def test_solvers_approach_the_quantile_map_at_their_order() -> None:
    z, x = points()
    den = mixture()

    def error(steps: int, heun: bool) -> float:
        state, grid = z, uniform_grid(RF(), steps)
        if not heun:
            state = sample(den, z, grid, Cond())
        else:
            for t, r in zip(grid, grid[1:], strict=False):
                state = heun_step(den, state, full(state, t), full(state, r), Cond())
        return float((state - x).abs().mean())

    assert error(64, False) / error(128, False) == pytest.approx(2, abs=0.25)
    assert error(64, True) / error(128, True) == pytest.approx(4, abs=1.0)
    assert error(256, True) < 1e-3


@torch.no_grad()
def test_straightness_and_floor_add_up_to_the_shorter_transport() -> None:
    """E|z-x|^2 falls from 5.16 to 1.50 = before - S - V, with S near 1.03 and V near 2.64."""
    den = mixture()
    z, x = points()
    state, straightness, grid = z, 0.0, uniform_grid(RF(), 256)
    for t, r in zip(grid, grid[1:], strict=False):
        after = heun_step(den, state, full(state, t), full(state, r), Cond())
        speed = (state - after) / (t - r)
        straightness += float(((z - x) - speed).square().mean()) * (t - r)
        state = after
    nodes, weights = hermite(40)
    noise, part = torch.meshgrid(nodes.float(), nodes.float(), indexing="ij")
    w = torch.outer(weights, weights).flatten()
    image = torch.cat([0.4 * part.flatten() - 2, 0.4 * part.flatten() + 2])[:, None]
    noise, w = noise.flatten().repeat(2)[:, None], w.repeat(2) / 2
    floor = 0.0
    for t in MIDPOINTS:
        x_t = (1 - t) * image + t * noise
        v = den(x_t, full(x_t, t), Cond()).h
        floor += float((w * velocity_loss(v, image, noise, full(x_t, t))).sum()) / len(MIDPOINTS)
    after = float((z - x).square().mean())
    assert after == pytest.approx(1.50, abs=0.01)
    assert straightness == pytest.approx(1.03, abs=0.02)
    assert floor == pytest.approx(2.64, abs=0.02)
    assert 5.16 - after == pytest.approx(straightness + floor, abs=0.02)


# Training reaches the numbers --------------------------------------------------------------


def trained(method: str, steps: int, pairs, **keys: object) -> float:
    """Loss on 20,000 fresh samples of a small network after a few seconds of training."""
    den = Denoiser(small_mlp(dim=1, width=32, num_classes=0), RF(), "velocity")
    optim = {"lr": 5e-3, "decay": "cosine"}
    keys = {"steps": steps, "batch_size": 512, "t": {"kind": "uniform"}, "optim": optim, **keys}
    made = make(method, den, **keys)
    for step in range(steps):
        x, z = pairs(made.batch(step).index, step)
        made.step(step, made.batch(step, x=x, z=z))
    judge = make(method, den, **{**keys, "batch_size": 20_000})
    judge.players["student"].denoiser = made.best()
    x, z = pairs(judge.batch(0).index, steps)
    with torch.no_grad():
        return float(judge.loss(judge.batch(0, x=x, z=z), Rng(9)).value)


def flow_pairs(index: Tensor, step: int) -> tuple[Tensor, Tensor]:
    z = Rng(3).at(step).normal("z", index, (1,))
    return MEAN + STD * z, z


def shuffled_pairs(index: Tensor, step: int) -> tuple[Tensor, Tensor]:
    x, z = flow_pairs(index, step)
    return x.roll(1, 0), z


def test_flow_matching_trains_to_its_floor() -> None:
    network = {"type": "UNet2DModel"}
    loss = trained("denoising", 250, shuffled_pairs, network=network)
    assert loss == pytest.approx(STD * math.pi / 2, rel=0.03)


def test_reflow_trains_to_zero_on_pairs_and_to_the_floor_on_shuffled_ones() -> None:
    assert trained("reflow", 250, flow_pairs, metric="l2") < 0.01
    loss = trained("reflow", 250, shuffled_pairs, metric="l2")
    assert loss == pytest.approx(STD * math.pi / 2, rel=0.03)
