"""Continuous-time consistency: its tangent in closed form, and the methods that add to it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stepdistill.adapters.cond import Cond
from stepdistill.commands.bench_jvp import jvp
from stepdistill.diffusion.denoiser import Denoiser, Prediction
from stepdistill.diffusion.derivative import along, drift
from stepdistill.diffusion.process import RF, Process, Trig, expand
from stepdistill.losses.continuous import Angle, bounded, field, tangent
from stepdistill.oracles.denoiser import Oracle
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from tests.helpers import (
    AffineAdapter,
    batch_of,
    dit_teacher,
    make,
    mlp_teacher,
    processes,
    run,
    same,
    saved,
    unet_teacher,
)

KINDS = processes()
every_process = pytest.mark.parametrize("process", KINDS.values(), ids=KINDS.keys())


class Exact(Denoiser):
    """The flow's own end from any state, of data N(0, std^2): x = std x_t / rho_t."""

    def __init__(self, process: Process, std: float) -> None:
        super().__init__(nn.Linear(1, 1), process, "x0", adapter=AffineAdapter())
        self.std = std

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        c = self.process.coefs(t).expand(x_t)
        return self.std * x_t / torch.sqrt((c.alpha * self.std) ** 2 + c.sigma**2)


@torch.no_grad()
def told(process: Process, student: Denoiser, std: float, data: float, warmth: float, **keys):
    """Times, states, the tangent there, and F of student and teacher."""
    n = torch.logspace(-1.5, 1.1, 13, dtype=torch.float64)
    t = process.time_at(-2 * n.log()).float()
    x_t = torch.randn(len(t), 3, generator=torch.Generator().manual_seed(0))
    teacher = Oracle(process, "velocity", torch.zeros(1, 3), std)
    pred, k = teacher(x_t, t, Cond()), process.coefs(t).expand(x_t)
    speed = k.d_alpha * pred.x + k.d_sigma * pred.z
    own, slope = along(student, x_t, t, Cond(), speed, lambda p: field(p.x, p.z, p.c, data))
    at = Angle.of(process, t, data, **keys)
    real = field(pred.x, pred.z, k, data)
    return x_t, at, tangent(own, slope, real, x_t, at, warmth), own, real


# The tangent -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [True, False])
@every_process
def test_scm_s_tangent_vanishes_where_the_estimate_is_the_flow_s_end(process, cosine) -> None:
    for std, data in ((0.5, 0.5), (1.3, 0.5), (0.4, 1.0)):
        _, _, g, own, _ = told(process, Exact(process, std), std, data, 1.0, cosine=cosine)
        assert float(g.abs().max()) < 2e-4 * float(own.abs().max())
        other = told(process, Exact(process, 0.8 * std), std, data, 1.0, cosine=cosine)[2]
        assert float(other.abs().max()) > 1e-2


@every_process
def test_scm_s_warm_up_leaves_a_share_of_the_teacher_s_gap(process) -> None:
    """At the flow's end g = -(1 - r) cos^2 (F - F_T)."""
    _, at, g, own, real = told(process, Exact(process, 0.7), 0.7, 0.7, 0.25, cosine=True)
    expected = -0.75 * expand(at.cos**2, own) * (own - real)
    assert torch.allclose(g, expected, atol=3e-4)


@pytest.mark.parametrize(
    ("std", "slopes"),
    [(0.5, (-0.30227, -0.84559, -1.52041)), (1.0, (-0.53543, -1.61547, -3.21140))],
)
def test_the_velocity_of_the_flow_s_end_is_the_closed_form(std, slopes) -> None:
    """F*(x) = (cos tau - s / rho) x / (sigma_data sin tau), sigma_data = 0.5."""
    tau = torch.tensor([0.3, 0.8, 1.3], dtype=torch.float64)
    process = Trig(0.5)
    t = process.time_at(-2 * (0.5 * tau.tan()).log()).float()
    x_t = torch.ones(3, 1)
    pred = Exact(process, std)(x_t, t, Cond())
    found = field(pred.x, pred.z, pred.c, 0.5)[:, 0]
    assert found.tolist() == pytest.approx(slopes, abs=3e-5)


