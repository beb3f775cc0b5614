"""Score distillation as trained: equivalences, fixed points, rollouts and phases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import RF
from stepdistill.diffusion.sampler import sample
from stepdistill.oracles.denoiser import Oracle
from stepdistill.pipelines.image import MODEL_NAMES
from stepdistill.run.assets import load_teacher
from stepdistill.run.errors import UserError
from stepdistill.run.player import Player
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.find import methods, trainer
from stepdistill.trainers.score.phased_dmd import MOST_PHASES
from tests.helpers import (
    MEAN,
    STD,
    Affine,
    AffineAdapter,
    batch_of,
    dit_teacher,
    make,
    mlp_teacher,
    run,
    same,
    saved,
    turn_gradients,
)


@pytest.mark.parametrize("more", [{}, {"guidance": 2.0, "critic_steps": 2}])
@pytest.mark.parametrize("teacher", [mlp_teacher, dit_teacher])
def test_one_phase_of_one_step_is_dmd_to_the_bit(teacher, more) -> None:
    phased = make("phased_dmd", teacher(), levels=(1.0, 0.0), phase_steps=1, **more)
    dmd = make("dmd", teacher(), student_steps=1, **more)
    assert phased.grids() == dmd.grids()
    for made in (phased, dmd):
        run(made, 0, 4)
    same(saved(phased)[0], saved(dmd)[0])
    assert saved(phased)[1] == saved(dmd)[1]


@pytest.mark.parametrize("whole", [True, False])
def test_one_phase_of_several_steps_is_dmd_with_predicted_noise(whole) -> None:
    """Also in what the fake score learns: whole rollouts, or the images at drawn exits.

    One walks by the sampler and the other by Euler steps, so they differ by rounding.
    """
    keys = {"critic_steps": 2, "critic_rollout": whole}
    phased = make("phased_dmd", mlp_teacher(), levels=(1.0, 0.0), phase_steps=4, **keys)
    dmd = make("dmd", mlp_teacher(), student_steps=4, noise="predicted", **keys)
    assert phased.grids() == dmd.grids()
    assert [p.count for p in phased.passes()] == [p.count for p in dmd.passes()]
    for made in (phased, dmd):
        run(made, 0, 4)
    for role in ("student", "critic"):
        pairs = zip(phased.players[role].params, dmd.players[role].params, strict=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("steps", [1, 4])
def test_whole_rollouts_are_what_the_sampler_makes(steps) -> None:
    """And the fake score learns them; of one step they are the samples that it learns anyway."""
    made = make("dmd", mlp_teacher(), student_steps=steps)
    batch, rng = made.batch(0), Rng(5).at(0)
    with torch.no_grad():
        got = made.generate(batch, rng, exact=True).x
        assert torch.equal(got, made.walk(batch, rng, None))
    assert made.whole == (steps > 1)
    made.student_loss(batch, rng)
    assert (made.shared is None) == made.whole


LAWS = [
    method.name
    for method in methods()
    for keys in [next(iter(trainer(method.name).proofs.values())).keys]
    for made in [make(method.name, mlp_teacher(), steps=400, **keys)]
    if made.fixed_point.kind == "law" and made.turns(0)[0].player == "student"
    if "critic" in made.players
]


@pytest.mark.parametrize("method", LAWS)
def test_where_fake_and_teacher_agree_nothing_moves(method) -> None:
    """Methods whose fixed point is a law start with the teacher as fake score: their first student
    gradient is zero.

    Exactly so for a direction; to rounding where it is differentiated through both.
    """
    made = make(method, mlp_teacher(), steps=400)
    first = sum(float(grad.abs().sum()) for grad in turn_gradients(made, 0)[0])
    run(made, 0, 2)
    later = sum(float(grad.abs().sum()) for grad in turn_gradients(made, 2)[0])
    assert later > 0
    assert first <= (1e-4 * later if made.passes()[1].kind == "input" else 0.0)


TIED = {  # law of the one-step student mu + u z, as (mean, std) of clean images; where it rests
    "dmd": (lambda mu, u: (mu, abs(u)), (MEAN, STD)),
    "sim": (lambda mu, u: (mu, abs(u)), (MEAN, STD)),
    # phase 1 ends at t = 1/2 with x_s = (mu + u z + z) / 2, as clean N(mu, (1 + u)^2 - 1) would
    "phased_dmd": (
        lambda mu, u: (mu, math.sqrt(max(1e-6, (1 + u) ** 2 - 1))),
        (MEAN, math.sqrt(1 + STD**2) - 1),
    ),
}


def closed_form(method: str, mu: float, u: float, steps: int) -> tuple[Trainer, Affine, nn.Module]:
    """A trainer on 64 Gaussian coordinates, its student mu + u z, and its fake score's oracle."""
    dim = 64
    more = {"levels": (1.0, 0.5, 0.0), "phase_steps": 1} if method == "phased_dmd" else {}
    teacher = Oracle(RF(), "velocity", torch.full((1, dim), MEAN), STD)
    optim = {"lr": 0.03, "betas": (0.5, 0.99), "decay": "cosine"}
    keys = {"steps": 2 * steps, "batch_size": 32, "optim": optim, "critic": optim}
    made = make(method, teacher, **keys, **more)
    student = Denoiser(Affine(mu, u, dim), RF(), "x0", adapter=AffineAdapter())
    for name, den in (("student", student), ("critic", teacher.clone())):
        made.players[name] = Player(name, den, made.config.optim, total=steps)
    return made, student.net, made.players["critic"].denoiser.net


