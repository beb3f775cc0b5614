"""Consistency distillation against its fixed points: products of cosines on Gaussian flows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import EDM, RF, VP, Trig
from stepdistill.losses.consistency import InverseGap, One, ect_partner, level_partner
from stepdistill.losses.distance import L2, Huber, PseudoHuber
from stepdistill.losses.regression import huber_constant, pseudo_huber
from stepdistill.oracles.denoiser import Oracle
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from tests.helpers import batch_of, make, mlp_teacher, run

STD = 0.7
Gain = Callable[[float], float]


def radius(t: float) -> float:
    return math.hypot((1 - t) * STD, t)


def angle(t: float) -> float:
    return math.atan2(t, (1 - t) * STD)


def euler(t: float, r: float) -> float:
    """What one Euler step multiplies a state by."""
    return radius(r) / radius(t) * math.cos(angle(t) - angle(r))


def heun(t: float, r: float) -> float:
    """What one Heun step multiplies a state by; the last one is Euler's."""

    def speed(t: float) -> float:
        return (t - (1 - t) * STD**2) / radius(t) ** 2

    return 1 + (r - t) / 2 * (speed(t) + speed(r) * euler(t, r)) if r > 0 else euler(t, r)


def on_grid(step: Callable[[float, float], float], count: int, skip: int) -> Gain:
    """The fixed point on a grid: every step's factor on the way to 0."""

    def gain(t: float) -> float:
        place, total = round((1 - t) * count), 1.0
        while place < count:
            after = min(place + skip, count)
            total *= step(1 - place / count, 1 - after / count)
            place = after
        return total

    return gain


def on_ect(stage: int) -> Gain:
    """The fixed point of ECT's pairs: the chain t, r(t), r(r(t)), ... to 0."""

    def gain(t: float) -> float:
        total, share = 1.0, 1 - 2.0 ** -(stage + 1)
        while t > 1e-7:
            total *= euler(t, t * share)
            t *= share
        return total * STD / radius(t)

    return gain


class Linear(Denoiser):
    """A student that multiplies the state by gain(t)."""

    gain: Gain

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return torch.tensor([[self.gain(float(level))] for level in t]) * x_t


def student(teacher: Denoiser, gain: Gain) -> Linear:
    made = Linear(teacher.net, RF(), "x0", adapter=teacher.adapter)
    made.gain = gain
    return made


def loss_of(gain: Gain, step: int = 0, **keys: object) -> float:
    """The trainer's own loss for a student of the given gain."""
    teacher = Oracle(RF(), "velocity", torch.zeros(1, 1), STD)
    made = make("consistency", teacher, batch_size=64, metric="l2", weight="one", **keys)
    made.players["student"].denoiser = student(teacher, gain)
    return float(made.loss(batch_of(made, step), Rng(0).at(step)).value)


def exact(t: float) -> float:
    return STD / radius(t)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(("count", "skip"), [(8, 1), (12, 3), (10, 4)])
def test_fixed_point_on_a_grid(solver, count, skip) -> None:
    """The student inherits the solver's bias, whole."""
    keys = {"pairs": {"kind": "grid", "steps": count, "skip": skip}, "solver": solver}
    biased = on_grid({"euler": euler, "heun": heun}[solver], count, skip)
    assert loss_of(biased, **keys) < 1e-10
    assert loss_of(exact, **keys) > (1e-6 if solver == "heun" else 1e-4)
    assert abs(biased(1.0) / exact(1.0) - 1) > 1e-3


@pytest.mark.parametrize(("step", "stage"), [(0, 0), (2, 1), (3, 2), (5, 3)])
def test_fixed_point_of_ect_s_pairs(step, stage) -> None:
    """Six steps of four stages: the pair's ratio, and with it the fixed point, is the stage's."""
    keys = {"pairs": {"kind": "ect", "stages": 4}}
    assert loss_of(on_ect(stage), step, **keys) < 1e-10
    assert loss_of(on_ect(stage + 1), step, **keys) > 1e-7


