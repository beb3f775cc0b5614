"""MDT-dist, DiffusionOPD, Flow-OPD, CRD, Diversity-rewarded CFG distillation: spec 5.19 to 5.22."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.derivative import along
from stepdistill.diffusion.flow_sde import flow_step
from stepdistill.diffusion.process import RF, VP, Process
from stepdistill.losses import reward as scored
from stepdistill.losses.features import RandomConv
from stepdistill.losses.regression import mean_square
from stepdistill.losses.terms import Diversity, Reward, diversity
from stepdistill.oracles.denoiser import Oracle
from stepdistill.oracles.mixture import Mixture
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.onpolicy import opd
from stepdistill.trainers.score.mdt_dist import drift
from tests.helpers import (
    AffineAdapter,
    batch_of,
    dit_teacher,
    make,
    mlp_teacher,
    noise,
    processes,
    run,
    same,
    saved,
    scaled_linear,
    turn_gradients,
)

M, S = 0.4, 0.7  # of the Gaussian in the spec's checks


def gaussian(process: Process | None = None, head: str = "velocity") -> Oracle:
    """The exact teacher of N(M, S^2) in two coordinates."""
    return Oracle(process or RF(), head, torch.full((1, 2), M), S)


class FlowMap(nn.Module):
    """Where the flow of N(M, S^2) ends, as an x0 head, for the time of the process itself."""

    dim = 2

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process, self.shift = process, nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Clean images [B, 2] of states x [B, 2] at times t [B]."""
        c = self.process.coefs(t).expand(x)
        spread = (c.alpha**2 * S**2 + c.sigma**2).sqrt()
        return M + S * (x - c.alpha * M) / spread + self.shift


