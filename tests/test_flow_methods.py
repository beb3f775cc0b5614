"""Methods on lines from noise to image against closed form, in every process: reflow, kd, perflow
and slim_flow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.commands.export import export
from stepdistill.commands.read import read_config
from stepdistill.commands.train import train
from stepdistill.diffusion.heads import HEADS
from stepdistill.diffusion.process import EDM, RF, VP, Process, Trig, translate
from stepdistill.diffusion.sampler import first_state, full, sample
from stepdistill.diffusion.saved import stock_config
from stepdistill.losses.features import RandomConv
from stepdistill.losses.reflow import feature_distance, line_noise, mixed_noise, window_line
from stepdistill.oracles.denoiser import Oracle
from stepdistill.oracles.named import read_teacher
from stepdistill.proof.judge import judge
from stepdistill.proof.trial import Case, Trial
from stepdistill.proof.trial import run as prove
from stepdistill.run.assets import load_teacher
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.find import trainer
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.flow.slim_flow import annealed
from stepdistill.trainers.smaller import smaller
from tests.helpers import close, dit_teacher, make, mlp_teacher, noise, processes, scaled_linear

TEACHERS: dict[str, tuple[Process, str]] = {
    "vp, noise": (VP(scaled_linear()), "eps"),
    "vp, v": (VP(scaled_linear()), "v"),
    "edm": (EDM(), "edm-f"),
    "trig": (Trig(), "trig-f"),
    "rf, noise": (RF(), "eps"),
}
every_teacher = pytest.mark.parametrize("name", TEACHERS)

# Lines and velocities in every process ------------------------------------------------------------


@every_teacher
def test_lines_begin_at_the_sampler_s_first_state(name) -> None:
    process, head = TEACHERS[name]
    made = make("reflow", Oracle(process, head, torch.zeros(1, 4), 0.7))
    x, z = noise(1), noise(2)
    begin = process.noise(x, made.line(x, z), full(x, made.top))
    scale = float(process.coefs(torch.tensor([made.top])).sigma)
    close(begin / scale, first_state(process, z, made.top) / scale)


def test_from_pure_noise_a_line_s_noise_is_the_pair_s_to_the_bit() -> None:
    x, z = noise(1), noise(2)
    assert torch.equal(line_noise(x, z, RF().coefs(torch.ones(16)).expand(x)), z)


def test_the_velocity_of_edm_is_rfpp_s_without_its_singularities() -> None:
    """v = (t - s^2 (1-t)) / Q x_t - (s / sqrt Q) F, Q = s^2 (1-t)^2 + t^2 (spec 1.2)."""
    edm, t = EDM(), torch.linspace(0.01, 0.98, 16, dtype=torch.float64)
    x_t, f = noise(1).double(), noise(2).double()
    y, at = translate(x_t, t, RF(), edm)
    teacher = Oracle(edm, "edm-f", torch.zeros(1, 4))
    drift = teacher.prediction(f, y * _size(y, at, edm), edm.coefs(at).expand(y)).drift
    s, t = 0.5, t[:, None]
    q = s**2 * (1 - t) ** 2 + t**2
    close(drift, (t - s**2 * (1 - t)) / q * x_t - s / q.sqrt() * f, 1e-9)


def _size(y: Tensor, at: Tensor, process: Process) -> Tensor:
    """The factor that turns unit-length coordinates' states into rectified flow's scale."""
    c = process.coefs(at).expand(y)
    rf = RF().coefs(process.flow_time(at)).expand(y)
    length = (c.alpha**2 + c.sigma**2).sqrt() / (rf.alpha**2 + rf.sigma**2).sqrt()
    return (c.alpha + c.sigma) / length


@every_teacher
@torch.no_grad()
def test_a_student_begins_as_the_teacher_s_flow(name) -> None:
    """Its velocity is that of the same law's rectified flow at the same log-SNR (spec 1.1)."""
    process, head = TEACHERS[name]
    means = torch.tensor([[-1.0], [1.0]])
    made = make("reflow", Oracle(process, head, means, 0.4))
    flow = Oracle(RF(), "velocity", means, 0.4)
    u = torch.linspace(0.05, 0.95, 16) * made.start
    t, state = process.warp(u), noise(3, (16, 1))
    s = process.flow_time(t)
    c = process.coefs(t).expand(state)
    drift = made.velocity(made.denoiser("student")((c.alpha + c.sigma) * state, t, Cond()))
    close(drift, flow(state, s, Cond()).h, 2e-4)


