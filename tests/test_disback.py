"""DisBack: recorded scores, their order, and what becomes of the student on the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.process import RF
from stepdistill.oracles.denoiser import Oracle
from stepdistill.run.errors import UserError
from stepdistill.run.player import Player
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.score.disback import moved
from tests.helpers import (
    MEAN,
    STD,
    Affine,
    AffineAdapter,
    dit_teacher,
    make,
    mlp_teacher,
    run,
    same,
    saved,
)

BEGUN = (0.0, 0.5)  # mean and standard deviation of the student's images at first


@pytest.mark.parametrize("more", [{}, {"student_steps": 2, "guidance": 2.0, "critic_steps": 2}])
def test_without_targets_it_is_dmd_to_the_bit(more) -> None:
    made = [make("disback", mlp_teacher(), targets=0, **more), make("dmd", mlp_teacher(), **more)]
    for one in made:
        run(one, 0, 5)
    same(saved(made[0])[0], saved(made[1])[0])
    assert made[0].passes() == made[1].passes()


def test_scores_are_recorded_and_met_in_reverse() -> None:
    """With 2 targets, 2 steps between records and 3 steps a target: F_1 at step 2, F_2 at step 4,
    the student's first step at 6 against F_2, F_1 from 9, and the teacher from 12."""
    keys = {"targets": 2, "record_every": 2, "interval": 3, "steps": 14}
    made = make("disback", mlp_teacher(), **keys)
    critics, students, met, held = [], [], [], []
    for step in range(14):
        made.prepare(step)
        critics.append(saved(made)[0]["critic"]["net.leave.weight"])
        students.append(saved(made)[0]["student"]["net.leave.weight"])
        met.append(made.target)
        held.append(sorted(name for name in made.players if name.startswith("target")))
        if step == 6:
            kept = {name: saved(made)[0][name]["net.leave.weight"] for name in held[-1]}
            first, second = (made.denoiser(f"target_{k}") for k in (1, 2))
        run(made, step, step + 1)
    names = [[]] * 2 + [["target_1"]] * 2 + [["target_1", "target_2"]] * 5 + [["target_1"]] * 3
    assert held == names + [[]] * 2
    assert torch.equal(kept["target_1"], critics[2])
    assert torch.equal(kept["target_2"], critics[4])
    assert not torch.equal(critics[4], critics[5])  # the fake score goes on from F_3
    assert met[6:] == [second] * 3 + [first] * 3 + [made.teacher] * 2
    assert torch.equal(first.net.leave.weight, kept["target_1"])
    changed = [not torch.equal(a, b) for a, b in zip(students, students[1:], strict=False)]
    assert changed == [False] * 6 + [True] * 7


def test_a_checkpoint_holds_the_targets() -> None:
    made = make("disback", mlp_teacher(), targets=2, record_every=1, interval=1)
    run(made, 0, 3)
    tensors, _ = saved(made)
    assert set(tensors) == {"student", "critic", "target_1", "target_2"}
    assert made.held() == {"teacher": 1, "student": 1, "critic": 1, "target": 2, "average": 1}


def test_with_adapters_a_target_is_one_too() -> None:
    """Of the fake score's weights when it was kept, on the teacher's network; then it is freed."""
    keys = {"targets": 1, "record_every": 1, "interval": 2, "batch_size": 4, "lora": {"rank": 2}}
    made = make("disback", dit_teacher(), **keys)
    run(made, 0, 1)
    critic = {k: v.clone() for k, v in made.denoiser("critic").weights().items()}
    run(made, 1, 3)
    assert made.adapters() == {"student": 1, "critic": 1, "target": 1, "average": 1}
    assert made.target.net is made.teacher.net and made.held() == {"teacher": 1}
    assert all(torch.equal(v, critic[k]) for k, v in made.target.weights().items())
    run(made, 3, 6)
    assert made.adapters() == {"student": 1, "critic": 1, "average": 1}
    fresh = make("disback", dit_teacher(), **keys)
    assert moved(made.denoiser("critic"), None, made.initial)
    assert not moved(fresh.denoiser("critic"), None, fresh.initial)


def test_a_score_that_never_moved_is_no_target() -> None:
    made = make("disback", mlp_teacher(), targets=1, record_every=1, critic={"lr": 1e-30})
    with pytest.raises(UserError, match="step 1: the score to record is still the teacher, so it"):
        run(made, 0, 1)


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
def test_a_score_that_has_not_moved_since_the_last_record_is_no_target(lora, monkeypatch) -> None:
    teacher = dit_teacher() if lora else mlp_teacher()
    made = make("disback", teacher, targets=2, record_every=1, interval=1, batch_size=4, lora=lora)
    run(made, 0, 1)
    monkeypatch.setattr(made.players["critic"].optimizer, "step", lambda: None)
    with pytest.raises(UserError, match="^step 2: the score to record is still the one before,"):
        run(made, 1, 2)
    monkeypatch.undo()
    run(made, 1, 3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"targets": 9}, "steps=6: recording and 9 targets take 19"),
        ({"interval": 4, "targets": 1}, "steps=6: recording and 1 targets take 6"),
        ({"adversary": {"features": "state", "head": "mlp"}}, "adversary: disback records"),
    ],
)
def test_what_leaves_no_step_against_the_teacher_is_refused(keys, message) -> None:
    with pytest.raises(UserError, match=message):
        make("disback", mlp_teacher(), **keys)


# Gaussians ----------------------------------------------------------------------------------------