def on_levels(stage: int) -> Gain:
    """The fixed point of the published pairs, written out in noise levels n = t / (1 - t)."""

    def gain(t: float) -> float:
        total, now, n = 1.0, t, min(t / (1 - t), 80.0) if t < 1 else 80.0
        while now > 1e-7:
            below = n * (1 - (1 + 8 / (1 + math.exp(n))) / 2 ** (stage + 1))
            after = below / (1 + below) if below > 0 else 0.0
            total *= euler(now, after)
            now, n = after, below
        return total

    return gain


@pytest.mark.parametrize(("step", "stage"), [(0, 0), (2, 1), (3, 2), (5, 3)])
def test_fixed_point_of_ect_s_pairs_of_noise_levels(step, stage) -> None:
    keys = {"pairs": {"kind": "ect", "stages": 4, "k": 8}}
    assert loss_of(on_levels(stage), step, **keys) < 1e-10
    assert loss_of(on_ect(stage), step, **keys) > 1e-7


def best_scale(gain: Gain, count: int) -> float:
    """Where the loss on the data's own states rests: the factor on gain(t), gain(r) being held."""
    teacher = Oracle(RF(), "velocity", torch.zeros(1, 1), STD)
    made = make(
        "consistency",
        teacher,
        batch_size=20_000,
        solver="data",
        target="ema",
        metric="l2",
        weight="one",
        pairs={"kind": "grid", "steps": count},
    )
    batch, rng = made.batch(0), Rng(3).at(0)
    batch = replace(batch, x=STD * rng.normal("image", batch.index, (1,)))
    made.target_net = student(teacher, gain)
    losses = []
    for factor in (0.9, 1.0, 1.1):
        made.players["student"].denoiser = student(teacher, lambda t, f=factor: f * gain(t))
        losses.append(float(made.loss(batch, rng).value))
    low, middle, high = losses  # a parabola
    return 1 - 0.05 * (high - low) / (high - 2 * middle + low)


@pytest.mark.parametrize("count", [2, 4])
def test_training_on_data_has_the_fixed_point_of_euler_s_steps(count) -> None:
    """The mean of x_r given x_t is where one Euler step of the exact teacher leads."""
    assert best_scale(on_grid(euler, count, 1), count) == pytest.approx(1.0, abs=0.01)
    assert best_scale(exact, count) < 0.98


def test_solver_data_asks_the_teacher_nothing() -> None:
    """With it another teacher gives the same loss, and nothing can be guided."""
    losses = []
    for time_scale in (1000.0, 500.0):
        made = make("consistency", mlp_teacher(time_scale=time_scale), solver="data")
        made.players["student"].denoiser = mlp_teacher()
        losses.append(float(made.loss(batch_of(made, 0), Rng(0).at(0)).value.detach()))
    assert losses[0] == losses[1]
    for keys in ({"guidance": 2.0}, {"guidance_range": (1.0, 3.0)}):
        with pytest.raises(UserError, match="solver=data"):
            make("consistency", mlp_teacher(), solver="data", **keys)


def test_fixed_points_draw_near_the_exact_map() -> None:
    ratios = [on_ect(stage)(0.9) / exact(0.9) for stage in range(7)]
    assert ratios == sorted(ratios)
    assert 1 - ratios[-1] < 0.02
    trig = [math.cos(math.pi / 2 / n) ** n for n in (2, 4, 8)]
    assert trig == pytest.approx([0.5, 0.72855, 0.85623], abs=1e-5)


def test_first_stage_of_ect_halves_the_time() -> None:
    t = torch.tensor([0.1, 0.5, 1.0])
    torch.testing.assert_close(ect_partner(t, 0), t / 2)
    torch.testing.assert_close(ect_partner(t, 2), t * 7 / 8)
    torch.testing.assert_close(ect_partner(t, 0, q=4.0), t * 3 / 4)


LINEAR = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)