class Plain(Denoiser):
    """A network that takes state and time as they are."""

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Denoiser.raw`."""
        return self.adapter(self.called(), x_t, t, cond).float()


def flow_map(process: Process | None = None) -> Plain:
    """The exact average velocity as a denoiser."""
    process = process or RF()
    return Plain(FlowMap(process), process, "x0", adapter=AffineAdapter())


@dataclass(frozen=True)
class At(Rng):
    """Random numbers whose shared choices are all one given number."""

    chosen: int = 0

    def integer(self, stream: str, high: int) -> int:
        """The chosen number."""
        return self.chosen


class Brighter(scored.Brightness):
    """Brightness and a constant."""

    def __call__(self, x: Tensor, label: Tensor | None) -> Tensor:
        """See :class:`Reward`."""
        return super().__call__(x, label) + 1.5


class Constant(scored.Reward):
    """The same for all."""

    def __call__(self, x: Tensor, label: Tensor | None) -> Tensor:
        """See :class:`Reward`."""
        return torch.full_like(x[:, 0], 0.5)


class Held(scored.Reward):
    """One without a gradient."""

    def __call__(self, x: Tensor, label: Tensor | None) -> Tensor:
        """See :class:`Reward`."""
        return x.detach().sum(dim=1)


# MDT-dist -----------------------------------------------------------------------------------------


def matched(process: Process | None = None, **keys: Any) -> Trainer:
    """MDT-dist on the Gaussian, whose student is the flow map."""
    made = make("mdt_dist", gaussian(process), **keys)
    made.players["student"].denoiser = flow_map(process)
    return made


def test_mdt_dist_average_velocity_is_the_specs_number() -> None:
    made = matched()
    x, t = torch.full((1, 2), 0.9), torch.tensor([0.8])
    own, target = made.target(x, t, made.batch(0))
    expected = torch.full((1, 2), -0.258449)
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-5)
    fresh = make("mdt_dist", gaussian())  # its student is the teacher's velocity itself
    own, target = fresh.target(x, t, fresh.batch(0))
    assert (own - target).abs().min() > 0.05


@pytest.mark.parametrize("name", processes())
def test_mdt_dist_rests_at_the_flow_map_in_every_process(name) -> None:
    process = processes()[name]
    made = matched(process)
    t = torch.linspace(0.2, 0.9, 8) * process.t_max
    x_t = process.noise(M + S * noise(0, (8, 2)), noise(1, (8, 2)), t)
    own, target = made.target(x_t, t, made.batch(0))
    torch.testing.assert_close(own, target, rtol=2e-3, atol=2e-3)


def test_mdt_dist_difference_comes_near_the_derivative_by_its_first_order() -> None:
    den, x, t = flow_map(), noise(0, (8, 2)), torch.linspace(0.3, 0.9, 8)
    speed = gaussian()(x, t, Cond()).velocity
    _, exact = along(den, x, t, Cond(), speed, drift)
    gaps = []
    for step in (0.02, 0.01):
        _, slope = along(den, x, t, Cond(), speed, drift, way="difference", step=step)
        gaps.append(float((slope - exact).abs().max()))
    assert gaps[1] < 0.05
    assert gaps[1] / gaps[0] == pytest.approx(0.5, abs=0.1)


def test_mdt_dist_derivative_goes_through_attention_and_past_autocast() -> None:
    den = dit_teacher()
    x, t, cond = noise(0, (2, 1, 8, 8)), torch.tensor([0.3, 0.7]), Cond(torch.tensor([0, 2]))
    speed = noise(1, (2, 1, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        own, slope = along(den, x, t, cond, speed, drift)
    assert not slope.requires_grad
    _, near = along(den, x, t, cond, speed, drift, way="difference", step=5e-5)
    assert float((slope - near).abs().max()) < 0.1 * float(slope.abs().max())
    with torch.no_grad():
        torch.testing.assert_close(own, drift(den(x, t, cond)), rtol=0, atol=1e-5)


def test_mdt_dist_distillation_pulls_images_along_the_gap_of_velocities() -> None:
    """The gradient in an image is 2 (u* - u) a coordinate; the K direction with F the student."""
    made = make("mdt_dist", gaussian())
    made.denoiser("student").requires_grad_(True)
    batch, seen = made.batch(0), []
    target = made.target

    def spy(*args: Any) -> Any:
        seen.append(target(*args))
        return seen[-1]

    made.target = spy
    loss, x = made.distil(batch, Rng(0))
    (push,) = torch.autograd.grad(loss, x)
    own, wanted = seen[0]
    assert (wanted - own).abs().max() > 0.1
    torch.testing.assert_close(push, 2 * (wanted - own) / own.numel())


def test_mdt_dist_norm_bounds_the_derivative_and_moves_the_target() -> None:
    plain, bounded = matched(), matched(d_norm=True)
    x, t = 3 * noise(0, (8, 2)), torch.full((8,), 0.6)
    targets = [made.target(x, t, made.batch(0))[1] for made in (plain, bounded)]
    v = drift(plain.teacher(x, t, Cond()))
    assert ((v - targets[1]).norm(dim=1) < 0.6).all()
    assert not torch.allclose(*targets, atol=1e-2)


def test_mdt_dist_without_a_weight_is_refused() -> None:
    with pytest.raises(UserError, match="matching: it and distillation are both 0"):
        make("mdt_dist", gaussian(), matching=0, distillation=0)


# DiffusionOPD and Flow-OPD ------------------------------------------------------------------------

WALKS = {
    "DiffusionOPD": {"denominator": "exact"},
    "Flow-OPD": {"denominator": "flow"},
    "flow": {"walk": "ode", "denominator": "ode"},
}
every_walk = pytest.mark.parametrize("keys", WALKS.values(), ids=WALKS)


@every_walk
@pytest.mark.parametrize("compared", ["one", "all"])
def test_opd_of_a_student_that_is_its_teacher_costs_nothing(keys, compared) -> None:
    made = make("opd", mlp_teacher(), compared=compared, **keys)
    assert float(made.loss(made.batch(0), Rng(0)).value.detach()) == 0
    assert all(not grad.any() for grad in turn_gradients(made, 0)[0])
    guided = make("opd", mlp_teacher(), compared=compared, guidance=2.0, **keys)
    assert sum(float(grad.abs().sum()) for grad in turn_gradients(guided, 0)[0]) > 0


def test_opd_denominators_are_those_of_two_gaussian_steps() -> None:
    step, v, w = flow_step(0.6, 0.4, 0.7), noise(0, (8, 4)), noise(1, (8, 4))
    means = [step.keep * 0.3 + step.gain * u for u in (v, w)]
    normals = [torch.distributions.Normal(mean, step.spread) for mean in means]
    divergence = torch.distributions.kl_divergence(*normals).mean(dim=1)
    made = {name: make("opd", mlp_teacher(), **keys) for name, keys in WALKS.items()}
    found = {name: one.factor(step) * mean_square(v - w) for name, one in made.items()}
    torch.testing.assert_close(found["DiffusionOPD"], divergence)
    torch.testing.assert_close(found["Flow-OPD"], divergence * 0.2)  # without |dt|
    torch.testing.assert_close(found["flow"], mean_square(v - w) * 0.2**2 / 2)
    assert step.rate == pytest.approx(0.7 * (0.6 / 0.4) ** 0.5)
    assert flow_step(1.0, 0.75, 0.7).rate == pytest.approx(0.7 * (1 / 0.25) ** 0.5)


def test_opd_noise_leaves_the_marginals_as_they_are() -> None:
    """Of N(M, S^2), to the second order in the step's width."""

    def gap(width: float) -> Tensor:
        s, r = 0.6, 0.6 - width
        step, var = flow_step(s, r, 0.7), (1 - s) ** 2 * S**2 + s**2
        slope = (s - (1 - s) * S**2) / var  # of the velocity in the state
        mean = step.keep * (1 - s) * M + step.gain * -M
        spread = (step.keep + step.gain * slope) ** 2 * var + step.spread**2
        return torch.tensor([mean - (1 - r) * M, spread - (1 - r) ** 2 * S**2 - r**2])

    wide, narrow = gap(0.02), gap(0.01)
    assert narrow.abs().max() < 1e-3
    assert narrow[0].abs() < 1e-7 and wide[0].abs() < 1e-7  # the mean exactly
    assert float(narrow[1] / wide[1]) == pytest.approx(0.25, abs=0.03)


@every_walk
def test_opd_of_all_steps_is_the_mean_of_the_drawn_ones(keys) -> None:
    whole = make("opd", mlp_teacher(), compared="all", guidance=2.0, student_steps=3, **keys)
    drawn = make("opd", mlp_teacher(), guidance=2.0, student_steps=3, **keys)
    parts = [drawn.loss(drawn.batch(0), At(0, chosen=k)).value.detach() for k in range(3)]
    value = whole.loss(whole.batch(0), Rng(0)).value.detach()
    torch.testing.assert_close(torch.stack(parts).mean(), value)
    assert len({round(float(part), 6) for part in parts}) == 3


def test_opd_compares_only_the_share_that_is_asked_for() -> None:
    made = make("opd", mlp_teacher(), student_steps=10, share=0.99, compared="all")
    assert made.compared == 9
    assert [item.count for item in made.passes()] == [9, 9]


def other_teacher() -> Denoiser:
    """A second teacher of the same samples and classes."""
    teacher = mlp_teacher()
    teacher.net.leave.bias.data += 1.0
    return teacher


def test_opd_routes_each_class_to_its_teacher(monkeypatch) -> None:
    monkeypatch.setattr(opd, "load_teacher", lambda name: other_teacher())
    made = make("opd", mlp_teacher(), more_teachers=("other",), routes={"b": 1, "2": 1})
    assert made.routes == [0, 1, 1] and made.held()["teacher"] == 2
    counts = torch.zeros(3)
    for step in range(300):
        batch = made.batch(step)
        assert {made.routes[k] for k in batch.cond.label.tolist()} == {made.task(step)}
        counts += torch.bincount(batch.cond.label, minlength=3)
        if step < 20:  # the first teacher is the student, the second is one off everywhere
            gap = float(made.loss(batch, Rng(0).at(step)).logs["gap"])
            assert gap == pytest.approx(made.task(step), abs=1e-5)
    assert (counts / counts.sum()).tolist() == pytest.approx([1 / 3] * 3, abs=0.08)
    halves = [
        make("opd", mlp_teacher(), more_teachers=("x",), routes={"b": 1}, rank=rank, world=2)
        for rank in (0, 1)
    ]
    whole = make("opd", mlp_teacher(), more_teachers=("x",), routes={"b": 1})
    for step in range(5):
        parts = torch.cat([half.batch(step).cond.label for half in halves])
        assert torch.equal(parts, whole.batch(step).cond.label)


def test_opd_takes_a_teacher_of_another_process(monkeypatch) -> None:
    other = gaussian(VP(scaled_linear()), "eps")
    monkeypatch.setattr(opd, "load_teacher", lambda name: other)
    monkeypatch.setattr(opd.OPDTrainer, "routed", lambda self: [])
    made = make("opd", gaussian(), more_teachers=("vp",))
    x = made.process.noise(noise(0, (4, 2)), noise(1, (4, 2)), torch.full((4,), made.grid[2]))
    found = [made.ask(den, x, 2, Cond()) for den in (made.teacher, other)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"walk": "ode"}, "denominator=exact: the steps of walk=ode have no variance"),
        (
            {"more_teachers": ("nowhere/at/all",)},
            "more_teachers: teacher=nowhere/at/all: no such folder",
        ),
        ({"more_teachers": ("digits-dit",), "routes": {"a": 1}}, "more_teachers: digits-dit makes"),
        ({"routes": {"d": 0}}, "routes: the teacher has no class 'd'"),
        ({"routes": {"a": 1}}, "routes.a=1: there are 1 teachers"),
    ],
)
def test_opd_says_what_does_not_fit(keys, line) -> None:
    with pytest.raises(UserError, match=line) as caught:
        make("opd", mlp_teacher(), **keys)
    assert "\n" not in str(caught.value)


# Diversity-rewarded CFG distillation, and terms ---------------------------------------------------


def test_diversity_of_two_samples() -> None:
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 3.0], [2.0, 0.0], [-1.0, 0.0]])
    one.requires_grad_()
    found = diversity(one)
    assert found.tolist() == pytest.approx([0.0, 1.0, 2.0])
    found.sum().backward()
    assert one.grad.isfinite().all() and not one.grad[:2].any() and one.grad[2:4].any()
    nothing = torch.zeros(2, 3, requires_grad=True)
    diversity(nothing).sum().backward()
    assert nothing.grad.isfinite().all()


def test_the_diversity_term_counts_pairs_of_one_class() -> None:
    x, label = noise(0, (6, 4)), torch.tensor([0, 0, 1, 2, 1, 1])
    found = Diversity(weight=0.5)(x, label)
    cosine = torch.nn.functional.cosine_similarity(x[0::2], x[1::2])
    expected = -0.5 * (1 - cosine) * torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(found, expected.repeat_interleave(2))
    features = Diversity(weight=0.5, features=RandomConv(widths=(8,)))(x, label)
    assert not torch.allclose(features, found)


@pytest.mark.parametrize("method", ["dmd", "sim", "opd"])
def test_without_weight_terms_leave_a_method_as_it_is(method) -> None:
    off = [
        {"kind": "diversity", "weight": 0},
        {"kind": "reward", "weight": 0, "reward": "brightness"},
    ]
    made = [make(method, mlp_teacher(), guidance=2.0, **keys) for keys in ({}, {"terms": off})]
    for one in made:
        run(one, 0, 3)
    same(*(saved(one)[0] for one in made))


@pytest.mark.parametrize("method", ["dmd", "sim", "opd"])
@pytest.mark.parametrize("recompute", [False, True])
def test_terms_add_their_gradient_to_the_student_alone(method, recompute) -> None:
    keys = {"recompute": recompute} if method != "opd" else {}
    term = {"kind": "reward", "weight": 3.0, "reward": "brightness"}
    plain, more = (
        make(method, mlp_teacher(), guidance=2.0, **keys, terms=terms) for terms in ((), (term,))
    )
    before, after = (turn_gradients(made, 1) for made in (plain, more))
    bias = next(
        k
        for k, (name, _) in enumerate(plain.denoiser("student").net.named_parameters())
        if name == "leave.bias"
    )
    gap = after[0][bias] - before[0][bias]
    assert gap.abs().min() > 0.01
    for a, b in zip(before[1:], after[1:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_pairs_share_a_class_on_any_number_of_processes() -> None:
    keys: dict[str, Any] = {"terms": ({"kind": "diversity"},)}
    whole = make("dmd", mlp_teacher(), **keys)
    labels = torch.stack([whole.batch(step).cond.label for step in range(20)])
    assert torch.equal(labels[:, 0::2], labels[:, 1::2])
    assert len(labels.unique()) == 3
    halves = [make("dmd", mlp_teacher(), rank=rank, world=2, **keys) for rank in (0, 1)]
    for step in range(3):
        parts = torch.cat([half.batch(step).cond.label for half in halves])
        assert torch.equal(parts, labels[step])
    with pytest.raises(UserError, match="make it a multiple of 4"):
        make("dmd", mlp_teacher(), world=2, batch_size=6, **keys)
    one, *two = (turn_gradients(made, 1)[0] for made in (whole, *halves))
    for expected, left, right in zip(one, *two, strict=True):
        torch.testing.assert_close((left + right) / 2, expected, rtol=1e-4, atol=1e-6)


def test_diversity_rewarded_cfg_distillation_spreads_pairs() -> None:
    """Guidance learnt on the student's own states; what diversity adds is seen in its images."""
    found, means = [], torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    for weight in (0.0, 5.0):
        made = make(
            "opd",
            Oracle(RF(), "velocity", means, 0.5),
            guidance=2.0,
            student_steps=1,
            steps=60,
            optim={"lr": 1e-2},
            terms=({"kind": "diversity", "weight": weight},),
        )
        run(made, 0, 60)
        keys: dict[str, Any] = {"terms": ({"kind": "diversity"},), "batch_size": 256}
        batch = make("opd", made.teacher, **keys).batch(0)
        z = made.z(batch, Rng(3))
        x = made.draw(z, batch.cond, 1, Rng(3), batch.index)
        found.append(float(diversity(x).mean()))
    assert found[1] > 1.5 * found[0]


def test_a_reward_without_a_gradient_is_no_term() -> None:
    term = Reward(reward={"kind": f"{__name__}:Held"})
    with pytest.raises(UserError, match="has no gradient in the image"):
        term(noise().requires_grad_(), None)


# CRD ----------------------------------------------------------------------------------------------


def crd(**keys: Any) -> Trainer:
    return make("crd", mlp_teacher(), **{"group_size": 4, "student_steps": 2, **keys})


def test_crd_begins_with_no_implied_reward() -> None:
    """The student is its older self, so that the regression's value is that of the reward."""
    made = crd(beta=0.5)
    batch = batch_of(made, 0)
    logs = made.loss(batch, Rng(0)).logs
    with torch.no_grad():
        reward = made.walk(batch, Rng(0)).mean(dim=1)
    told = reward - reward.unflatten(0, (-1, 4)).mean(dim=1).repeat_interleave(4)
    torch.testing.assert_close(logs["regression"], told.square().mean() / 0.5)
    assert float(logs["reference"]) == 0
    run(made, 0, 3)
    assert not torch.equal(made.old.net.leave.weight, made.denoiser("student").net.leave.weight)


def test_crd_does_not_see_a_constant_in_the_reward() -> None:
    made = [crd(), crd(reward=f"{__name__}:Brighter"), crd(reward=f"{__name__}:Constant")]
    for one in made:
        run(one, 0, 2)
    first, shifted, none = (turn_gradients(one, 2)[0] for one in made)
    for a, b in zip(first, shifted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert sum(float(grad.abs().sum()) for grad in none) < 1e-4
    assert sum(float(grad.abs().sum()) for grad in first) > 1e-2


def test_crd_reward_raises_what_it_rewards() -> None:
    made = make(
        "crd", gaussian(), batch_size=64, group_size=8, student_steps=4, steps=200,
        optim={"lr": 1e-2}, normalise="none", reference=2.0,
    )  # fmt: skip
    run(made, 0, 60)
    batch = made.batch(0)
    x = made.draw(made.z(batch, Rng(1)), batch.cond, 4, Rng(1), batch.index)
    y = make("crd", gaussian(), batch_size=64).draw(
        made.z(batch, Rng(1)), batch.cond, 8, Rng(1), batch.index
    )
    assert float(x.mean()) > float(y.mean()) + 0.05


def test_crd_groups_share_a_class_and_lie_in_one_process() -> None:
    labels = crd().batch(3).cond.label.unflatten(0, (-1, 4))
    assert (labels == labels[:, :1]).all()
    with pytest.raises(UserError, match="batch_size=8: a process takes 4 samples"):
        crd(group_size=8, world=2)


def test_crd_older_self_follows_ever_more_slowly() -> None:
    old = crd().config.old
    assert [old.decay(step) for step in (0, 10, 1000)] == pytest.approx([0.25, 0.3, 0.999])


def test_a_tilted_mixture_is_the_density_times_an_exponential() -> None:
    law = Mixture.of([[-1.0], [0.8]], stds=[0.5, 0.7], weights=[0.7, 0.3])
    tilted = law.tilted(torch.tensor([0.9]))
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    expected = (law.log_density(x) + 0.9 * x[:, 0]).exp()
    expected = expected / (expected.sum() * 16 / 4000)
    torch.testing.assert_close(tilted.log_density(x).exp(), expected, rtol=1e-6, atol=1e-9)
