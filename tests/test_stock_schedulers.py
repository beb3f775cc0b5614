"""The samplers of trajectory students are those of diffusers' own schedulers (spec 1.12)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    FlowMatchLCMScheduler,
    SCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from stepdistill.pipelines.literal_grid import LiteralGridScheduler

SHAPE = (2, 3, 4, 4)


def row(alpha: float, sigma: float, a: float, b: float, time: float) -> dict[str, float]:
    """A step of the literal grid, whose network says h = a x + b z at alpha x + sigma z."""
    return {"alpha": alpha, "sigma": sigma, "a": a, "b": b, "time": time, "scale": 1.0, "expert": 0}


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def states(scheduler, times, seed: int | None, state: Tensor, **more) -> Iterator[Tensor]:
    """Every state of a scheduler's walk on a fixed nonlinear function of state and place."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for place, t in enumerate(times):
        h = torch.tanh(1.3 * state + 0.3 * place) - 0.4 * state
        told = {} if generator is None else {"generator": generator}
        state = scheduler.step(h, t, state, return_dict=False, **told, **more)[0]
        yield state


def near(ours: Tensor, stock: Tensor) -> bool:
    return bool(((ours - stock).abs() / stock.abs().clamp_min(1)).max() < 1e-5)


def walked(rows: list[dict[str, float]], noise: str, seed: int | None, state: Tensor):
    scheduler = LiteralGridScheduler({str(len(rows)): rows}, noise, len(rows))
    return states(scheduler, scheduler.timesteps, seed, state)


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.5], [1.0, 0.9, 0.75, 0.5]], ids=len)
def test_consistency_of_flows_is_flow_match_lcm(sigmas) -> None:
    stock = FlowMatchLCMScheduler()
    stock.set_timesteps(sigmas=sigmas)
    rows = [row(1 - s, s, -1, 1, 1000 * s) for s in sigmas]
    pairs = zip(
        walked(rows, "fresh", 5, start()), states(stock, stock.timesteps, 5, start()), strict=True
    )
    assert all(near(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("data", [0.5, 1.0])
@pytest.mark.parametrize("times", [[1.57080], [1.57080, 1.3], [1.5643, 1.3, 1.1, 0.6]], ids=len)
def test_continuous_time_students_are_scm(times, data) -> None:
    """x = cos t x_t - sin t h, with h = sigma_data F, and noise of the data's own spread."""
    stock = SCMScheduler(sigma_data=data)
    stock.set_timesteps(
        len(times), timesteps=[*times, 0.0], max_timesteps=None, intermediate_timesteps=None
    )
    rows = [
        row(math.cos(t), data * math.sin(t), -math.sin(t), data * math.cos(t), t) for t in times
    ]
    begin = data * start()
    pairs = zip(
        walked(rows, "fresh", 5, begin), states(stock, stock.timesteps[:-1], 5, begin), strict=True
    )
    assert all(near(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("places", [[39], [39, 17], [39, 25, 12, 4]], ids=len)
def test_consistency_of_exploding_noise_is_cm_stochastic(places) -> None:
    """x = c_skip x_t + c_out h, which is x_t at 0.002, and noise of sqrt(n^2 - 0.002^2)."""
    stock, least, data = CMStochasticIterativeScheduler(clip_denoised=False), 0.002, 0.5
    stock.set_timesteps(timesteps=places)
    rows = []
    for n, t in zip(stock.sigmas.tolist(), stock.timesteps.tolist(), strict=False):
        skip = data**2 / ((n - least) ** 2 + data**2)
        out = data * (n - least) / math.sqrt(n**2 + data**2)
        noise = math.sqrt(n**2 - least**2)
        rows.append(row(1.0, noise, (1 - skip) / out, -skip * noise / out, t))
    begin = 80.0 * start()
    stock.is_scale_input_called = True
    pairs = zip(
        walked(rows, "fresh", 5, begin), states(stock, stock.timesteps, 5, begin), strict=True
    )
    assert all(near(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [2, 4])
def test_segments_are_tcd_without_noise_but_for_its_last_step(steps, kind) -> None:
    """TCD ends at the state of the first entry of its table, a student at the clean image."""
    stock = TCDScheduler(prediction_type=kind)
    bar = stock.alphas_cumprod
    stock.set_timesteps(steps)
    rows = []
    for k in stock.timesteps.tolist():
        alpha, sigma = math.sqrt(bar[k]), math.sqrt(1 - bar[k])
        head = {"epsilon": (0, 1), "sample": (1, 0), "v_prediction": (-sigma, alpha)}[kind]
        rows.append(row(alpha, sigma, *head, k))
    ours = [*walked(rows, "predicted", None, start())]
    theirs = [*states(stock, stock.timesteps, None, start(), eta=0.0)]
    assert all(near(one, other) for one, other in zip(ours[:-1], theirs[:-1], strict=True))
    last, x = rows[-1], ours[-1]
    z = (ours[-2] - last["alpha"] * x) / last["sigma"]
    assert near(math.sqrt(bar[0]) * x + math.sqrt(1 - bar[0]) * z, theirs[-1])


def test_a_trig_grid_is_a_flow_s_sigmas() -> None:
    """s = sin t / (sin t + cos t): noise taken anew in the one is noise taken anew in the other."""
    for times, sigmas in (
        ((math.atan(80), 1.3, 1.0, 0.6), (0.98765, 0.78271, 0.60898, 0.40622)),
        ((math.atan(400), 1.3, 1.1, 0.6), (0.99751, 0.78271, 0.66270, 0.40622)),
    ):
        found = [math.sin(t) / (math.sin(t) + math.cos(t)) for t in times]
        assert found == pytest.approx(sigmas, abs=1e-5)
        trig = [row(math.cos(t), math.sin(t), 1, 0, t) for t in times]
        flow = [row(1 - s, s, 1, 0, 1000 * s) for s in found]
        # the networks see the same estimates: what is compared are states at equal noise
        scales = [math.sin(t) + math.cos(t) for t in times]
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        one = LiteralGridScheduler({"4": trig}, "fresh", 4)
        two = LiteralGridScheduler({"4": flow}, "fresh", 4)
        a, b = start(), start() / scales[0]
        for k, (s, t) in enumerate(zip(one.timesteps, two.timesteps, strict=True)):
            x = torch.tanh(a / scales[k])
            assert torch.allclose(x, torch.tanh(b), atol=1e-5)
            a = one.step(x, s, a, generator=generators[0], return_dict=False)[0]
            b = two.step(x, t, b, generator=generators[1], return_dict=False)[0]
        assert torch.allclose(a, b, atol=1e-6)