@pytest.mark.parametrize("process", [EDM(), RF(), VP((1 - LINEAR).cumprod(0)), Trig()])
def test_published_map_of_ect_is_of_noise_levels_in_any_process(process) -> None:
    """Numbers of the paper's map at its first stage: none below 1, .31 at 3, a half far up."""
    n = torch.tensor([0.5, 1.0, 3.0, 20.0], dtype=torch.float64)
    t = process.time_of_noise(n.log())
    r = level_partner(t, 0, 2.0, 8.0, process)
    assert r[:2].tolist() == [0, 0]
    share = torch.exp(-process.log_snr(r[2:]) / 2) / n[2:]
    torch.testing.assert_close(share, torch.tensor([0.31, 0.5], dtype=t.dtype), atol=2e-3, rtol=0)
    weight = InverseGap(levels=True)(t, r, process)
    torch.testing.assert_close(weight, 1 / (n - n * torch.cat([torch.zeros(2), share])))


@pytest.mark.parametrize("process", [EDM(), RF(), VP((1 - LINEAR).cumprod(0)), Trig()])
def test_published_pairs_never_meet_and_leave_pure_noise(process) -> None:
    low = max(process.t_min, 1e-3)
    t = torch.linspace(low, process.t_max, 400)
    for stage in range(30):
        r = level_partner(t, stage, 2.0, 8.0, process)
        level = torch.exp(-process.log_snr(t) / 2).clamp_max(80)
        kept = (1 + 8 * torch.sigmoid(-level)) * 2.0 ** -(stage + 1) < 1
        assert (r < t).all() and ((r > 0) == (kept & (t > process.t_min))).all()
    weight = InverseGap(levels=True)
    grid = process.warp(torch.linspace(1, 0, 129))
    n = torch.exp(-process.log_snr(grid.double()) / 2)
    found = weight(grid[:-1], grid[1:], process)
    assert (found <= 1.01 / (n[:-1] - n[1:]) + 1e-9).all()
    top = level_partner(t[-1:], 0, 2.0, 8.0, process)
    assert float(torch.exp(-process.log_snr(top) / 2)) == pytest.approx(40, rel=1e-3)