def test_sana_sprint_needs_no_conversion_of_a_flow_teacher() -> None:
    """F of a flow teacher's state is F of the Trig state of the same image and noise."""
    std, tau = 0.6, torch.tensor([0.2, 0.9, 1.4])
    s = tau.sin() / (tau.sin() + tau.cos())
    x_trig = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    x_flow = x_trig * expand(torch.sqrt(s**2 + (1 - s) ** 2), x_trig)
    found = []
    for process, t, x_t in (
        (RF(), s, x_flow),
        (Trig(1.0), Trig(1.0).time_at(-2 * tau.tan().log()), x_trig),
    ):
        pred = Oracle(process, "velocity", torch.zeros(1, 2), std)(x_t, t, Cond())
        found.append(field(pred.x, pred.z, pred.c, 1.0))
    assert torch.allclose(found[0], found[1], atol=1e-5)
    v = Oracle(RF(), "velocity", torch.zeros(1, 2), std)(x_flow, s, Cond())
    q = expand(torch.sqrt(s**2 + (1 - s) ** 2), x_flow)
    published = (expand(1 - 2 * s, q) * x_flow + q**2 * (v.z - v.x)) / q
    assert torch.allclose(found[0], published, atol=1e-5)


def test_tangents_are_made_small_sample_by_sample() -> None:
    g = torch.tensor([[3.0, 4.0], [0.03, 0.04], [float("nan"), 1.0]])
    norm = bounded(g, "norm", 0.1)
    assert norm[0].tolist() == pytest.approx([3 / 5.1, 4 / 5.1])
    assert norm[1].tolist() == pytest.approx([0.2, 0.04 / 0.15])
    assert norm[2].tolist() == pytest.approx([0.0, 1 / 1.1])
    assert bounded(g, "clamp", 0.1)[0].tolist() == [1.0, 1.0]
    assert bounded(g[:2], "none", 0.1).equal(g[:2])


def test_scm_warms_up_and_goes_on_where_it_was_after_a_resume() -> None:
    made = make("scm", mlp_teacher(), warmup=4, steps=12)
    assert [made.warmth(step) for step in (0, 3, 4, 11)] == [0.2, 0.8, 1.0, 1.0]
    again = make("scm", mlp_teacher(), warmup=4, steps=12)
    run(made, 0, 8)
    run(again, 0, 3)
    third = make("scm", mlp_teacher(), warmup=4, steps=12)
    third.load_state(3, *saved(again))
    run(third, 3, 8)
    same(made.state(), third.state())


@pytest.mark.parametrize(
    ("method", "keys", "line"),
    [
        ("scm", {"velocity": "data", "guidance": 2.0}, "velocity=data asks the teacher nothing"),
        ("scm", {"warmup": 6, "steps": 6}, "warmup=6: the derivative would never"),
        ("tbcm", {"calm_from": 6, "steps": 6, "points": 2}, "calm_from=6: the derivative has"),
        ("scm", {"compile": True}, "set adaptive=false or compile=false"),
        ("flow_map", {"derivative": "difference"}, "derivative=difference: form=lsd with"),
        ("tbcm", {"points": 3}, "make it a multiple of 3"),
        ("rcm", {"alone": 6, "steps": 6}, "alone=6 leaves the fake score none"),
    ],
)
def test_what_makes_no_sense_is_refused(method, keys, line) -> None:
    with pytest.raises(UserError, match=line):
        make(method, mlp_teacher(), **keys)


# Derivatives along the flow ----------------------------------------------------------------------


@pytest.mark.parametrize("teacher", [mlp_teacher, dit_teacher, unet_teacher])
def test_every_way_of_a_derivative_finds_the_same_on_every_network(teacher) -> None:
    den, rng = teacher(), torch.Generator().manual_seed(0)
    x_t, speed = torch.randn(2, 4, *den.sample_shape, generator=rng)
    t, cond = torch.tensor([0.2, 0.4, 0.6, 0.8]), Cond(torch.tensor([0, 1, 2, 3]))
    _, exact = along(den, x_t, t, cond, speed, drift)
    size = float(exact.abs().max())
    for way, near in (("difference", 0.15), ("upwind", 0.15), ("central", 0.02), ("semi", 0.15)):
        own, slope = along(den, x_t, t, cond, speed, drift, way=way, step=1e-4)
        assert float((slope - exact).abs().max()) < near * size, way
        assert torch.allclose(own, along(den, x_t, t, cond, speed, drift)[0], atol=1e-5)
        assert not slope.requires_grad


@pytest.mark.parametrize(("way", "order"), [("difference", 1), ("upwind", 2), ("central", 2)])
def test_the_orders_of_differences(way, order) -> None:
    den, gaps = Exact(Trig(1.0), 0.6), []
    x_t = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.3, 1.2, 8)
    _, exact = along(den, x_t, t, Cond(), x_t, drift)
    for step in (0.02, 0.01):
        _, slope = along(den, x_t, t, Cond(), x_t, drift, way=way, step=step)
        gaps.append(float((slope - exact).abs().max()))
    assert gaps[1] / gaps[0] == pytest.approx(0.5**order, abs=0.05)