def closed(**keys: Any) -> tuple[Trainer, Affine]:
    """A trainer on 64 coordinates of N(0.5, 1.3^2); its fake score's parameters are a Gaussian's
    mean and standard deviation, its student is u z, whose law is N(0, 0.5^2)."""
    teacher = Oracle(RF(), "velocity", torch.full((1, 64), MEAN), STD)
    optim = {"lr": 0.02, "betas": (0.5, 0.99)}
    keys = {"batch_size": 32, "optim": optim, "critic": optim, "ema": {"decay": 0.0}, **keys}
    made = make(keys.pop("method", "disback"), teacher, **keys)
    student = Denoiser(Affine(*BEGUN, 64), RF(), "x0", adapter=AffineAdapter())
    made.players["student"] = Player("student", student, made.config.optim, total=1)
    return made, student.net


def law(den: Denoiser) -> tuple[float, float]:
    """Mean and standard deviation of an oracle's Gaussian."""
    return float(den.net.means.mean()), float(den.net.stds.abs().mean())


def gaps(made: Trainer, steps: int) -> list[float]:
    """Train, and keep how far the fake score is from what the student is compared with."""
    found = []
    for step in range(steps):
        made.prepare(step)
        logs = made.step(step, made.batch(step))
        found += [float(logs["student/gap"])] if "student/gap" in logs else []
    return found


def test_recorded_laws_lie_between_teacher_and_student_and_the_student_follows_them() -> None:
    """By the trainer's own turns; on the way back the fake score is exact, and each stage ends
    with the law of its target, the last with the teacher's."""
    keys = {"targets": 2, "record_every": 4, "interval": 100, "critic_steps": 2}
    made, student = closed(steps=330, **keys)
    for step in range(12):
        made.prepare(step)
        made.step(step, made.batch(step))
    laws = [law(made.teacher), *(law(made.denoiser(f"target_{k}")) for k in (1, 2))]
    laws += [law(made.denoiser("critic")), BEGUN]
    for side in (0, 1):  # means and standard deviations fall from the teacher's to the student's
        values = [one[side] for one in laws]
        assert all(a - b > 0.05 for a, b in zip(values[:3], values[1:], strict=False))
        assert values[3] > values[4] - 0.05
    ends, fake = [], made.denoiser("critic").net
    for step in range(12, 330):
        made.prepare(step)
        with torch.no_grad():
            fake.means.fill_(float(student.mu))
            fake.stds.fill_(abs(float(student.u)))
        with made.players["student"].turn():
            made.turns(step)[0].loss(made.batch(step), Rng(0).at(step)).value.backward()
            made.players["student"].step()
        if step + 1 in (112, 212, 330):
            ends.append((float(student.mu), float(student.u)))
    for end, target in zip(ends, (laws[2], laws[1], (MEAN, STD)), strict=True):
        assert end == pytest.approx(target, abs=0.05)


def test_the_scores_stay_closer_than_on_the_straight_way() -> None:
    """The largest gap of the two scores along training, against dmd from the same fake score."""
    keys = {"targets": 3, "record_every": 4, "interval": 40, "critic_steps": 2, "steps": 196}
    way, _ = closed(**keys)
    back = gaps(way, 196)
    straight, _ = closed(method="dmd", critic_first=16, critic_steps=2, steps=196)
    at_once = gaps(straight, 196)
    assert len(back) == len(at_once) == 180
    assert max(back) < 0.6 * max(at_once)


def test_recorded_scores_are_not_guided_where_the_fake_score_is_not() -> None:
    """Their half without a label was never trained; the teacher's is."""
    made = make("disback", mlp_teacher(), guidance=3.0)
    run(made, 0, 4)
    batch, rng = made.batch(4), Rng(0).at(4)
    x_t, t = made.z(batch, rng), torch.full((8,), 0.5)
    with torch.no_grad():
        asked = made.ask(x_t, t, batch, rng, graph=False)
        plain = made.target(x_t, t, batch.cond)
    assert made.target is not made.teacher
    assert torch.equal(asked.real.x, plain.x)
    assert [p.batch for p in made.passes() if p.role == "target"] == [1]
    run(made, 4, 6)
    assert [p.batch for p in made.passes() if p.role == "teacher"] == [2]


@pytest.mark.parametrize(
    ("guide", "scale"), [("both", 3.0), ({"kind": "long_short", "train": 2.0, "fake": 1.5}, 1.5)]
)
def test_recorded_scores_are_guided_as_the_fake_score_is(guide, scale) -> None:
    """They are earlier states of it; the teacher at last is guided as the config says."""
    made = make("disback", mlp_teacher(), guidance=3.0, guide=guide)
    run(made, 0, 4)
    batch, rng = made.batch(4), Rng(0).at(4)
    x_t, t = made.z(batch, rng), torch.full((8,), 0.5)
    assert made.target is made.denoiser("target_2")
    with torch.no_grad():
        asked = made.ask(x_t, t, batch, rng, graph=False)
        real, fake = (
            guided(den, x_t, t, batch.cond, scale) for den in (made.target, made.denoiser("critic"))
        )
        plain = made.target(x_t, t, batch.cond)
    assert torch.equal(asked.real.x, real.x) and torch.equal(asked.fake.x, fake.x)
    assert not torch.allclose(real.x, plain.x)
    assert [p.batch for p in made.passes() if p.role == "target"] == [2]
    run(made, 4, 6)
    with torch.no_grad():
        asked = made.ask(x_t, t, batch, rng, graph=False)
        assert torch.equal(asked.real.x, guided(made.teacher, x_t, t, batch.cond, 3.0).x)