def test_pairs_of_a_stage_and_their_weights() -> None:
    made = make("consistency", mlp_teacher(), steps=8, pairs={"kind": "ect", "stages": 4})
    for step in range(8):
        t, r = made.times(made.batch(step), Rng(0).at(step))
        torch.testing.assert_close(r, t * (1 - 2.0 ** -(step // 2 + 1)))
        torch.testing.assert_close(InverseGap()(t, r, made.process) * (t - r), torch.ones(8))
    assert torch.equal(One()(t, r, made.process), torch.ones(8))


def test_pairs_on_a_grid_cover_it_and_stop_at_zero() -> None:
    keys = {"kind": "grid", "steps": 5, "skip": 2}
    made = make("consistency", mlp_teacher(), batch_size=256, pairs=keys)
    t, r = made.times(made.batch(0), Rng(0).at(0))
    pairs = {(round(float(a), 6), round(float(b), 6)) for a, b in zip(t, r, strict=True)}
    assert pairs == {(1.0, 0.6), (0.8, 0.4), (0.6, 0.2), (0.4, 0.0), (0.2, 0.0)}


def test_estimate_at_zero_is_the_state_itself() -> None:
    made = make("consistency", mlp_teacher())
    x = torch.ones(8, 4)
    t = torch.tensor([0.0, 0.5] * 4)
    got = made.jump(made.teacher, x, t, torch.zeros(8), made.batch(0))
    assert torch.equal(got[0::2], x[0::2])
    assert not torch.equal(got[1::2], x[1::2])


def test_ema_target_follows_the_student() -> None:
    keys = {"target": "ema", "target_decay": 0.75}
    made = make("consistency", mlp_teacher(), **keys)
    before = [p.clone() for p in made.target_net.net.parameters()]
    run(made, 0, 1)
    for old, target, new in zip(
        before, made.target_net.net.parameters(), made.players["student"].params, strict=True
    ):
        assert not target.requires_grad
        torch.testing.assert_close(target, 0.75 * old + 0.25 * new)


def test_ema_target_is_what_the_loss_aims_at() -> None:
    made = make("consistency", mlp_teacher(), target="ema", metric="l2", weight="one")
    batch, rng = batch_of(made, 0), Rng(0).at(0)
    plain = float(made.loss(batch, rng).value)
    with torch.no_grad():
        for param in made.target_net.net.parameters():
            param.mul_(1.5)
    assert float(made.loss(batch, rng).value) != pytest.approx(plain, rel=1e-3)


def test_guidance_range_draws_a_scale_a_sample() -> None:
    """With an all-zero range the teacher's step is the null one, whatever the label."""
    keys = {"guidance_range": (0.0, 0.0), "metric": "l2"}
    made = make("consistency", mlp_teacher(), **keys)
    null = make("consistency", mlp_teacher(), metric="l2", guidance=0.0)
    batch, rng = batch_of(made, 0), Rng(0).at(0)
    got, expected = (float(m.loss(batch, rng).value) for m in (made, null))
    assert got == pytest.approx(expected, rel=1e-6)
    assert got != pytest.approx(
        float(make("consistency", mlp_teacher(), metric="l2").loss(batch, rng).value), rel=1e-4
    )


@pytest.mark.parametrize(("dims", "expected"), [(3072, 0.02993), (12288, 0.05986)])
def test_huber_constant(dims, expected) -> None:
    assert huber_constant(torch.Size([5, dims])) == pytest.approx(expected, abs=5e-6)


def test_distances() -> None:
    delta = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(L2()(delta), torch.tensor([25.0, 0.0]))
    expected = torch.tensor([math.sqrt(25.01) - 0.1, 0.0])
    torch.testing.assert_close(pseudo_huber(delta, 0.1), expected)
    torch.testing.assert_close(PseudoHuber(scale=0.1 / 2**0.5)(delta), expected)
    torch.testing.assert_close(PseudoHuber()(delta), pseudo_huber(delta, 0.00054 * 2**0.5))
    each = math.sqrt(9.01) + math.sqrt(16.01) - 0.2
    torch.testing.assert_close(Huber(c=0.1)(delta), torch.tensor([each, 0.0]))


def test_a_user_s_own_distance_and_weight_of_pairs(tmp_path) -> None:
    """Named in the config, both enter the loss."""
    file = tmp_path / "own.py"
    file.write_text(
        "from stepdistill.losses.consistency import PairWeight\n"
        "from stepdistill.losses.distance import Distance\n"
        "class Three(PairWeight):\n"
        "    def __call__(self, t, r, process):\n"
        "        return 3 + 0 * t\n"
        "class Double(Distance):\n"
        "    def __call__(self, y):\n"
        "        return 2 * y.square().flatten(1).sum(1)\n",
        encoding="utf-8",
    )
    own = {"weight": f"{file}:Three", "metric": f"{file}:Double"}
    made = [make("lcm", mlp_teacher(), **keys) for keys in ({"metric": "l2"}, own)]
    batch = batch_of(made[0], 0)
    plain, named = (float(one.loss(batch, Rng(0).at(0)).value) for one in made)
    assert named == pytest.approx(6 * plain, rel=1e-5)


@pytest.mark.parametrize(("key", "base"), [("metric", "Distance"), ("weight", "PairWeight")])
def test_a_plug_in_that_gives_no_number_a_sample_is_told(tmp_path, key, base) -> None:
    """Else a column times a row would weigh every sample by every other's."""
    file = tmp_path / "wide.py"
    file.write_text(
        "from stepdistill.losses.consistency import PairWeight\n"
        "from stepdistill.losses.distance import Distance\n"
        f"class Wide({base}):\n"
        "    def __call__(self, y, *more):\n"
        "        return y.reshape(len(y), -1).square().sum(1, keepdim=True)\n",
        encoding="utf-8",
    )
    made = make("consistency", mlp_teacher(), **{key: f"{file}:Wide"})
    with pytest.raises(
        UserError, match=rf"{key}: .*Wide gives values of shape \[8, 1\] for 8 samples"
    ):
        made.loss(batch_of(made, 0), Rng(0).at(0))
