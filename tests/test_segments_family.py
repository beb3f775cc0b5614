"""Solvers of the teacher, and the methods made of segments: SCott, TLCM, Hyper-SD, DCM, Flash-WAM.

Numbers are those of a Gaussian's closed forms: of a state at t, of data with the standard deviation
s, rho^2 = alpha^2 s^2 + sigma^2 and phi = atan2(sigma, alpha s).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.commands.export import literal_rows
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import EDM, RF, Process, Trig, expand
from stepdistill.diffusion.sampler import full
from stepdistill.diffusion.timesteps import uniform_grid
from stepdistill.losses.boundary import boundary
from stepdistill.losses.consistency import frame_gap, landing_estimate
from stepdistill.losses.distribution import Renoise
from stepdistill.oracles.denoiser import Oracle
from stepdistill.run.config import digest
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.find import trainer
from stepdistill.trainers.solvers import Asked, Dpm, Euler, Heun, Sde, Walk
from stepdistill.trainers.trajectory.rival import lifted
from tests.helpers import batch_of, dit_teacher, make, mlp_teacher, run, same, saved
from tests.test_times_and_segments import Jumper, euler
from tests.test_times_and_segments import oracle as flow
from tests.test_times_and_segments import walked as along

STD = 0.5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def oracle(process: Process | None = None, std: float = STD, mean: float = 0.0) -> Oracle:
    return Oracle(process or RF(), "velocity", torch.full((1, 1), mean), std)


def radius(process: Process, t: float, std: float = STD) -> float:
    c = process.coefs(torch.tensor([t], dtype=torch.float64))
    return math.hypot(float(c.alpha) * std, float(c.sigma))


@torch.no_grad()
def walked(solver: Walk, process: Process, t: float, r: float) -> float:
    """What the mean of a solver's walk multiplies a state by."""
    x = torch.ones(1, 1)
    return float(solver(Asked(oracle(process), Cond()), x, full(x, t), full(x, r)))


# Solvers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eta", "expected"), [(0.0, 0.70711), (0.5, 0.64842), (1.0, 0.5)])
def test_a_stochastic_walk_shrinks_its_mean_by_a_power_of_the_cosine(eta, expected) -> None:
    """(s / rho) cos(phi)^(eta^2) in many steps; at eta = 1 it is the posterior mean's s^2/rho^2."""
    assert walked(Sde(eta=eta, substeps=4000), EDM(), 0.5, 0.0) == pytest.approx(expected, abs=3e-4)


@torch.no_grad()
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_stochastic_step_keeps_the_law_of_noise(eta) -> None:
    """From N(alpha x, sigma^2) to the same at r, where the clean estimate is x itself."""
    process, many = RF(), torch.arange(40_000)
    z, e = (Rng(0).normal(name, many, (1,)) for name in "ze")
    teacher = Asked(oracle(process, std=0.0, mean=2.0), Cond())
    t, r = full(z, 0.8), full(z, 0.3)
    x_r = Sde(eta=eta)(teacher, process.noise(torch.full_like(z, 2.0), z, t), t, r, lambda k: e)
    rest = (x_r - 0.7 * 2.0) / 0.3
    assert float(rest.mean()) == pytest.approx(0, abs=0.02)
    assert float(rest.var()) == pytest.approx(1, abs=0.03)
    kept = ((0.3 / 0.7) / (0.8 / 0.2)) ** (eta * eta)
    assert float((rest * z).mean()) == pytest.approx(kept, abs=0.02)


def test_without_noise_of_its_own_a_stochastic_step_is_euler_s() -> None:
    for process in (RF(), EDM(), Trig()):
        t, r = 0.8 * process.t_max, 0.3 * process.t_max
        assert walked(Sde(eta=0.0), process, t, r) == pytest.approx(
            walked(Euler(), process, t, r), rel=1e-6
        )


