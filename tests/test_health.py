"""Steps whose gradient is not finite: skipped, counted, and after three in a row the end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.run import checkpoint
from stepdistill.run.errors import UserError
from stepdistill.run.health import Health
from stepdistill.run.player import OptimConfig, Player
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Trainer
from stepdistill.trainers.loop import Loop
from tests.helpers import batch_of, dit_teacher, make, mlp_teacher


class Alone:
    """One process."""

    rank, world = 0, 1

    def mean(self, value: Tensor) -> Tensor:
        return value

    def wait(self) -> None:
        pass


class Silent:
    """A watcher that looks at nothing and keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, step: int, total: int) -> None:
        pass

    def progress(self, step: int, losses: dict[str, float], rate: float) -> None:
        pass

    def say(self, text: str) -> None:
        self.said.append(text)

    def due(self, step: int) -> bool:
        return False

    def look(self, trainer: Trainer, step: int) -> dict[str, float]:
        return {}


def flagged(*names: str, finite: bool) -> list[Player]:
    players = []
    for name in names:
        player = Player(name, mlp_teacher(), OptimConfig(), total=1)
        player.finite = torch.tensor(finite)
        players.append(player)
    return players


def fit(run, bad: dict[str, set[int]], **keys: Any) -> Trainer:
    """Train a small ``sim``; ``bad`` names the steps whose loss of a player is NaN."""
    made = make(
        "sim",
        dit_teacher(),
        **{"run": run, "steps": 8, "batch_size": 2, "log": {"every_steps": 1}, **keys},
    )
    turns = made.turns

    def spoilt(step: int) -> list[Any]:
        def spoil(turn: Any) -> Any:
            def loss(batch: Batch, rng: Rng) -> Loss:
                good = turn.loss(batch, rng)
                return Loss(good.value * math.nan, good.logs)

            return type(turn)(turn.player, loss) if step in bad.get(turn.player, ()) else turn

        return [spoil(turn) for turn in turns(step)]

    made.turns = spoilt

    def batches(start: int) -> Iterator[Batch]:
        return (batch_of(made, step) for step in range(start, made.config.steps))

    Loop(made, batches, Alone(), Silent()).fit()
    return made


def skipped(run) -> list[int]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["skipped"] for line in lines]


def test_a_bad_step_is_skipped_and_counted(tmp_path) -> None:
    made = fit(tmp_path / "run", {"student": {2, 3, 5}, "critic": {5}})
    assert skipped(tmp_path / "run") == [0, 0, 1, 2, 2, 4, 4, 4]
    assert all(p.isfinite().all() for player in made.players.values() for p in player.params)
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints", print)
    assert checkpoint.load(newest).meta["skipped"] == {"student": 3, "critic": 1}


def test_counts_go_on_after_a_resume(tmp_path) -> None:
    run = tmp_path / "run"
    fit(run, {"student": {2}}, steps=4)
    fit(run, {"critic": {5}}, steps=8, resume="auto")
    assert skipped(run) == [0, 0, 1, 1, 1, 2, 2, 2]


def test_three_in_a_row_stop_the_run_with_what_to_try(tmp_path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        fit(run, {"critic": {3, 4, 5}}, checkpoint={"every_steps": 3})
    text = str(caught.value)
    assert text.startswith("step 5: the critic's gradient was not finite 3 updates in a row")
    for remedy in ("optim.lr", "optim.warmup_steps", "precision=fp32", "the data", "the teacher"):
        assert remedy in text
    assert "\n" not in text
    assert len(skipped(run)) == 5  # every row before the end is on the disk
    newest = checkpoint.newest(run / "checkpoints", print)
    assert newest is not None and newest.name == "step-0000003"
    assert not (run / "student").exists()


def test_a_bad_update_leaves_weights_and_optimizer_and_the_next_one_trains() -> None:
    player = Player("student", mlp_teacher(), OptimConfig(lr=0.1), total=9, ema_decay=0.5)

    def update(factor: float) -> dict[str, Tensor]:
        with player.turn():
            for param in player.params:
                param.grad = torch.ones_like(param) * factor
            player.step()
        return {name: value.clone() for name, value in player.tensors().items()}

    first = update(1.0)
    for factor in (math.nan, math.inf):
        bad = update(factor)
        for name, value in bad.items():
            assert name.startswith("ema.") or torch.equal(value, first[name]), name
            assert value.isfinite().all()
    good = update(1.0)
    assert not torch.equal(good["net.leave.weight"], first["net.leave.weight"])


def test_one_bad_update_among_several_of_a_step_is_seen() -> None:
    """With two critic turns a step, the first is bad: the step counts as one that skipped."""
    made = make("sim", mlp_teacher(), critic_steps=2)
    turns, health, seen = made.turns, Health(), []

    def spoilt(step: int) -> list[Any]:
        student, first, second = turns(step)

        def loss(batch: Batch, rng: Rng) -> Loss:
            seen.append(step)
            return Loss(first.loss(batch, rng).value * math.nan)

        return [student, type(first)("critic", loss), second]

    made.turns = spoilt
    for step in (0, 1):
        made.step(step, batch_of(made, step))
        health.note(made.players.values(), step)
    assert seen == [0, 1] and health.skipped == {"critic": 2}
    made.turns = turns
    made.step(2, batch_of(made, 2))
    health.note(made.players.values(), 2)
    assert health.skipped == {"critic": 2} and health.row == {"student": 0, "critic": 0}


def test_players_are_counted_apart_and_a_good_step_ends_the_row() -> None:
    health = Health({"student": 5})
    for step in (0, 1):
        health.note(flagged("student", "critic", finite=False), step)
    health.note(flagged("critic", finite=True), 2)
    health.note(flagged("critic", finite=False), 3)
    assert health.skipped == {"student": 7, "critic": 3}
    with pytest.raises(UserError, match="step 4: the student's gradient"):
        health.note(flagged("student", finite=False), 4)


def test_a_flag_is_read_once() -> None:
    health, players = Health(), flagged("student", finite=False)
    for step in range(5):
        health.note(players, step)
    assert health.skipped == {"student": 1}
