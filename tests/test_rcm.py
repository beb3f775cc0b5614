"""rCM: whose samples are pulled, where to, and what its fake score is told."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from stepdistill.diffusion.process import RF
from stepdistill.diffusion.sampler import sample
from stepdistill.oracles.denoiser import Oracle
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss
from tests.helpers import batch_of, dit_teacher, make, mlp_teacher, run, same


def test_rcm_s_pull_is_balanced_for_the_size_of_a_sample() -> None:
    made = make("rcm", mlp_teacher())
    assert made.regularizer == pytest.approx(0.01 * math.sqrt(2.1e6 / 4))
    assert make("rcm", mlp_teacher(), regularizer=0.0).regularizer == 0


@pytest.mark.parametrize("std", [0.5, 1.6])
def test_rcm_pulls_a_student_of_another_spread_towards_the_teacher_s(std, monkeypatch) -> None:
    """With an exact fake score of N(0, std^2) and a teacher of N(0, 1)."""
    teacher = Oracle(RF(), "velocity", torch.zeros(1, 4), 1.0)
    made = make("rcm", teacher, batch_size=256, own_walk="drawn")
    fake = Oracle(RF(), "velocity", torch.zeros(1, 4), std)
    x = std * torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    leaf = x.clone().requires_grad_()
    monkeypatch.setattr(made, "denoiser", lambda name: fake)
    monkeypatch.setattr(
        made, "sampled", lambda batch, rng, graph: (leaf, torch.ones(256), batch.cond)
    )
    monkeypatch.setattr(made, "loss", lambda batch, rng: Loss(torch.zeros(())))
    made.both(batch_of(made, 0), Rng(0).at(0)).value.backward()
    moved = -float((leaf.grad * x).sum())
    assert moved > 0 if std < 1 else moved < 0


def test_rcm_s_own_samples_are_its_sampler_s_and_the_fake_score_is_told_their_steps() -> None:
    made = make("rcm", mlp_teacher(), batch_size=4, own_steps=4)
    assert made.denoiser("critic").adapter.numbers(made.denoiser("critic").net) == ("steps",)
    assert made.denoiser("student").adapter.numbers(made.denoiser("student").net) == ()
    batch, drawn = batch_of(made, 0), set()
    for step in range(12):
        rng = Rng(0).at(step)
        x, _, cond = made.sampled(batch, rng, graph=False)
        (count,) = set(cond.steps.tolist())
        drawn.add(int(count))
        own = sample(
            made.denoiser("student"),
            made.z(batch, rng, "own-z"),
            made.grids()[int(count)],
            batch.cond,
            noise="fresh",
            fresh=partial(lambda rng, place: made.z(batch, rng, f"own-e-{place}"), rng),
        )
        assert torch.allclose(x, own, atol=1e-6) and not x.requires_grad
        with made.players["student"].turn():
            shown, at, _ = made.sampled(batch, rng, graph=True)
            assert shown.requires_grad and set(at.tolist()) <= set(made.grids()[int(count)][:-1])
    assert drawn == {1, 2, 4}


def test_rcm_as_published_draws_its_walks_and_tells_nothing() -> None:
    made = make("rcm", mlp_teacher(), batch_size=4, own_walk="drawn")
    assert made.denoiser("critic").adapter.numbers(made.denoiser("critic").net) == ()
    batch = batch_of(made, 0)
    assert made.sampled(batch, Rng(0), graph=False)[2].steps is None
    walks = [made.walked(batch.x, 3, batch, Rng(k), whole=True) for k in range(4)]
    assert all(bool((a >= b).all()) for walk in walks for a, b in pairwise(walk))
    assert len({float(walk[1][0]) for walk in walks}) == 4
    one = make("rcm", mlp_teacher(), own_steps=1)
    assert one.denoiser("critic").adapter.numbers(one.denoiser("critic").net) == ()


def test_what_cannot_be_told_has_two_mends() -> None:
    teacher = Oracle(RF(), "velocity", torch.zeros(1, 4), 1.0)
    with pytest.raises(
        UserError, match="^teacher: .* embeds its time; add .*, or set own_walk=drawn"
    ):
        make("rcm", teacher)
    lora = {"rank": 2, "players": ["student", "critic"]}
    with pytest.raises(
        UserError, match="^lora: .* told no number of steps; set own_walk=drawn or "
    ):
        make("rcm", dit_teacher(), lora=lora)


def test_an_adapter_student_leaves_a_fake_score_that_is_told() -> None:
    made = make("rcm", dit_teacher(), lora={"rank": 2, "players": ["student"]})
    assert made.denoiser("critic").adapter.numbers(made.denoiser("critic").net) == ("steps",)


def test_walks_that_the_sampler_does_not_take_are_refused() -> None:
    with pytest.raises(
        UserError, match="^own_steps=3: the sampler takes 1, 2, 4, 8 steps; set one"
    ):
        make("rcm", mlp_teacher(), own_steps=3)
    assert make("rcm", mlp_teacher(), own_steps=3, own_walk="drawn").counts == (1, 2, 3)


def test_the_first_image_of_any_walk_is_judged_as_that_of_one_step() -> None:
    made = make("rcm", mlp_teacher(), batch_size=4, own_steps=8)
    batch, seen = batch_of(made, 0), set()
    for step in range(40):
        rng = Rng(0).at(step)
        count = made.counts[rng.integer("own-steps", 4)]
        z = made.z(batch, rng, "own-z")
        exits = len(made.walked(z, count, batch, rng, whole=False))
        told = made.sampled(batch, rng, graph=True)[2].steps
        assert set(told.tolist()) == {count if exits > 1 else 1}
        seen.add((count, exits))
    assert {(1, 1), (2, 1), (2, 2), (4, 1)} <= seen and all(1 <= e <= n for n, e in seen)


def test_a_fake_score_that_is_told_nothing_hears_of_one_step() -> None:
    """As when a step that was not finite is asked for its cause."""
    made = make("rcm", dit_teacher(), batch_size=4)
    batch, critic = batch_of(made, 0), made.denoiser("critic")
    t = torch.full((4,), 0.5)
    one = critic(batch.x, t, replace(batch.cond, steps=torch.ones(4))).x
    assert torch.equal(critic(batch.x, t, batch.cond).x, one)


def test_a_fake_score_that_is_told_steps_heeds_them_once_trained() -> None:
    made = make("rcm", dit_teacher(), batch_size=8, alone=0, critic_steps=1, steps=8)
    batch, critic = batch_of(made, 0), made.denoiser("critic")
    assert batch.x is not None

    def apart() -> float:
        said = [
            critic(batch.x, torch.full((8,), 0.5), replace(batch.cond, steps=torch.full((8,), n))).x
            for n in (1.0, 4.0)
        ]
        return float((said[0] - said[1]).abs().max())

    assert apart() == 0
    run(made, 0, 6)
    assert apart() > 0


def test_rcm_s_first_stage_is_its_warm_up_unless_told() -> None:
    assert make("rcm", mlp_teacher(), steps=100).alone == 10
    assert make("rcm", mlp_teacher(), steps=100, alone=0, warmup=20).alone == 0
    assert make("rcm", mlp_teacher(), steps=100).in_full() == 10


def test_rcm_learns_alone_at_first_and_is_scm_then() -> None:
    """Without its pull the student's weights are sCM's, bit for bit."""
    keys = {"adaptive": False, "steps": 6, "t": {"kind": "uniform"}}
    made = make("scm", mlp_teacher(), **keys)
    other = make("rcm", mlp_teacher(), alone=4, **keys)
    assert [len(other.turns(step)) for step in (0, 3, 4)] == [1, 1, 5]
    run(made, 0, 4)
    run(other, 0, 4)
    same({"student": made.state()["student"]}, {"student": other.state()["student"]})