class Straight(Oracle):
    """The flow of N(m, s^2) whose lines lead from where the sampler begins to m + s z."""

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What a network of its head says at states [B, 1]."""
        m, s = 0.5, 1.3
        top = self.process.coefs(full(x_t, self.top)).expand(x_t)
        c, rest = self.process.coefs(t).expand(x_t), top.alpha / top.sigma
        x_share = c.alpha - c.sigma * rest  # x_t = (alpha - sigma rest) x + sigma z
        z = (x_t - x_share * m) / (x_share * s + c.sigma)
        x = m + s * z
        return self.head.output(x, z - rest * x, c, self.process.sigma_data)


@every_teacher
@pytest.mark.parametrize("method", ["reflow", "kd", "slim_flow"])
@torch.no_grad()
def test_straight_flows_have_no_loss_and_shuffled_pairs_much(name, method) -> None:
    """In every process; and one step draws each noise's own image."""
    process, head = TEACHERS[name]
    keys = {"anneal": 0.0} if method == "slim_flow" else {}
    teacher = Straight(process, head, torch.tensor([[0.5]]), 1.3)
    made = make(method, teacher, batch_size=256, **keys)
    made.denoiser("student").top = made.top
    z = Rng(1).normal("pair", made.batch(0).index, (1,))
    x = 0.5 + 1.3 * z
    made.turns(0)
    assert float(made.loss(made.batch(0, x=x, z=z), Rng(0)).value) < 2e-4
    assert float(made.loss(made.batch(0, x=x.roll(1, 0), z=z), Rng(0)).value) > 0.2
    close(sample(made.denoiser("student"), z, (made.top, 0.0), Cond()), x, 2e-3)


# Training in every process ------------------------------------------------------------------------


def tried(method: str, process: Process, head: str, teacher: str, **keys: Any) -> Trial:
    effort = keys.pop("effort", 0.6)
    proof = Proof((teacher,), keys, effort)
    return prove(
        Case(method, "test", teacher),
        read_teacher(teacher, process=process, head=head),
        proof=proof,
    )


def measured(trial: Trial) -> dict[str, float]:
    """The figures that fall short; and none may be missing."""
    rows = judge(trial).rows
    assert any(row.quantity == "map error" for row in rows)
    return {f"{row.quantity}, {row.student_steps}": row.measured for row in rows if not row.passed}


@pytest.mark.parametrize("name", ["vp, noise", "vp, v"])
def test_reflow_straightens_other_flows_than_rectified(name) -> None:
    """Affine students are exact, one step and many, from where each teacher's walk begins."""
    process, head = TEACHERS[name]
    trial = tried("reflow", process, head, "gaussian", metric="l2", pairs={"steps": 24})
    assert measured(trial) == {}


@pytest.mark.parametrize(("method", "head"), [("kd", "eps"), ("perflow", "v")])
def test_other_methods_do_so_too(method, head) -> None:
    keys = {"solver": {"kind": "euler", "substeps": 2}} if method == "perflow" else {}
    trial = tried(method, VP(scaled_linear()), head, "gaussian", effort=0.25, **keys)
    assert measured(trial) == {}


# Losses -------------------------------------------------------------------------------------------


class Halves(torch.nn.Module):
    """Two levels of features with two channels, as they are."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, x.mean(dim=(2, 3))]


def test_feature_distance_compares_directions_of_channels() -> None:
    """Right angles: squared distance 2; over half of the places of the map, and of the vector."""
    a, b = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    a[0, 0, 0], b[0, 0, 0, 0], b[0, 1, 0, 1] = torch.tensor([3.0, 5.0]), 1.0, 7.0
    net = Halves()
    (_, v), (_, w) = net(a), net(b)
    cosine = float(v[0] @ w[0] / v.norm() / w.norm())
    expected = (2 / 2 + 2 * (1 - cosine)) / 2
    assert float(feature_distance(net(a), net(b))) == pytest.approx(expected, rel=1e-6)
    assert float(feature_distance(net(a), net(3 * a))) == pytest.approx(0, abs=1e-12)
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert float(feature_distance([tokens], [tokens.roll(1, 1)])) == pytest.approx(2)


@pytest.mark.parametrize("divided", [True, False])
def test_rfpp_s_losses_are_its_sum(divided) -> None:
    """(1 - t) huber of the velocity + the features' distance, over t or not (spec 1.4)."""
    keys = {"perceptual": {"divided": divided, "weight": 2.0}, "metric": "faded_huber"}
    made = make("reflow", mlp_teacher(), t={"kind": "uniform", "low": 0.25, "high": 0.25}, **keys)
    x, z = noise(1, (8, 4)), noise(2, (8, 4))
    batch = made.batch(0, x=x, z=z)
    with torch.no_grad():
        got = float(made.loss(batch, Rng(0)).value)
        x_t = 0.75 * x + 0.25 * z
        v = made.denoiser("student")(x_t, full(x, 0.25), batch.cond).h
        net = RandomConv().build((4,))
        seen = feature_distance(net(x_t - 0.25 * v), net(x)).mean() * (4 if divided else 1)
        delta, c = v - (z - x), 0.00054 * 4
        huber = ((delta.square().sum(1) + c * c).sqrt() - c) / 4
    assert got == pytest.approx(float(0.75 * huber.mean() + 2 * seen), rel=1e-5)


