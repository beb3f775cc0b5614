"""Pairs of times, segments of the path, and the stages of progressive distillation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import EDM, RF, Trig
from stepdistill.diffusion.sampler import full, move, sample
from stepdistill.diffusion.timesteps import LogitNormal, uniform_grid
from stepdistill.losses.consistency import landing_estimate, snr_weight
from stepdistill.oracles.denoiser import Oracle
from stepdistill.run.assets import load_teacher
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.find import trainer
from stepdistill.trainers.trajectory.pairs import Doubling, Span
from tests.helpers import batch_of, make, mlp_teacher, run

STD = 0.7


def oracle(process: object = None) -> Oracle:
    return Oracle(process or RF(), "velocity", torch.zeros(1, 1), STD)


def span(process: object, steps: int = 8) -> Span:
    return Span(process, 1.0, steps, lambda d, u: d.sample(u, process), torch.device("cpu"))


# iCT's pairs -------------------------------------------------------------------------------------


def test_ict_doubles_its_intervals_in_eight_stages_of_equal_length() -> None:
    """10, 20, ..., 1280 over the run (the schedule of iCT, section 3.4)."""
    pairs = Doubling()
    counts = [pairs.intervals(step, 800) for step in range(0, 800, 100)]
    assert counts == [10, 20, 40, 80, 160, 320, 640, 1280]
    assert pairs.intervals(99, 800) == 10 and pairs.intervals(799, 800) == 1280
    odd = Doubling(first=10, last=50)
    assert [odd.intervals(step, 4) for step in range(4)] == [10, 20, 40, 50]


@pytest.mark.parametrize("process", [EDM(), RF()], ids=["edm", "rf"])
def test_ict_gives_an_interval_the_density_s_share(process) -> None:
    """p(i) is proportional to erf of ln n_{i+1} less erf of ln n_i, by a count of draws."""
    pairs, many = Doubling(t=LogitNormal(mean=-1.1, std=2.0)), torch.arange(40_000)
    where = span(process)
    t, r = pairs.draw(Rng(0).at(0), many, where)
    grid = where.grid(10)
    log_n = torch.tensor([-0.5 * float(process.log_snr(one.double())) for one in grid[1:-1]])
    cdf = 0.5 * (1 + torch.erf((log_n + 1.1) / (2 * math.sqrt(2))))
    edges = [1.0, *cdf.tolist(), 0.0]
    for i in range(10):
        here = (t == grid[i]) & (r == grid[i + 1])
        assert float(here.float().mean()) == pytest.approx(edges[i] - edges[i + 1], abs=0.012), i
    assert ((t == grid[0]) | (t[:, None] == grid[None, 1:-1]).any(1)).all()


def test_ict_draws_times_off_the_grid_into_it() -> None:
    where = span(RF())
    t, r = Doubling(first=4, last=4).draw(Rng(0).at(0), torch.arange(512), where)
    assert {(round(float(a), 6), round(float(b), 6)) for a, b in zip(t, r, strict=True)} == {
        (1.0, 0.75),
        (0.75, 0.5),
        (0.5, 0.25),
        (0.25, 0.0),
    }


def test_ict_s_curriculum_goes_on_where_it_was_after_a_resume() -> None:
    """Pairs are a function of the step: a run resumed in the middle draws the same."""
    keys = {"pairs": {"kind": "doubling", "first": 2, "last": 16}, "solver": "data", "steps": 8}
    made, again = (make("consistency", mlp_teacher(), **keys) for _ in range(2))
    run(made, 0, 8)
    run(again, 0, 5)
    third = make("consistency", mlp_teacher(), **keys)
    updates = {name: player.updates for name, player in again.players.items()}
    state = {k: {n: v.clone() for n, v in part.items()} for k, part in again.state().items()}
    third.load_state(5, state, updates)
    run(third, 5, 8)
    for a, b in zip(made.players["student"].params, third.players["student"].params, strict=True):
        assert torch.equal(a, b)


def test_ict_begins_with_fresh_weights_and_reads_nothing_of_the_teacher() -> None:
    teacher = load_teacher("digits-dit")
    ends = []
    for scale in (1.0, 2.0):
        with torch.no_grad():
            for param in teacher.net.parameters():
                param.mul_(scale)
        made = make("consistency", teacher, scratch=True, solver="data", batch_size=4)
        ends.append([param.clone() for param in made.players["student"].params])
        assert made.teacher.net is teacher.net
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    own = list(teacher.net.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(ends[0], own, strict=True))
    other = make("consistency", teacher, scratch=True, solver="data", batch_size=4, seed=1)
    assert not all(
        torch.equal(a, b) for a, b in zip(ends[0], other.players["student"].params, strict=True)
    )


def test_scratch_refuses_what_has_no_config_and_adapters() -> None:
    with pytest.raises(UserError, match="scratch: a .* cannot be made anew from a config"):
        make("consistency", oracle(), scratch=True)
    with pytest.raises(UserError, match="lora: adapters change a trained network"):
        make("consistency", load_teacher("digits-dit"), scratch=True, lora={"rank": 2})


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"kind": "doubling", "first": 8, "last": 4}, "last: must not be below first=8"),
        ({"kind": "double"}, "kind double is unknown; did you mean doubling?"),
        ({"kind": "grid", "steps": 4, "skip": 5}, "skip: must not be above steps=4"),
    ],
)
def test_pairs_that_make_no_sense_are_refused(keys, line) -> None:
    with pytest.raises(Exception, match=line.replace("?", r"\?")):
        make("consistency", mlp_teacher(), pairs=keys)


# Segments ----------------------------------------------------------------------------------------


class Jumper(Denoiser):
    """A student whose step from t to the end of its segment multiplies the state by gain(t)."""

    def __init__(self, teacher: Denoiser, made: object, gain: object) -> None:
        super().__init__(teacher.net, teacher.process, "x0", adapter=teacher.adapter)
        self.made, self.gain = (made,), gain

    def raw(self, x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        (made,) = self.made
        end = made.end(t)
        factors = [self.gain(float(a), float(b)) for a, b in zip(t, end, strict=True)]
        return landing_estimate(x_t, torch.tensor(factors)[:, None] * x_t, t, end, self.process)


def euler(t: float, r: float) -> float:
    """What one Euler step multiplies a state by, on RF."""

    def polar(t: float) -> tuple[float, float]:
        return math.hypot((1 - t) * STD, t), math.atan2(t, (1 - t) * STD)

    (a, phi), (b, psi) = polar(t), polar(r)
    return b / a * math.cos(phi - psi)


def walked(count: int) -> object:
    """Euler's factor along a grid of ``count`` intervals, from one of its times to another."""

    def gain(t: float, end: float) -> float:
        total = 1.0
        for k in range(round((1 - t) * count), round((1 - end) * count)):
            total *= euler(1 - k / count, 1 - (k + 1) / count)
        return total

    return gain