@torch.no_grad()
def test_from_pure_noise_a_stochastic_step_forgets_it() -> None:
    e = torch.tensor([[0.4]])
    got = Sde(eta=0.5)(
        Asked(oracle(mean=1.0), Cond()),
        torch.full((1, 1), 3.0),
        full(e, 1.0),
        full(e, 0.6),
        lambda k: e,
    )
    assert float(got) == pytest.approx(0.4 * 1.0 + 0.6 * 0.4, abs=1e-6)


@pytest.mark.parametrize(("solver", "order"), [(Euler, 1), (Heun, 2), (Dpm, 2)])
def test_substeps_draw_near_the_flow_at_the_solver_s_order(solver, order) -> None:
    process = RF()
    exact = radius(process, 0.5) / radius(process, 0.9)
    errors = [abs(walked(solver(substeps=n), process, 0.9, 0.5) - exact) for n in (16, 32, 64)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert coarse / fine == pytest.approx(2**order, rel=0.2)


@pytest.mark.parametrize("process", [RF(), EDM(), Trig()], ids=["rf", "edm", "trig"])
def test_a_multistep_walk_begins_and_ends_as_euler_s(process) -> None:
    whole = process.t_max
    one = walked(Dpm(substeps=1), process, whole, 0.4 * whole)
    assert one == pytest.approx(walked(Euler(), process, whole, 0.4 * whole), rel=1e-5)
    two = walked(Dpm(substeps=2), process, whole, 0.0)
    assert two == pytest.approx(walked(Euler(substeps=2), process, whole, 0.0), rel=1e-5)


def test_a_solver_s_substeps_are_told_as_passes_and_drawn_from_the_step() -> None:
    keys = {"solver": {"kind": "sde", "eta": 0.5, "substeps": 3}, "metric": "l2", "start": 0.9}
    made = make("consistency", mlp_teacher(), **keys)
    assert made.passes()[0].count == 3
    batch = batch_of(made, 0)
    first, again, other = (
        float(made.loss(batch, Rng(0).at(step)).value.detach()) for step in (0, 0, 1)
    )
    assert first == again != other


def test_a_solver_by_its_name_alone_is_written_so() -> None:
    """So that records of runs by their configs' hashes stay what they are."""
    model = trainer("consistency").Config
    base = {"method": "consistency", "run": "a", "teacher": "b", "steps": 1}
    for name in ("euler", "heun", "data"):
        assert model(**base, solver=name).model_dump(mode="json")["solver"] == name
    assert digest(model(**base)) == digest(model(**base, solver={"kind": "euler", "substeps": 1}))
    two = model(**base, solver={"kind": "euler", "substeps": 2})
    assert two.model_dump(mode="json")["solver"] == {"kind": "euler", "substeps": 2}
    assert model(**two.model_dump(mode="json")).solver == two.solver


# SCott -------------------------------------------------------------------------------------------


class Scaled(Denoiser):
    """A student whose clean estimate is gain(t) x_t."""

    gain: Callable[[float], float]

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Denoiser.raw`."""
        times, place = t.unique(return_inverse=True)
        return torch.tensor([self.gain(float(one)) for one in times])[place][:, None] * x_t


def scaled(gain: Callable[[float], float], process: Process | None = None) -> Scaled:
    base = oracle(process)
    made = Scaled(base.net, base.process, "x0", adapter=base.adapter)
    made.gain = gain
    return made


def stepped(eta: float, width: float) -> Callable[[float], float]:
    """The gain of theory by even steps to 0 on RF: of each, of its mean in closed form."""

    def gain(t: float) -> float:
        total = 1.0
        for k in range(round(t / width), 0, -1):
            now, then = k * width, (k - 1) * width
            kept = (then * (1 - now) / (now * (1 - then))) ** (eta**2)
            up = (1 - now) * (1 - then) * STD**2 + kept * now * then
            total *= up / radius(RF(), now) ** 2
        return total

    return gain


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_scott_rests_at_the_mean_over_its_solver_s_noise(eta) -> None:
    """Where gain(r) is theory's, the squared distance is least at theory's gain(t) too."""
    made = make(
        "scott",
        oracle(),
        batch_size=40_000,
        start=0.75,
        pairs={"kind": "grid", "steps": 6},
        solver={"kind": "sde", "eta": eta, "substeps": 2},
        metric="l2",
        adversary=None,
    )
    theory, losses = stepped(eta, 0.0625), []
    made.target_net = scaled(theory)
    batch = made.batch(0)
    batch = replace(batch, x=STD * Rng(1).normal("x", batch.index, (1,)))
    for factor in (0.9, 1.0, 1.1):
        made.players["student"].denoiser = scaled(lambda t, f=factor: f * theory(t))
        losses.append(float(made.loss(batch, Rng(0).at(0)).value))
    low, middle, high = losses  # a parabola
    assert 1 - 0.05 * (high - low) / (high - 2 * middle + low) == pytest.approx(1, abs=0.01)
    if eta == 1:  # the posterior mean, whatever the steps
        assert theory(0.5) == pytest.approx(0.5 * STD**2 / radius(RF(), 0.5) ** 2)
    assert theory(0.75) < 0.85 * stepped(0.0, 0.0625)(0.75)


def test_scott_s_discriminator_tells_clean_estimates_from_the_data() -> None:
    """Its level is drawn from all times, and the student's part is its weight times its loss."""
    keys = {"start": 0.9, "metric": "l2", "pairs": {"kind": "grid", "steps": 6}}
    made, plain = (make("scott", mlp_teacher(), **keys, **k) for k in ({}, {"adversary": None}))
    batch, rng = batch_of(made, 0), Rng(0).at(0)
    loss = made.loss(batch, rng)
    with_it, cost = float(loss.value.detach()), float(loss.logs["adversarial"].detach())
    made.rival = None
    assert with_it == pytest.approx(float(made.loss(batch, rng).value.detach()) + cost)
    assert [turn.player for turn in plain.turns(0)] == ["student"]
    made = make("scott", mlp_teacher(), **keys)
    made.loss(batch, rng)
    states, real, further = made.rival.seen
    assert not states.requires_grad and real is batch.x and not further.end.any()


def test_states_are_noised_further_by_the_process_s_own_kernel() -> None:
    """States at end whose law is N(0, sigma^2) become those of a later time, above the end."""
    many, end = torch.arange(20_000), torch.full((20_000,), 0.4)
    for process in (RF(), Trig(1.0)):
        t = lifted(process.t_max * torch.rand(20_000, generator=seeded(0)), end, process)
        assert (t >= end).all() and (t <= process.t_max).all() and t.min() < 0.41
        x = expand(process.coefs(end).sigma, many[:, None]) * Rng(0).normal("z", many, (1,))
        kernel = Renoise(process.coefs(end).expand(x), process.coefs(t).expand(x))
        x_t = kernel.state(x, Rng(0).normal("e", many, (1,)))
        unit = x_t / process.coefs(t).expand(x).sigma
        assert float(unit.var()) == pytest.approx(1, abs=0.03)
    low = torch.zeros(5)
    same = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0])
    torch.testing.assert_close(lifted(same, low, RF()), same)


# TLCM --------------------------------------------------------------------------------------------


def image_free(**keys: object) -> Trainer:
    base = {"metric": "l2", "weight": "one", "pairs": {"kind": "grid", "steps": 8}}
    return make("tlcm", flow(), batch_size=64, **{**base, **keys})


@pytest.mark.parametrize(("segments", "least"), [(4, 1), (1, 4), (2, 4)])
def test_states_without_data_are_those_of_the_teacher_s_walk(segments, least) -> None:
    """Of a time in the s-th of four parts from the noisiest, after s even Euler steps."""
    made = image_free(student_steps=segments, walk_steps=least, milestones=None)
    assert made.needs == "labels" and made.batch(0).x is None
    batch, rng = made.batch(0), Rng(0).at(0)
    z = made.z(batch, rng)
    for t, steps in ((1.0, 1), (0.8, 1), (0.75, 2), (0.6, 2), (0.5, 3), (0.3, 3), (0.1, 4)):
        x_t, factor = made.reached(full(z, t), batch, rng), 1.0
        for k in range(steps):
            ends = (1 + (t - 1) * k / steps, 1 + (t - 1) * (k + 1) / steps)
            factor *= euler(*ends) if t < 1 else 1.0
        torch.testing.assert_close(x_t, factor * z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_tlcm_s_segments_rest_where_those_of_pcm_do(segments) -> None:
    made = image_free(student_steps=segments, milestones=None)
    for count, rests in ((8, True), (16, False)):
        made.players["student"].denoiser = Jumper(made.teacher, made, along(count))
        loss = float(made.loss(made.batch(0), Rng(0).at(0)).value)
        assert (loss < 1e-9) == rests and (loss > 1e-5) != rests


@pytest.mark.parametrize("segments", [1, 2])
def test_mlcm_s_segments_are_tlcm_on_states_of_data_and_pcm_bit_for_bit(segments) -> None:
    """MLCM's multistep consistency distillation: ``tlcm`` with ``states: data`` and no milestones;
    consistency where there is one segment."""
    keys = {"student_steps": segments, "pairs": {"kind": "grid", "steps": 8}, "guidance": 1.5}
    ends = []
    for method, own in (("pcm", {}), ("tlcm", {"states": "data", "milestones": None})):
        made = make(method, mlp_teacher(), **keys, **own)
        run(made, 0, 4)
        ends.append(made.players["student"].params)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_tlcm_s_milestones_rest_at_the_product_of_the_teacher_s_sub_steps() -> None:
    """From every milestone, whatever samples of its own the student makes on the way."""
    second = {"share": 0.5, "own_steps": 2, "substeps": 3}
    made = image_free(student_steps=4, milestones=second)
    made.prepare(3)
    t, r = made.times(made.batch(0), Rng(0).at(3))
    assert {(float(a), float(b)) for a, b in zip(t, r, strict=True)} == {
        (1.0, 0.75),
        (0.75, 0.5),
        (0.5, 0.25),
        (0.25, 0.0),
    }
    for count, rests in ((12, True), (8, False)):  # four milestones of three sub-steps
        made.players["student"].denoiser = Jumper(made.teacher, made, along(count))
        loss = float(made.loss(made.batch(0), Rng(0).at(3)).value)
        assert (loss < 1e-9) == rests and (loss > 1e-5) != rests


@pytest.mark.parametrize("at", [1, 4, 6])
def test_tlcm_s_stages_survive_a_resume_in_their_middle(at) -> None:
    """Before the second stage, one step into it, and further; rate and schedule are its own."""
    keys = {"steps": 8, "milestones": {"share": 0.625, "pace": 0.5}}
    keys["optim"] = {"lr": 1e-3, "decay": "linear"}
    whole, first, again = (make("tlcm", mlp_teacher(), **keys) for _ in range(3))
    run(whole, 0, 8)
    run(first, 0, at)
    again.load_state(at, *saved(first))
    run(again, at, 8)
    same(saved(again)[0], saved(whole)[0])
    student = again.players["student"]
    assert (again.stage, student.total, student.updates) == (1, 5, 5)
    assert student.config.lr == 5e-4 and trainer("tlcm").kept == ("steps",)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"milestones": {"own_steps": 3}}, "own_steps=3 is no divisor of student_steps=8"),
        ({"steps": 2}, "steps=2 leaves a stage without a step"),
        ({"solver": "data"}, "solver=data takes states of images, and states=teacher has none"),
    ],
)
def test_tlcm_refuses_what_does_not_fit(keys, line) -> None:
    with pytest.raises(UserError, match=line):
        make("tlcm", mlp_teacher(), **keys)


# Hyper-SD ----------------------------------------------------------------------------------------


def staged(**keys: object) -> Trainer:
    base = {"metric": "l2", "weight": "one", "pairs": {"kind": "grid", "steps": 16}, "steps": 8}
    return make("hyper_sd", flow(), batch_size=64, adversary=None, **{**base, **keys})


@pytest.mark.parametrize(("stage", "segments"), [(0, 8), (1, 4), (2, 2), (3, 1)])
def test_hyper_sd_s_stages_rest_at_euler_s_product_within_their_segments(stage, segments) -> None:
    """With fixed ends: of 8, 4, 2 and 1 segments, and so of as many steps."""
    made = staged()
    made.prepare(2 * stage)
    assert made.segments == segments and len(made.milestones) == segments + 1
    batch, rng = batch_of(made, 0), Rng(0).at(2 * stage)
    for count, rests in ((16, True), (32, False)):
        made.target_net = Jumper(made.teacher, made, along(count))
        made.players["student"].denoiser = made.target_net
        loss = float(made.loss(batch, rng).value)
        assert (loss < 1e-9) == rests and (loss > 1e-6) != rests


def test_hyper_sd_in_one_stage_of_one_segment_is_consistency_bit_for_bit() -> None:
    keys = {"pairs": {"kind": "grid", "steps": 8}, "target": "ema", "weight": "one"}
    ends = []
    for method, own in (("consistency", {}), ("hyper_sd", {"first": 1, "adversary": None})):
        made = make(method, mlp_teacher(), **keys, **own)
        run(made, 0, 5)
        ends.append(made.players["student"].params)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_hyper_sd_s_random_ends_lie_between_the_segment_s_end_and_r() -> None:
    pairs = {"kind": "grid", "steps": 64}
    made = make("hyper_sd", mlp_teacher(), batch_size=8192, end="random", pairs=pairs)
    t, r = made.times(made.batch(0), Rng(0).at(0))
    end, low = made.ends(t, r, made.batch(0), Rng(0).at(0)), made.end(t)
    assert (low <= end).all() and (end <= r).all() and (r < t).all()
    part = ((end - low) / (r - low))[r - low > 1e-3]
    assert float(part.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(part.var()) == pytest.approx(1 / 12, abs=0.005)


def test_hyper_sd_tells_its_network_the_end_where_it_can() -> None:
    """Ends are times of the pairs' grid, within the segment; the sampler tells the next one."""
    told = {"end": "told", "pairs": {"kind": "grid", "steps": 16}, "adversary": None}
    made = make("hyper_sd", dit_teacher(), batch_size=4096, **told)
    batch, rng = made.batch(0), Rng(0).at(0)
    t, r = made.times(batch, rng)
    end, grid = made.ends(t, r, batch, rng), made.span.grid(16)
    assert bool(((end <= r) & (end >= made.end(t)) & torch.isin(end, grid)).all())
    assert len(end[t == grid[0]].unique()) > 1  # not the segment's own end alone
    assert made.noise == "predicted" and made.denoiser("student").ends
    assert made.target_net is not None and made.target_net.ends and not made.teacher.ends


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"lora": {"rank": 2}}, "^lora: adapters share the teacher's network, which is told no"),
        ({"pairs": {"kind": "ect"}}, "^end: told ends are times of a grid; set pairs.kind to grid"),
    ],
)
def test_hyper_sd_refuses_ends_that_cannot_be_told(keys, line) -> None:
    with pytest.raises(UserError, match=line):
        make("hyper_sd", dit_teacher(), **{"end": "told", **keys})


def test_hyper_sd_s_optimum_depends_on_the_end_that_the_network_is_not_told() -> None:
    """kappa = cos((phi + psi) / 2) / cos((phi - psi) / 2) of the spec: so random ends are a
    compromise; a jump to 0 asks for less of the state than one next door, which asks for E[x]."""

    def estimate(t: float, end: float) -> float:
        one = torch.ones(1, 1, dtype=torch.float64)
        x_r = one * radius(RF(), end) / radius(RF(), t)
        at = [torch.tensor([v], dtype=torch.float64) for v in (t, end)]
        return float(landing_estimate(one, x_r, *at, RF()))

    phi = math.atan2(0.6, 0.4 * STD)
    for end in (0.0, 0.3, 0.5, 0.599):
        psi = math.atan2(end, (1 - end) * STD)
        kappa = math.cos((phi + psi) / 2) / math.cos((phi - psi) / 2)
        assert estimate(0.6, end) == pytest.approx(STD * kappa / radius(RF(), 0.6), rel=1e-6)
    assert estimate(0.6, 0.0) > estimate(0.6, 0.3) > estimate(0.6, 0.5)


def test_hyper_sd_s_discriminator_is_new_in_every_stage_of_few_segments() -> None:
    made, seen = make("hyper_sd", mlp_teacher(), steps=8), []
    for step in range(8):
        made.prepare(step)
        names = [turn.player for turn in made.turns(step)]
        assert names == ["student", *(["discriminator"] if step >= 4 else [])]
        if step in (4, 6):
            heads = made.players["discriminator"]
            assert heads.updates == 0 and all(heads is not other for other in seen)
            seen.append(heads)
        run(made, step, step + 1)


@pytest.mark.parametrize("at", [3, 5, 6, 7])
def test_hyper_sd_s_stages_survive_a_resume_in_their_middle(at) -> None:
    whole, first, again = (make("hyper_sd", mlp_teacher(), steps=8) for _ in range(3))
    run(whole, 0, 8)
    run(first, 0, at)
    again.load_state(at, *saved(first))
    run(again, at, 8)
    same(saved(again)[0], saved(whole)[0])
    assert again.stage == 3 and trainer("hyper_sd").kept == ("steps",)


def test_hyper_sd_samples_in_any_few_steps_or_in_its_segments() -> None:
    made = make("hyper_sd", mlp_teacher())
    assert sorted(made.grids()) == [1, 2, 4, 8] and made.noise == "fresh"
    made = make("hyper_sd", mlp_teacher(), student_steps=4)
    assert sorted(made.grids()) == [4] and made.noise == "predicted"


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"first": 6}, "first=6 is not student_steps=1, doubled or not; set first to one of 1, 2"),
        ({"steps": 3}, "steps=3 leaves one of 4 stages without a step; give more"),
        ({"pairs": {"kind": "grid", "steps": 12}}, "first=8: its steps begin at times"),
    ],
)
def test_hyper_sd_refuses_stages_that_do_not_fit(keys, line) -> None:
    with pytest.raises(UserError, match=line):
        make("hyper_sd", mlp_teacher(), **keys)


# DCM ---------------------------------------------------------------------------------------------


def experts(**keys: object) -> Trainer:
    base = {"metric": "l2", "weight": "one", "pairs": {"kind": "grid", "steps": 8}, "steps": 8}
    return make("dcm", flow(), batch_size=64, **{**base, "boundary": 0.75, **keys})


@pytest.mark.parametrize(("step", "name"), [(0, "student"), (5, "student_2")])
def test_dcm_s_experts_rest_at_euler_s_product_in_their_own_ranges(step, name) -> None:
    made = experts()
    made.prepare(step)
    batch, rng = batch_of(made, step), Rng(0).at(step)
    t, r = made.times(batch, rng)
    own = (t > 0.75) if name == "student" else (t <= 0.75)
    assert made.active == name and own.all() and (r >= made.end(t)).all()
    for count, rests in ((8, True), (16, False)):
        made.players[name].denoiser = Jumper(made.teacher, made, along(count))
        loss = float(made.loss(batch, rng).value)
        assert (loss < 1e-9) == rests and (loss > 1e-6) != rests


def test_dcm_s_two_jumps_walk_the_teacher_s_whole_path() -> None:
    """On the shifted grid of fifty times that the spec names, with its border: 12 and 38 steps."""
    teacher = oracle(RF(17.0))
    keys = {"pairs": {"kind": "grid", "steps": 50}, "boundary": 0.981763}
    made, whole = make("dcm", teacher, **keys), uniform_grid(RF(17.0), 50)
    assert made.place == 12 and whole[12] == pytest.approx(0.98176, abs=5e-6)
    (grid,) = made.grids().values()
    assert grid == pytest.approx((1.0, 0.981763, 0.0), abs=1e-6)
    path = [*made.chain(1.0)[:-1], *made.chain(float(made.milestones[1]))]
    torch.testing.assert_close(path, list(whole), rtol=0, atol=1e-5)
    at = made.milestones[1].expand(3)
    x = torch.randn(3, 1, generator=seeded(1))
    assert torch.equal(made.jump(teacher, x, at, at, made.batch(0)), x)  # at the border, the state


def test_dcm_s_temporal_term_is_of_changes_over_frames() -> None:
    delta = torch.randn(2, 3, 7, 2, 2, generator=seeded(0))
    assert frame_gap(torch.zeros_like(delta), 3).tolist() == [0, 0]
    assert float(frame_gap(delta[:, :, :1].expand_as(delta), 3).abs().max()) == 0
    rising = torch.arange(7.0)[None, None, :, None, None].expand(2, 3, 7, 2, 2)
    torch.testing.assert_close(frame_gap(rising, 3), torch.tensor([9.0, 9.0]))
    assert frame_gap(delta, 3)[0] == (delta[0, :, 3:] - delta[0, :, :-3]).square().mean()


def test_dcm_adds_the_temporal_term_for_videos_to_the_semantic_expert_alone() -> None:
    teacher = Oracle(RF(), "velocity", torch.zeros(1, 2, 5, 2, 2), 0.7)
    keys = {"pairs": {"kind": "grid", "steps": 8}, "steps": 8, "temporal_lag": 2}
    made, plain = (make("dcm", teacher, temporal=weight, **keys) for weight in (0.5, 0.0))
    for one in (made, plain):  # another student than the teacher, whose jumps are off
        one.players["student"].denoiser = Oracle(RF(), "velocity", torch.ones(1, 2, 5, 2, 2), 0.4)
    batch, rng = batch_of(made, 0), Rng(0).at(0)
    loss, bare = (one.loss(batch, rng) for one in (made, plain))
    cost = float(loss.logs["temporal"].detach())
    assert cost > 0
    assert float((loss.value - bare.value).detach()) == pytest.approx(cost, rel=1e-3)
    made.prepare(5)
    assert "temporal" not in made.loss(batch, rng).logs


def test_dcm_s_second_expert_begins_as_the_first_one_ends() -> None:
    made = make("dcm", mlp_teacher(), steps=8)
    run(made, 0, 5)
    first = [param.clone() for param in made.players["student"].averages]
    made.prepare(5)
    for name in ("student", "student_2"):
        own = made.players[name].weights
        assert all(torch.equal(a, b) for a, b in zip(own, first, strict=True))
    run(made, 5, 8)
    assert all(
        torch.equal(a, b) for a, b in zip(made.players["student"].weights, first, strict=True)
    )
    assert made.best().at(0.7) is made.players["student"].best
    assert made.best().at(0.5) is made.players["student_2"].best


@pytest.mark.parametrize("at", [3, 5, 6, 7])
def test_dcm_s_experts_survive_a_resume_in_their_middle(at) -> None:
    keys = {"steps": 8, "adversary": {"student": 0.1}, "target": "ema"}
    whole, first, again = (make("dcm", mlp_teacher(), **keys) for _ in range(3))
    run(whole, 0, 8)
    run(first, 0, at)
    again.load_state(at, *saved(first))
    run(again, at, 8)
    same(saved(again)[0], saved(whole)[0])


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"boundary": 0.8},
            "boundary=0.8 is none of the times that pairs compare; set it to 0.81",
        ),
        ({"pairs": "ect"}, "pairs: experts learn at the times of a grid; set pairs.kind to grid"),
        ({"steps": 1}, "steps=1 leaves an expert without a step"),
        ({"temporal": 1.0}, r"temporal: samples are \[4\], and not \[channels, frames"),
    ],
)
def test_dcm_refuses_what_does_not_fit(keys, line) -> None:
    with pytest.raises(UserError, match=line):
        make("dcm", mlp_teacher(), **keys)


# Flash-WAM ---------------------------------------------------------------------------------------


def test_flash_wam_s_boundary_functions_are_the_published_ones() -> None:
    """f = c_skip x + c_out (x - s v) with sigma_data = 0.5, and f = x - s v."""
    s = torch.tensor([0.0, 0.02, 1.0], dtype=torch.float64)
    a, b = boundary(s, "preserving")
    torch.testing.assert_close(b[1:], -(s[1:] ** 2) * 0.5 / (s[1:] ** 2 + 0.25).sqrt())
    assert float(a[0]) == 1 and float(b[0]) == 0
    assert float(a[2]) == pytest.approx(0.2 + 0.447214, abs=1e-6)
    assert -float(b[1]) == pytest.approx(0.0004, abs=1e-6)  # a fiftieth of the linear one
    a, b = boundary(s, "linear")
    assert torch.equal(a, torch.ones_like(s)) and torch.equal(b, -s)


@pytest.mark.parametrize(("family", "slope"), [("linear", 1), ("preserving", 2)])
def test_flash_wam_s_gradient_reaches_the_network_by_b_alone(family, slope) -> None:
    """|df/dv| = |b(s)|, of slope 1 or 2 in log-log as s falls."""
    made = make("flash_wam", mlp_teacher(), families=(family,))
    head = made.players["student"].denoiser.head
    sizes = []
    for level in (1.0, 0.5, 0.02, 0.01):
        v = torch.randn(5, 4, generator=seeded(0)).requires_grad_()
        x_t = torch.randn(5, 4, generator=seeded(1))
        c = RF().coefs(torch.full((5,), level)).expand(x_t)
        f = head.clean(v, x_t, c)
        weight = torch.randn(5, 4, generator=seeded(2))
        ((f * weight).sum()).backward()
        a, b = boundary(torch.tensor(level), family)
        torch.testing.assert_close(v.grad, b * weight, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(f.detach(), a * x_t + b * v.detach(), rtol=1e-4, atol=1e-5)
        sizes.append(float((v.grad.norm() / weight.norm()).log()))
    assert (sizes[2] - sizes[3]) / math.log(2) == pytest.approx(slope, abs=0.01)


def test_flash_wam_s_linear_family_is_consistency_itself() -> None:
    ends = []
    for method in ("consistency", "flash_wam"):
        made = make(method, mlp_teacher(), pairs={"kind": "grid", "steps": 6}, optim={"lr": 1e-3})
        run(made, 0, 1)
        ends.append(made.players["student"].params)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_flash_wam_s_groups_are_read_and_weighed_apart() -> None:
    groups = {"groups": (1, 3), "families": ("preserving", "linear"), "shares": (1.0, 0.5)}
    made = make("flash_wam", mlp_teacher(), **groups, metric="l2", target="ema")
    heads = [made.players["student"].denoiser.head, made.players["student"].ema.head]
    assert all(head is made.target_net.head for head in heads)
    v, x_t = (torch.randn(5, 4, generator=seeded(k)) for k in (0, 1))
    c = RF().coefs(torch.full((5,), 0.3)).expand(x_t)
    a, b = boundary(torch.tensor(0.3), "preserving")
    f = heads[0].clean(v, x_t, c)
    torch.testing.assert_close(f[:, :1], a * x_t[:, :1] + b * v[:, :1])
    torch.testing.assert_close(f[:, 1:], x_t[:, 1:] - 0.3 * v[:, 1:])
    x, z = f, heads[0].noise(v, x_t, c)
    torch.testing.assert_close(0.7 * x + 0.3 * z, x_t)
    delta = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    assert float(made.apart(delta)) == 9 + 0.5 * 9
    with pytest.raises(UserError, match="export students of one group"):
        literal_rows(made.best(), (1.0, 0.0))


@pytest.mark.parametrize(
    ("teacher", "keys", "line"),
    [
        (mlp_teacher(), {"groups": (3,)}, "groups: they have 3 channels, and the samples 4"),
        (mlp_teacher(), {"groups": (3, 1)}, "families: 1 for 2 groups; give one for each"),
        (oracle(EDM()), {}, "teacher: boundary functions are of a flow's velocity"),
    ],
)
def test_flash_wam_refuses_what_does_not_fit(teacher, keys, line) -> None:
    with pytest.raises(UserError, match=line):
        make("flash_wam", teacher, **keys)