# SlimFlow -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "expected"), [(1.0, 0.4292), (0.9, 0.1204), (0.6, 0.0139), (0.3, 0.0007), (0.0, 0.0)]
)
def test_annealed_flows_of_a_gaussian_are_as_straight_as_spec_7_says(beta, expected) -> None:
    """Least squares of z_b - x on the line's state over x = z gives the velocity, step by step."""
    z, fresh = noise(4, (40_000, 1)).double(), noise(5, (40_000, 1)).double()
    fresh = fresh - (fresh * z).mean() / z.square().mean() * z  # independent to the last digit
    z, fresh = z / z.square().mean().sqrt(), fresh / fresh.square().mean().sqrt()
    mixed, rho, x = mixed_noise(z, fresh, beta), math.sqrt(1 - beta**2), z
    assert float(mixed.square().mean()) == pytest.approx(1, abs=1e-9)
    steps, gain, speeds = 400, 1.0, []
    for k in range(steps, 0, -1):
        t = (k - 0.5) / steps
        x_t = (1 - t) * x + t * mixed
        slope = float((x_t * (mixed - x)).mean() / x_t.square().mean())
        theory = (t - (1 - t) + (1 - 2 * t) * rho) / ((1 - t) ** 2 + t**2 + 2 * t * (1 - t) * rho)
        assert slope == pytest.approx(theory, abs=1e-9)
        middle = gain * math.exp(-slope / (2 * steps))
        speeds.append(slope * middle)
        gain *= math.exp(-slope / steps)
    straightness = sum((1 - gain - speed) ** 2 for speed in speeds) / steps
    assert straightness == pytest.approx(expected, abs=6e-4)