@pytest.mark.parametrize("turns", [25, 40, 75])
def test_ways_that_look_back_damp_fast_waves_and_others_leave_them(turns) -> None:
    """Descent along a derivative takes from a wave what of it is in phase with the wave itself."""
    den = Exact(RF(), 0.6)
    t = torch.arange(0.2, 0.8, 1e-3)
    state = torch.zeros(len(t), 1)
    wave = 2 * math.pi * turns

    def view(pred: Prediction) -> Tensor:
        return (wave * pred.c.sigma).sin()

    for way in ("jvp", "central", "difference", "upwind"):
        value, slope = along(den, state, t, Cond(), state, view, way=way, step=0.01)
        share = float((value * slope).mean() / (value.norm() * slope.norm().clamp_min(1e-6)))
        share *= len(t)
        assert share > 0.3 if way in ("difference", "upwind") else abs(share) < 0.05, way


def test_the_central_difference_is_one_sided_at_the_top() -> None:
    den = Exact(Trig(1.0), 0.6)
    x_t = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    top = torch.full((8,), math.pi / 2)
    one = along(den, x_t, top, Cond(), x_t, drift, way="central", step=0.01)[1]
    other = along(den, x_t, top, Cond(), x_t, drift, way="difference", step=0.01)[1]
    assert torch.allclose(one, other, atol=1e-4)


@every_process
@pytest.mark.parametrize("way", ["central", "upwind", "difference", "semi"])
def test_differences_of_one_step_are_as_good_at_every_level_of_every_process(process, way) -> None:
    """A step in the process's own time would be too long at EDM's cleaner levels."""
    den = Exact(process, 0.6)
    s = torch.linspace(0.05, 0.92, 17)  # VP has 0.028 to 0.936
    t = process.time_of_flow(s)
    x, z = torch.randn(2, 17, 3, generator=torch.Generator().manual_seed(0))
    x_t, k = process.noise(0.6 * x, z, t), process.coefs(t).expand(x)
    speed = k.d_alpha * 0.6 * x + k.d_sigma * z
    flow = expand(process.flow_rate(t), x)
    exact = along(den, x_t, t, Cond(), speed, drift)[1] / flow
    _, slope = along(den, x_t, t, Cond(), speed, drift, way=way, step=0.01)
    bound = 0.01 if way in ("central", "upwind") else 0.15
    assert float((slope / flow - exact).abs().max()) < bound * float(exact.abs().max())