def pcm_loss(gain: object, **keys: object) -> float:
    made = make("pcm", oracle(), batch_size=64, metric="l2", weight="one", **keys)
    made.players["student"].denoiser = Jumper(made.teacher, made, gain)
    return float(made.loss(batch_of(made, 0), Rng(0).at(0)).value)


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_segments_rest_at_euler_s_product_within_each(segments) -> None:
    keys = {"student_steps": segments, "pairs": {"kind": "grid", "steps": 8}}
    assert pcm_loss(walked(8), **keys) < 1e-10
    if segments < 8:  # at 8 a jump is a step, and walks the grid whatever is in between
        assert pcm_loss(walked(16), **keys) > 1e-5


def test_one_segment_is_consistency_bit_for_bit() -> None:
    ends = []
    for method, keys in (("consistency", {"weight": "one"}), ("pcm", {"student_steps": 1})):
        made = make(method, mlp_teacher(), pairs={"kind": "grid", "steps": 6}, **keys)
        run(made, 0, 4)
        ends.append(made.players["student"].params)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_pairs_stay_in_their_segment_and_its_end_is_the_state_itself() -> None:
    made = make("pcm", mlp_teacher(), batch_size=256, pairs={"kind": "grid", "steps": 8, "skip": 3})
    t, r = made.times(made.batch(0), Rng(0).at(0))
    end = made.end(t)
    assert (end < t).all() and (r >= end).all() and (r < t).all()
    pairs = {(round(float(a), 6), round(float(b), 6)) for a, b in zip(t, r, strict=True)}
    assert pairs == {(1 - k / 8, 0.75 - k // 2 / 4) for k in range(8)}
    x = made.process.noise(torch.ones(256, 4), torch.zeros(256, 4), r)
    same = made.jump(made.teacher, x, r, end, made.batch(0))
    assert torch.equal(same, x)  # with this skip every r is an end


def test_a_student_of_segments_walks_the_teacher_s_whole_path() -> None:
    """Its steps without fresh noise end where the teacher's own do, in any number of segments."""
    teacher, z = oracle(), torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    whole = sample(teacher, z, uniform_grid(RF(), 8), batch_of(make("pcm", teacher), 0).cond)
    for segments in (1, 2, 4):
        made = make("pcm", teacher, student_steps=segments, pairs={"kind": "grid", "steps": 8})
        ideal, (grid,) = Jumper(teacher, made, walked(8)), made.grids().values()
        got = sample(ideal, z, grid, made.batch(0).cond, noise=made.noise)
        torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["grid", "doubling"])
def test_segments_that_do_not_end_on_the_pairs_grid_are_refused(kind) -> None:
    pairs = {"kind": "grid", "steps": 6} if kind == "grid" else {"kind": kind, "last": 10}
    with pytest.raises(UserError, match="student_steps=4: its steps begin at times"):
        make("pcm", mlp_teacher(), student_steps=4, pairs=pairs)


# Progressive -------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [RF(), EDM(), Trig()], ids=["rf", "edm", "trig"])
def test_the_estimate_of_a_landing_lands(process) -> None:
    rng = torch.Generator().manual_seed(1)
    x_t, x_r = (torch.randn(5, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    t = process.warp(torch.linspace(0.5, 1.0, 5, dtype=torch.float64))
    for r in (process.warp(torch.full_like(t, 0.3)), torch.zeros_like(t)):
        x = landing_estimate(x_t, x_r, t, r, process)
        a, b = process.coefs(t).expand(x_t), process.coefs(r).expand(x_t)
        z = (x_t - a.alpha * x) / a.sigma
        torch.testing.assert_close(b.alpha * x + b.sigma * z, x_r)


def test_variance_exploding_landing_is_the_published_formula() -> None:
    """x_t - n (x_r - x_t) / (n_r - n)."""
    x_t, x_r = torch.tensor([[2.0]]), torch.tensor([[1.5]])
    got = landing_estimate(x_t, x_r, torch.tensor([4.0]), torch.tensor([2.0]), EDM())
    torch.testing.assert_close(got, x_t - 4 * (x_r - x_t) / (2 - 4))


def test_snr_weights() -> None:
    t = torch.tensor([1.0, 0.5, 0.25])
    torch.testing.assert_close(snr_weight(t, RF(), "truncated"), torch.tensor([1.0, 1.0, 9.0]))
    torch.testing.assert_close(snr_weight(t, RF(), "plus_one"), torch.tensor([1.0, 2.0, 10.0]))


def test_the_walk_that_is_distilled_multiplies_by_its_cosines() -> None:
    """Eight steps on the even trigonometric grid by cos(pi/16)^8 = .85623."""
    process = Trig(STD)
    teacher = Oracle(process, "velocity", torch.zeros(1, 1), STD)
    made = make("progressive", teacher, first=8, steps=6)
    z = torch.tensor([[1.0]])
    x = full(z, made.top)
    x_t = process.coefs(x).sigma[:, None] * z
    times = made.chain(made.top)
    assert len(times) == 9 and times[-1] == 0
    for t, r in zip(times, times[1:], strict=False):
        x_t = move(teacher(x_t, full(z, t), made.batch(0).cond), process, full(z, r))
    assert float(x_t) / STD == pytest.approx(0.85623, abs=1e-5)
    two = make("progressive", teacher, first=8, student_steps=2, steps=6)
    times = uniform_grid(process, 8)
    assert two.chain(times[4]) == times[4:] and two.chain(times[0]) == times[:5]


class Stepper(Jumper):
    """A student whose step on a grid of even times multiplies the state by gain(t, next time)."""

    def __init__(self, teacher: Denoiser, count: int, gain: object) -> None:
        super().__init__(teacher, self, gain)
        self.count = count

    def end(self, t: Tensor) -> Tensor:
        return (t - 1 / self.count).clamp_min(0)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_rests_where_its_student_makes_two_steps_of_one(stage) -> None:
    """Of the teacher, then of the student before: Euler's product over the teacher's own grid."""
    made = make("progressive", oracle(), first=8, steps=6, batch_size=64)
    made.prepare(2 * stage)
    if stage:
        made.players["previous"].denoiser = Stepper(made.teacher, 8 >> stage, walked(8))
    batch, rng = batch_of(made, 2 * stage), Rng(0).at(2 * stage)
    losses = []
    for count in (8, 16):
        made.players["student"].denoiser = Stepper(made.teacher, 4 >> stage, walked(count))
        losses.append(float(made.loss(batch, rng).value))
    assert losses[0] < 1e-9
    assert losses[1] > 1e-4


def test_each_stage_s_teacher_is_the_student_before_and_guidance_is_learnt_once() -> None:
    made = make("progressive", mlp_teacher(), first=8, steps=9, guidance=3.0)
    sizes, before = [], None
    for step in range(9):
        made.prepare(step)
        if step % 3 == 0 and step:
            best = made.players["previous"].weights
            assert all(torch.equal(a, b) for a, b in zip(best, before, strict=True))
            assert made.players["student"].updates == 0
        sizes.append((len(made.grid) - 1, made.passes()[0].role, made.passes()[0].batch))
        run(made, step, step + 1)
        before = [param.clone() for param in made.players["student"].averages]
    own = [(8, "teacher", 2), (4, "previous", 1), (2, "previous", 1)]
    assert sizes == [size for size in own for _ in range(3)]


def test_a_resume_keeps_the_steps_that_stages_are_parts_of() -> None:
    assert trainer("progressive").kept == ("steps",)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"first": 12}, "first=12 is not student_steps=1 doubled; set first to one of 2, 4, 8, "),
        ({"first": 4, "student_steps": 4}, "first=4 is not student_steps=4 doubled"),
        ({"first": 32, "steps": 4}, "steps=4 leaves one of 5 stages without a step; give more"),
    ],
)
def test_stages_that_do_not_fit_are_refused(keys, line) -> None:
    with pytest.raises(UserError, match=line):
        make("progressive", mlp_teacher(), **keys)