def update(made: Trainer, name: str, step: int) -> None:
    """One turn of a player alone."""
    place, turn = next((i, t) for i, t in enumerate(made.turns(step)) if t.player == name)
    with made.players[name].turn():
        turn.loss(made.batch(step), Rng(0).at(step, place)).value.backward()
        made.players[name].step()


@pytest.mark.parametrize("method", TIED)
def test_with_an_exact_fake_score_the_trainer_reaches_the_target(method) -> None:
    """From (0, .5), by the trainer's own student turn."""
    law, target = TIED[method]
    made, student, fake = closed_form(method, 0.0, 0.5, 300)
    for step in range(300):
        mean, std = law(float(student.mu), float(student.u))
        fake.means.fill_(mean)
        fake.stds.fill_(std)
        update(made, "student", step)
    assert (float(student.mu), float(student.u)) == pytest.approx(target, abs=0.02)


@pytest.mark.parametrize("method", TIED)
def test_the_fake_score_learns_the_student_s_law(method) -> None:
    """From the teacher's, by the trainer's own critic turn; at a phase's level too."""
    made, _, fake = closed_form(method, 0.1, 0.8, 200)
    for step in range(200):
        update(made, "critic", step)
    learnt = float(fake.means.mean()), float(fake.stds.abs().mean())
    assert learnt == pytest.approx(TIED[method][0](0.1, 0.8), abs=0.02)


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("sim", {}),
        ("dmd", {}),
        ("phased_dmd", {}),
        ("phased_dmd", {"levels": (1.0, 0.7, 0.3, 0.0), "phase_steps": 3}),
    ],
)
def test_the_training_rollout_is_the_sampler_s(method, keys) -> None:
    """Whole rollouts of the newest weights, against the sampler on the longest exported grid."""
    made = make(method, mlp_teacher(), ema={"decay": 0.0}, **keys)
    with torch.enable_grad():
        run(made, 0, 6)
    batch, rng = batch_of(made, 6), Rng(0).at(6)
    steps = max(made.grids())
    expected = sample(made.best(), made.z(batch, rng), made.grids()[steps], batch.cond)
    got = made.generate(batch, rng, exact=True)
    assert got.level == 0
    torch.testing.assert_close(got.x, expected)


@torch.no_grad()
@pytest.mark.parametrize("noise", ["fresh", "predicted"])
def test_dmd_exits_are_the_sampler_s_states(noise) -> None:
    """Backward simulation: the image at each exit is the one that inference would predict there."""
    made = make("dmd", mlp_teacher(), student_steps=3, noise=noise)
    student, (grid,) = made.denoiser("student"), made.grids().values()
    exits = set()
    for step in range(12):
        batch, rng = made.batch(step), Rng(0).at(step)
        j = rng.integer("exit", 3)
        exits.add(j)
        expected = sample(
            student,
            made.z(batch, rng),
            (*grid[: j + 1], 0.0),
            batch.cond,
            noise=noise,
            fresh=lambda i, b=batch, r=rng: made.z(b, r, f"fresh-{i}"),
        )
        torch.testing.assert_close(made.generate(batch, rng, exact=False).x, expected)
    assert exits == {0, 1, 2}


def test_experts_are_the_teacher_until_their_phase_comes() -> None:
    made = make("phased_dmd", mlp_teacher(), levels=(1.0, 0.6, 0.2, 0.0), phase_steps=1)
    run(made, 0, 2)
    experts = made.best()
    assert experts.at(0.6) is made.teacher
    assert experts.at(0.1) is made.teacher
    assert experts.at(0.9) is made.players["student"].ema
    run(made, 2, 6)
    names = [p.name for p in made.students()]
    assert names == ["student", "student_2", "student_3"]
    assert made.best().at(1.0) is made.players["student"].denoiser  # retired to its average
    assert made.grids() == {3: (1.0, 0.6, 0.2, 0.0)}