def test_bench_jvp_tells_time_memory_and_agreement(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = jvp("scm-digits", ("batch_size=4",), rounds=3, threads=1, step=2e-5)
    assert list(found) == ["forward", "jvp", "upwind", "difference", "central", "semi"]
    assert all(one["seconds"] > 0 and one["bytes"] > 0 for one in found.values())
    assert found["jvp"]["bytes"] > found["forward"]["bytes"]
    assert found["jvp"]["difference"] == 0 and "difference" not in found["forward"]
    assert all(found[way]["difference"] < 0.1 for way in list(found)[2:])


def test_bench_jvp_takes_the_config_s_own_step(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    jvp("scm-digits", ("batch_size=4", "difference_step=0.0125"), rounds=3, threads=1, step=None)
    assert "0.0125" in capsys.readouterr().out


# TBCM --------------------------------------------------------------------------------------------


def test_tbcm_trains_on_the_teacher_s_own_walk_at_one_time_an_interval() -> None:
    """Each state is the Euler step from the one before it, beginning with pure noise."""
    teacher = mlp_teacher()
    made = make("tbcm", teacher, points=4, batch_size=8)
    batch, rng = batch_of(made, 0), Rng(0).at(0)
    x_t, t, x, z = made.states(batch, rng)
    walks = t.unflatten(0, (2, 4))
    for place in range(4):
        assert ((walks[:, place] <= 1 - place / 4) & (walks[:, place] >= 0.75 - place / 4)).all()
    noise = rng.normal("z", batch.index[::4], (4,))
    cond = batch.cond.rows(slice(0, None, 4))
    at, state = torch.ones(2), noise
    for place in range(4):
        with torch.no_grad():
            pred = teacher(state, at, cond)
        at = walks[:, place]
        state = (1 - at)[:, None] * pred.x + at[:, None] * pred.z
        assert torch.allclose(x_t.unflatten(0, (2, 4))[:, place], state, atol=1e-6)
    with torch.no_grad():
        pred = teacher(x_t, t, batch.cond)
    assert torch.allclose(pred.x, x, atol=1e-6) and torch.allclose(pred.z, z, atol=1e-6)
    assert (batch.cond.label.unflatten(0, (2, 4)).diff(dim=1) == 0).all()


def calm_gain(std: float, weight: float, count: int = 40_000) -> float:
    """One step's gain where F = a(tau) x has the tangent 0 at weight r of the derivative.

    a' = -(cot tau / r) (a - b) - 1 - a b, with b of the teacher's F_T = b x, from 0 to pi / 2.
    """

    def change(tau: float, a: float) -> float:
        rho = (std * math.cos(tau)) ** 2 + math.sin(tau) ** 2
        b = math.sin(tau) * math.cos(tau) * (1 - std**2) / rho
        return -(a - b) / (math.tan(tau) * weight) - 1 - a * b

    tau, a = 1e-4, 0.0
    step = (math.pi / 2 - 2 * tau) / count
    for _ in range(count):
        middle = a + step / 2 * change(tau, a)
        a, tau = a + step * change(tau + step / 2, middle), tau + step
    return -a


@pytest.mark.parametrize(
    ("std", "gains"), [(1.0, (1.0, 0.91074, 0.78540)), (0.5, (0.5, 0.41656, 0.31515))]
)
def test_tbcm_s_calm_rests_beside_the_flow(std, gains) -> None:
    """The published weights of a calmed derivative cost 9 and 17 percent of one step's spread."""
    for weight, gain in zip((1.0, 0.75, 0.5), gains, strict=True):
        assert calm_gain(std, weight) == pytest.approx(gain, abs=1e-3)


def test_tbcm_s_calmed_tangent_vanishes_at_that_solution() -> None:
    """The tangent's own formula, at F = a x and its derivative by that equation (std 1, b = 0)."""
    weight, tau = 0.75, torch.tensor([0.4, 0.9, 1.3])
    a = torch.tensor([-0.2, -0.5, -0.8])
    x_t = torch.ones(3, 1)
    slope = -a / (tau.tan() * weight) - 1  # of a; along the flow x does not move, as b = 0
    at = Angle.of(Trig(1.0), tau, 1.0, cosine=True)
    g = tangent(a[:, None] * x_t, slope[:, None], torch.zeros(3, 1), x_t, at, weight)
    assert float(g.abs().max()) < 1e-5


def test_tbcm_calms_down_after_its_warm_up() -> None:
    keys = {"warmup": 3, "calm_from": 6, "calm_steps": 4, "calm_to": 0.5, "points": 2}
    made = make("tbcm", mlp_teacher(), steps=16, **keys)
    weights = [made.warmth(step) for step in (0, 3, 6, 8, 10, 15)]
    assert weights == [0.25, 1.0, 1.0, 0.75, 0.5, 0.5]


# SANA-Sprint -------------------------------------------------------------------------------------


def test_sana_sprint_begins_a_share_of_its_samples_with_pure_noise() -> None:
    made = make("sana_sprint", mlp_teacher(), batch_size=256, from_noise=0.25)
    seen = []
    student = made.denoiser("student")
    student.net.register_forward_pre_hook(lambda net, args: seen.append(args[1]))
    made.estimate(batch_of(made, 0), Rng(0).at(0))
    share = (seen[0] == made.process.network_time(torch.ones(1))).float().mean()
    assert float(share) == pytest.approx(0.25, abs=0.08)


def test_sana_sprint_shows_the_discriminator_data_under_other_classes() -> None:
    made = make("sana_sprint", mlp_teacher(), batch_size=64)
    batch = batch_of(made, 0)
    wrong = made.mislabelled(batch, Rng(0).at(0))
    assert (wrong.cond.label != batch.cond.label).all()
    assert set(wrong.cond.label.tolist()) == {0, 1, 2}
    logs = made.step(0, batch)
    assert "discriminator/wrong" in logs
    assert "discriminator/wrong" not in make(
        "sana_sprint", mlp_teacher(), batch_size=64, mismatched=False
    ).step(0, batch)


def test_sana_sprint_s_discriminator_moves_the_student() -> None:
    """After its first update the heads' gradient reaches the student, by its weight."""
    teacher, found = mlp_teacher(), []
    for weight in (0.0, 0.5):
        made = make("sana_sprint", teacher, adversary={"student": weight}, steps=8)
        run(made, 0, 6)
        found.append(torch.cat([p.detach().flatten() for p in made.players["student"].params]))
    assert float((found[0] - found[1]).abs().max()) > 1e-6