def test_fresh_noise_gives_way_linearly_and_is_gone_for_the_rest() -> None:
    assert [annealed(k, 4) for k in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert annealed(0, 0) == 0
    assert "steps" in trainer("slim_flow").kept
    made = make("slim_flow", mlp_teacher(), anneal=0.5, steps=8)
    made.turns(1)
    assert made.beta == 0.75


def test_distilled_students_stand_between_the_pairs_and_the_flow_s_two_steps() -> None:
    """For N(m, s^2): g = (g' + E[c t]) / (2 - E[c (1 - t)]) along an axis, c = (1-t) s^2 / Q,
    t of (0.2, 0.8), where g' is that of the pairs. The mean is the teacher's."""
    trial = tried("slim_flow", RF(), "velocity", "gaussian", stage="distil", effort=0.5)
    law = trial.teacher.oracle.law()
    assert law is not None
    z = noise(6, (20_000, 2)).double()
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / len(z))).T
    with torch.no_grad():
        x = sample(trial.trainer.best(), z.float(), trial.trainer.grids()[1], Cond()).double()
    close(x.mean(0), law.mean(), 5e-3)
    times = tuple(trial.trainer.fixed_point.follow(1.0))
    t = 0.2 + 0.6 * (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    for k, s in enumerate(law.stds[0].tolist()):
        walked = 1.0
        for a, b in zip(times, times[1:], strict=False):
            walked *= ((1 - a) * (1 - b) * s**2 + a * b) / ((1 - a) ** 2 * s**2 + a**2)
        c = (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2)
        gain = (walked + float((c * t).mean())) / (2 - float((c * (1 - t)).mean()))
        axis = law.axes[0][:, k]
        slope = float(((z @ axis) * (x @ axis)).mean())
        assert slope == pytest.approx(gain, abs=4e-3)  # and the pairs alone lead elsewhere:
        assert abs(walked - gain) > 1e-2


def test_the_digits_student_has_at_most_two_fifths_of_the_parameters() -> None:
    _, config = read_config("slim_flow-digits")
    teacher = load_teacher(config.teacher)
    small = smaller(config.network, 0, teacher)
    counts = [sum(p.numel() for p in den.net.parameters()) for den in (small, teacher)]
    assert counts[0] <= 0.4 * counts[1]


# Piecewise rectified flow -------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(processes()))
def test_window_lines_lead_from_end_to_end_at_one_velocity(name) -> None:
    """At its ends a line is where it should be, and Euler's step in the flow's time takes it on."""
    process = processes()[name]
    first, last = noise(1).double(), noise(2).double()
    high, low = (torch.full((16,), u, dtype=torch.float64) for u in (0.7, 0.3))
    times = [process.warp(u) for u in (high, low, 0.5 * high + 0.5 * low)]
    a, b, c = (process.coefs(t).expand(first) for t in times)
    close(window_line(first, last, a, b, a)[0] / (a.alpha + a.sigma), first / (a.alpha + a.sigma))
    close(window_line(first, last, a, b, b)[0] / (b.alpha + b.sigma), last / (b.alpha + b.sigma))
    x_t, v = window_line(first, last, a, b, c)
    way = process.flow_time(times[2]) - process.flow_time(times[1])
    moved = x_t / (c.alpha + c.sigma) - way[:, None] * v
    close(moved, last / (b.alpha + b.sigma), 1e-9)


def test_more_steps_than_windows_draw_the_same() -> None:
    trial = tried("perflow", RF(), "velocity", "gaussian", points=2, solver="heun", effort=0.2)
    made, z = trial.trainer, noise(7, (512, 2))
    assert set(made.grids()) == {4, 8}
    with torch.no_grad():
        four, eight = (sample(made.best(), z, made.grids()[n], Cond()) for n in (4, 8))
    close(four, eight, 1e-3)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "keys", "message"),
    [
        ("reflow", {"perceptual": {}}, "perceptual: .*metric=faded_huber, and not huber"),
        ("reflow", {"update": "initial", "start": 0.9}, "update=initial: .*set update=null"),
        (
            "kd",
            {"perceptual": {"features": {"kind": "pixels"}}},
            "perceptual.features: a level of kind=pixels has one channel",
        ),
        ("perflow", {"solver": "sde"}, "solver=sde: lines lead to where the teacher's steps do"),
        ("perflow", {"solver": "data"}, "solver=data: lines lead to where"),
        ("slim_flow", {"perceptual": {}}, "perceptual: .*set perceptual=null, or stage=distil"),
        (
            "slim_flow",
            {"stage": "distil", "network": {"type": "UNet2DModel"}},
            "network: stage=distil begins as its teacher",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(method, keys, message) -> None:
    teacher = dit_teacher() if "features" in str(keys) else mlp_teacher()
    with pytest.raises(UserError, match=message):
        make(method, teacher, **keys)


# One round after another --------------------------------------------------------------------------

QUICK = ["steps=2", "batch_size=8", "log.tensorboard=false", "device=cpu", "optim.warmup_steps=0"]
QUICK += ["eval.every_steps=0", "sample.every_steps=0"]
FEW = ["pairs.num=16", "pairs.steps=2", "pairs.shard=16"]


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an export draws is compared by the contract tests, for every method."""
    monkeypatch.setattr("stepdistill.commands.export.check", lambda *_: 0.0)


def exported(name: str, out: Path, *keys: str) -> Path:
    run = train(name, [f"run={out}-run", *QUICK, *FEW, *keys])
    export(run, out)
    return out


@pytest.mark.parametrize("name", ["reflow-digits", "rfpp-digits", "rfpp-digits-unet"])
def test_an_exported_flow_is_the_teacher_of_the_next_method(name, tmp_path) -> None:
    """Of a flow and of a noise predictor: the same network, process, output and classes."""
    first = exported(name, tmp_path / "first")
    read, before = load_teacher(str(first)), load_teacher(read_config(name)[1].teacher)
    assert (read.process.name, read.head) == (before.process.name, before.head)
    assert (read.classes, read.null_label) == (before.classes, before.null_label)
    t = torch.linspace(0.001, 1, 99)
    for kind in ("alpha", "sigma"):
        one, other = (getattr(d.process.coefs(t), kind) for d in (read, before))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    second = exported("kd-digits", tmp_path / "second", f"teacher={first}")
    with pytest.raises(UserError, match="a student of few steps, which is no teacher"):
        load_teacher(str(second))


def test_shifted_flows_keep_their_shift_and_trig_has_no_scheduler_of_diffusers() -> None:
    shifted = stock_config(RF(3.0), HEADS["velocity"])
    assert shifted == {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert stock_config(Trig(), HEADS["trig-f"]) is None


def test_a_small_flow_is_distilled_from_its_export(tmp_path) -> None:
    small = exported("slim_flow-digits", tmp_path / "small")
    keys = [f"teacher={small}", "stage=distil", "network=null"]
    one = exported("slim_flow-digits", tmp_path / "one", *keys)
    assert (one / "model_index.json").is_file()
