"""The engine of score distillation: who takes which turn, who follows whom, and at what cost."""

from __future__ import annotations

import pytest

from stepdistill.losses.guides import Both, LongShort, Spread, Teacher
from stepdistill.proof.contract import counting, declared
from stepdistill.run.errors import UserError
from stepdistill.run.player import Player
from tests.helpers import dit_teacher, make, mlp_teacher, run

# Turns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"critic_steps": 3}, {"recompute": True}])
@pytest.mark.parametrize(
    ("method", "followed"),
    [
        ("dmd", [None, "student", "student", "student", "student", "student"]),
        ("phased_dmd", [None, "student", "student", None, "student_2", "student_2"]),
    ],
)
def test_a_fake_score_follows_the_student_once_in_each_of_its_steps(
    method, followed, more, monkeypatch
) -> None:
    """Whether it trains on the student's own samples or, as by default in phases, on fresh ones;
    and not where it trains alone."""
    calls: list[tuple[str, str, float]] = []
    monkeypatch.setattr(
        Player, "follow", lambda self, other, share: calls.append((self.name, other.name, share))
    )
    made = make(method, mlp_teacher(), critic_first=1, critic_follows=0.25, **more)
    for step, name in enumerate(followed):
        calls.clear()
        run(made, step, step + 1)
        assert calls == [("critic", name, 0.25)] * (name is not None), step


def test_the_fake_score_of_whole_rollouts_is_moved_by_what_it_follows() -> None:
    """By default in phases: its weights are others than those of a run in which it follows
    nobody."""
    ends = []
    for share in (0.0, 0.5):
        made = make("phased_dmd", mlp_teacher(), critic_follows=share)
        assert made.config.critic_rollout and made.config.phase_steps == 2
        run(made, 0, 2)
        ends.append(made.players["critic"].weights[0].clone())
    assert not ends[0].equal(ends[1])


@pytest.mark.parametrize(
    ("method", "keys", "line"),
    [
        ("dmd", {"critic_first": 6}, "critic_first=6 leaves the student none of 6 steps; lower it"),
        (
            "phased_dmd",
            {"critic_first": 3},
            "critic_first=3 leaves the student none of 3 steps; lower it",
        ),
        (
            "phased_dmd",
            {"critic_first": 3, "steps": 7},
            "steps=7 leaves one of 2 phases without a step of the student; give more steps, fewer "
            "levels, or a smaller critic_first",
        ),
    ],
)
def test_a_student_that_would_never_train_is_refused(method, keys, line) -> None:
    with pytest.raises(UserError) as caught:
        make(method, mlp_teacher(), **keys)
    assert str(caught.value) == line
    made = make(method, mlp_teacher(), **{**keys, "critic_first": keys["critic_first"] - 1})
    run(made, 0, made.config.steps)
    assert all(player.updates or player.ema is None for player in made.students())


def test_in_every_phase_the_fake_score_trains_alone_at_first() -> None:
    made = make("phased_dmd", mlp_teacher(), critic_first=1)
    for first, name in ((0, "student"), (3, "student_2")):
        made.prepare(first)
        student, critic = made.players[name], made.players["critic"]
        start = student.weights[0].clone()
        run(made, first, first + 1)
        assert (student.updates, critic.updates) == (0, 1)
        assert student.weights[0].equal(start)
        run(made, first + 1, first + 3)
        assert (student.updates, critic.updates) == (2, 3)
        assert not student.weights[0].equal(start)
        assert (student.total, critic.total) == (2, 3)


def test_the_student_s_schedule_spans_its_own_updates() -> None:
    keys = {"critic_first": 2, "critic_steps": 2, "optim": {"lr": 1.0, "decay": "linear"}}
    student, critic = (make("dmd", mlp_teacher(), **keys).players[n] for n in ("student", "critic"))
    assert (student.total, critic.total) == (4, 12)
    assert student.config.lr_at(3, student.total) == pytest.approx(0.25)


# Where it rests -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guide", "leads"),
    [(Teacher(), True), (Both(), False), (Spread(), False), (LongShort(train=2.0, fake=2.0), True)],
    ids=lambda value: getattr(value, "kind", value),
)
def test_a_guide_says_whose_law_the_student_rests_at(guide, leads) -> None:
    """The guided teacher's where the fake score is not guided alike, else the data's own."""
    assert guide.leads is leads
    for method in ("dmd", "swiftbrush", "sid"):
        scale = 1.0 if guide.own_scale else 2.0
        made = make(method, mlp_teacher(), guide=guide, guidance=scale)
        assert made.fixed_point.guided is leads


# Cost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("dmd2", {}),
        ("dmd2", {"adversary": {"features": "teacher", "r1": 1.0}}),
        ("vdot", {}),
        ("uni_instruct", {}),
    ],
    ids=["dmd2", "dmd2 on the teacher", "vdot", "uni_instruct"],
)
def test_heads_on_features_cost_what_is_declared(method, keys) -> None:
    """Which passes are whole, which end at the features, and which have a tail without a graph."""
    made = make(method, dit_teacher(), batch_size=2, steps=1000, **keys)
    with counting(made) as counts:
        run(made, 0, 3)
    assert {key: count / 3 for key, count in counts.items()} == dict(declared(made))
    assert any(key[3] == "features" for key in counts)