@pytest.mark.parametrize(
    ("levels", "steps", "message"),
    [
        ((), 6, "must fall"),
        ((0.0,), 6, "must bound 1 to 4 phases"),
        ((1.0,), 6, "must fall"),
        ((0.9, 0.5, 0.0), 6, "must fall from 1, pure noise, to 0"),
        ((1.0, math.nan, 0.0), 6, "finite"),
        ((1.0, 0.8, 0.6, 0.4, 0.2, 0.0), 60, "must bound 1 to 4 phases"),
        ((1.0, 0.5, 0.1), 6, "must fall"),
        ((1.0, 0.5, 0.5, 0.0), 6, "must fall"),
        ((0.0, 0.5, 1.0), 6, "must fall"),
        ((1.0, 0.6, 0.3, 0.0), 4, "without a step"),
    ],
)
def test_phases_that_make_no_sense_are_refused(levels, steps, message) -> None:
    with pytest.raises(ValueError, match=message):
        make("phased_dmd", mlp_teacher(), levels=levels, steps=steps)


def test_an_export_holds_as_many_networks_as_there_may_be_phases() -> None:
    assert len(MODEL_NAMES) == MOST_PHASES


def test_phases_of_a_noise_predictor_begin_where_one_step_is_well_posed() -> None:
    teacher = load_teacher("digits-unet")
    with pytest.raises(UserError, match=r"must fall from 0\.768, where students start=0\.768"):
        make("phased_dmd", teacher, levels=(1.0, 0.5, 0.0))
    made = make("phased_dmd", teacher, levels=(0.768, 0.5, 0.0))
    assert made.grids()[4] == pytest.approx((0.768, 0.634, 0.5, 0.25, 0.0))
    made = make("phased_dmd", teacher, start=1.0)
    assert made.grids()[4] == pytest.approx((1.0, 0.8, 0.6, 0.3, 0.0))


@pytest.mark.parametrize("method", ["sim", "dmd", "consistency"])
def test_no_training_time_is_noisier_than_the_start(method) -> None:
    uniform = {"pairs": {"kind": "ect", "t": {"kind": "uniform"}}}
    keys = uniform if method == "consistency" else {}
    made = make(method, load_teacher("digits-unet"), batch_size=256, **keys)
    assert made.top == made.grids()[1][0] == 0.768
    batch, rng = made.batch(0), Rng(0).at(0)
    if method == "consistency":
        times, _ = made.times(batch, rng)
    else:
        times = made.times(made.config.student_t, 0.0, batch, rng)
    assert 0.7 < float(times.max()) <= 0.768


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("sim", {}),
        ("sim", {"form": "full"}),
        ("dmd", {}),
        ("dmd", {"student_steps": 2}),
        ("phased_dmd", {"levels": (0.768, 0.4, 0.0)}),
        ("consistency", {}),
        ("consistency", {"solver": "heun", "guidance": 2.0}),
        ("consistency", {"solver": "data", "pairs": {"kind": "grid"}}),
    ],
)
def test_a_noise_predictor_is_distilled_with_losses_of_sane_size(method, keys) -> None:
    made = make(method, load_teacher("digits-unet"), **keys)
    assert image_size(made) < 1.0
    for step in range(2):
        made.prepare(step)
        logs = made.step(step, batch_of(made, step))
        assert all(value.isfinite() for value in logs.values())
        assert all(abs(float(v)) < 300 for k, v in logs.items() if not k.endswith("grad_norm"))
    assert image_size(made) < 3.0


def image_size(made: Trainer) -> float:
    """Root mean square of the student's images in its fewest steps."""
    batch = made.batch(0)
    z, steps = made.z(batch, Rng(0)), min(made.grids())
    return float(made.draw(z, batch.cond, steps, Rng(0), batch.index).square().mean().sqrt())


def test_one_step_of_a_noise_predictor_from_pure_noise_is_ill_posed() -> None:
    """Why its students start later: the same network's image is several times too large."""
    teacher = load_teacher("digits-unet")
    assert image_size(make("sim", teacher)) < 1.0
    assert image_size(make("sim", teacher, start=1.0)) > 3.0


def test_a_new_phase_starts_from_the_teacher() -> None:
    made = make("phased_dmd", mlp_teacher())
    run(made, 0, 3)
    average = {k: v.clone() for k, v in made.players["student"].ema.net.state_dict().items()}
    made.prepare(3)
    teacher = made.teacher.net.state_dict()
    for name in ("student_2", "critic"):
        state = made.denoiser(name).net.state_dict()
        assert all(torch.equal(v, teacher[k]) for k, v in state.items())
        assert made.players[name].updates == 0
        assert not made.players[name].optimizer.state
    frozen = made.denoiser("student").net.state_dict()
    assert all(torch.equal(v, average[k]) for k, v in frozen.items())
    run(made, 3, 6)
    assert all(torch.equal(v, average[k]) for k, v in frozen.items())
