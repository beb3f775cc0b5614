"""The contract that every method keeps, found by its file under trainers/."""

from __future__ import annotations

import copy
import math
from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run.errors import UserError
from stepdistill.run.player import Player
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Trainer, Turn
from stepdistill.trainers.beginning import role_of
from stepdistill.trainers.find import methods, trainer
from tests.golden import KEPT
from tests.helpers import (
    SMALL_NETWORK,
    VARIANTS,
    batch_of,
    cases,
    dit_teacher,
    make,
    mlp_teacher,
    run,
    same,
    saved,
    turn_gradients,
)

METHODS = [method.name for method in methods()]
CASES = [
    pytest.param(name, keys, id=f"{name}-{variant}")
    for name in METHODS
    for variant, keys in cases(name).items()
]
every_case = pytest.mark.parametrize(("method", "keys"), CASES)
FIRST = [pytest.param(name, next(iter(cases(name).values())), id=name) for name in METHODS]


def networks(made: Trainer) -> dict[str, nn.Module]:
    """Every network that a trainer holds, by name; what trains from scratch has no teacher."""
    found = {} if from_scratch(made) else {"teacher": made.teacher.net}
    for name, player in made.players.items():
        if player.frozen:  # heads on a network that others hold
            continue
        found[name] = player.denoiser.net
        if player.ema is not None:
            found[f"{name} ema"] = player.ema.net
    for name, value in vars(made).items():
        if isinstance(value, Denoiser) and value is not made.teacher:
            found[name] = value.net
    return found


def from_scratch(made: Trainer) -> bool:
    """Whether the network handed over is itself trained, as ``denoising`` does."""
    players = [player for player in made.players.values() if not player.frozen]
    return any(player.denoiser is made.teacher for player in players)


# The files -----------------------------------------------------------------------------------


def test_methods_are_found_by_their_files(root) -> None:
    named = {
        path.stem
        for path in (root / "trainers").glob("*/*.py")
        if "\nTRAINER = " in path.read_text("utf-8")
    }
    assert set(METHODS) == named >= {"consistency", "dmd", "phased_dmd", "reflow", "sim"}
    assert len(METHODS) == len(named)
    assert set(VARIANTS) <= named


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is(name) -> None:
    cls = trainer(name)
    assert issubclass(cls, Trainer)
    assert cls.needs in ("labels", "data", "pairs")
    assert next(m for m in methods() if m.name == name).summary.endswith(".")
    for key, field in cls.Config.model_fields.items():
        assert field.description, f"{name}.{key} has no description"


def test_a_misspelt_method_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean phased_dmd"):
        trainer("phased_dm")


# One step ------------------------------------------------------------------------------------


def check_gradients(made: Trainer, step: int) -> None:
    """Every turn of a step fills its own player's gradients and nobody else's."""
    batch = batch_of(made, step)
    for place, turn in enumerate(made.turns(step)):
        player = made.players[turn.player]
        with player.turn():
            turn.loss(batch, Rng(0).at(step, place)).value.backward()
        for name, net in networks(made).items():
            own = {id(param) for param in player.params}
            foreign = [param.grad for param in net.parameters() if id(param) not in own]
            assert all(grad is None for grad in foreign), f"{turn.player} reached {name}"
        grads = [param.grad for param in player.weights or player.params]
        assert all(grad is not None for grad in grads)
        begins = player.updates == 0  # where its fake score is the teacher still
        assert begins or sum(float(grad.abs().sum()) for grad in grads) > 0
        player.optimizer.zero_grad(set_to_none=True)


def check_closed(made: Trainer) -> None:
    """Outside turns nothing asks for gradients, and nothing hangs in a graph."""
    for name, net in networks(made).items():
        for param in net.parameters():
            assert not param.requires_grad, name
            assert param.is_leaf
            assert param.grad is None


@every_case
@pytest.mark.parametrize("step", [1, 5])
def test_gradient_reaches_only_the_player_of_the_turn(method, keys, step) -> None:
    made = make(method, mlp_teacher(), **keys)
    check_closed(made)
    run(made, 0, step)
    made.prepare(step)
    check_closed(made)
    check_gradients(made, step)
    check_closed(made)


@every_case
def test_teacher_is_bit_identical_afterwards(method, keys) -> None:
    made = make(method, mlp_teacher(), **keys)
    before = copy.deepcopy(made.teacher.net.state_dict())
    student = saved(made)[0]["student"]
    run(made, 0, 4)
    frozen = all(torch.equal(v, before[k]) for k, v in made.teacher.net.state_dict().items())
    assert frozen or from_scratch(made)
    moved = saved(made)[0]["student"]
    assert not all(torch.equal(moved[k], student[k]) for k in student if k.startswith("net."))


@pytest.mark.parametrize(("method", "keys"), FIRST)
def test_images_and_a_real_backbone(method, keys) -> None:
    """The same on 8x8 images with diffusers' DiT, whose own label dropout stays off."""
    made = make(method, dit_teacher(), batch_size=4, **keys)
    before = copy.deepcopy(made.teacher.net.state_dict())
    made.teacher.train()
    run(made, 0, 2)
    check_gradients(made, 2)
    check_closed(made)
    assert not any(m.training for net in networks(made).values() for m in net.modules())
    frozen = all(torch.equal(v, before[k]) for k, v in made.teacher.net.state_dict().items())
    assert frozen or from_scratch(made)
    steps = min(made.grids())
    z = made.z(made.batch(0), Rng(0))
    cond = batch_of(made, 0).cond
    images = [made.draw(z, cond, steps, Rng(0), torch.arange(4)) for _ in range(2)]
    assert images[0].shape == (4, 1, 8, 8)
    assert torch.equal(*images)


@every_case
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_gradient_changes_no_weight_and_no_optimizer(method, keys, poison) -> None:
    made = make(method, mlp_teacher(), **keys)
    run(made, 0, 3)  # what is recorded at every step may not stay as it was
    made.prepare(3)
    fresh = any(not made.players[turn.player].updates for turn in made.turns(3))
    at = 4 if fresh else 3  # an optimizer that has not begun holds nothing to compare
    run(made, 3, at)
    turns = made.turns

    def poisoned(step: int) -> list[Turn]:
        def spoil(turn: Turn) -> Turn:
            def loss(*args: Any) -> Loss:
                return Loss(turn.loss(*args).value * poison)

            return Turn(turn.player, loss)

        return [spoil(turn) for turn in turns(step)]

    made.turns = poisoned
    made.prepare(at)
    before = saved(made)[0]
    made.step(at, batch_of(made, at))
    after, mover = saved(made)[0], {turn.player for turn in turns(at)}
    for name, player in made.players.items():
        assert not bool(player.finite)
        for key, value in after[name].items():
            assert key.startswith("ema.") or torch.equal(value, before[name][key]), key
    assert all(value.isfinite().all() for part in after.values() for value in part.values())
    made.turns = turns
    made.step(at, batch_of(made, at))
    moved = saved(made)[0]
    for name in mover:
        assert bool(made.players[name].finite)
        weights = [key for key in before[name] if key.startswith(("net.", "extra."))]
        assert not all(torch.equal(moved[name][key], before[name][key]) for key in weights)


@pytest.mark.parametrize(
    ("teacher", "method", "keys"),
    [pytest.param(mlp_teacher, *case.values, id=f"mlp-{case.id}") for case in CASES]
    + [pytest.param(dit_teacher, *case.values, id=f"dit-{case.id}") for case in FIRST],
)
def test_in_bf16_losses_are_finite_and_near_those_of_fp32(teacher, method, keys) -> None:
    """Near: by half of themselves and 0.05, which is wide for what cancels and tight for a loss
    that bf16's three digits have spoilt. Weights, averages and optimizers stay fp32."""
    rounded = partial(torch.autocast, "cpu", torch.bfloat16)
    both = [make(method, teacher(), autocast=way, **keys) for way in (nullcontext, rounded)]
    differ = False
    for step in range(4):
        for made in both:
            made.prepare(step)
        exact, found = (made.step(step, batch_of(made, step)) for made in both)
        assert exact.keys() == found.keys()
        for name, value in found.items():
            assert value.isfinite(), name
            if KEPT.fullmatch(name):  # a ratio of parts near 0 may be anything
                assert abs(value - exact[name]) <= 0.5 * abs(exact[name]) + 0.05, name
            differ |= float(value) != float(exact[name])
    assert differ
    for part in both[1].state().values():
        for name, value in part.items():
            assert value.dtype == torch.float32 and value.isfinite().all(), name


# Resuming, processes -------------------------------------------------------------------------


@every_case
def test_resumed_at_any_step_a_run_ends_the_same(method, keys) -> None:
    """Phased methods too, at and around the border of a phase (step 3)."""
    whole = make(method, mlp_teacher(), **keys)
    checkpoints = []
    for step in range(6):
        run(whole, step, step + 1)
        checkpoints.append(saved(whole))
    z, index = torch.ones(8, *whole.teacher.sample_shape), torch.arange(8)
    cond = batch_of(whole, 0).cond
    for step in range(1, 6):
        tensors, updates = checkpoints[step - 1]
        resumed = make(method, mlp_teacher(), **keys)
        resumed.load_state(step, tensors, updates)
        same(saved(resumed)[0], tensors)
        assert saved(resumed)[1] == updates
        run(resumed, step, 6)
        same(saved(resumed)[0], checkpoints[-1][0])
        assert saved(resumed)[1] == checkpoints[-1][1]
        for steps in whole.grids():
            drawn = [m.draw(z, cond, steps, Rng(1), index) for m in (whole, resumed)]
            assert torch.equal(*drawn)


@every_case
@pytest.mark.parametrize("step", [2, 5])
def test_two_processes_are_one(method, keys, step) -> None:
    """The mean of two halves' gradients is the whole batch's, as is every sample's noise."""
    whole = make(method, mlp_teacher(), **keys)
    run(whole, 0, step)
    state = saved(whole)
    halves = [make(method, mlp_teacher(), rank=rank, world=2, **keys) for rank in (0, 1)]
    for made in (whole, *halves):
        made.load_state(step, *state) if made is not whole else None
        made.prepare(step)
    batches = [batch_of(made, step) for made in (whole, *halves)]
    noise = [whole.z(batch, Rng(0).at(step)) for batch in batches]
    assert torch.equal(torch.cat(noise[1:]), noise[0])
    for name in ("index", "x", "z"):
        parts = [getattr(batch, name) for batch in batches]
        assert parts[0] is None or torch.equal(torch.cat(parts[1:]), parts[0])
    labels = [batch.cond.label for batch in batches]
    assert torch.equal(torch.cat(labels[1:]), labels[0])
    one, *two = (turn_gradients(made, step) for made in (whole, *halves))
    for whole_turn, *half_turns in zip(one, *two, strict=True):
        for expected, left, right in zip(whole_turn, *half_turns, strict=True):
            torch.testing.assert_close((left + right) / 2, expected, rtol=1e-4, atol=1e-6)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 3"):
        make("dmd", mlp_teacher(), world=3)


@pytest.mark.parametrize(
    ("method", "keys"),
    [("dmd", {"guidance": 2.0}), ("consistency", {"guidance_range": (1.0, 2.0)})],
)
def test_guidance_needs_a_label_for_none(method, keys) -> None:
    teacher = mlp_teacher()
    teacher.null_label = None
    with pytest.raises(UserError, match="no label that means 'no class'"):
        make(method, teacher, **keys)
    make(method, teacher)


# Cost ----------------------------------------------------------------------------------------


Cost = dict[tuple[str, str, float], float]


def costs(made: Trainer, first: int, last: int) -> tuple[Cost, Cost]:
    """Forward passes a step of a trainer's networks, by role, kind and batch: as counted, and as
    declared at each step."""
    counts: Counter[tuple[str, str, float]] = Counter()
    told: Counter[tuple[str, str, float]] = Counter()

    def hook(role: str) -> Any:
        def note(net: nn.Module, args: tuple[Any, ...], _: Any) -> None:
            x = args[0]
            if torch.is_grad_enabled() and any(p.requires_grad for p in net.parameters()):
                kind = "train"
            elif torch.is_grad_enabled() and x.requires_grad:
                kind = "input"
            else:
                kind = "forward"
            counts[role, kind, len(x) / made.config.batch_size] += 1

        return note

    for step in range(first, last):
        made.prepare(step)  # which may make networks, as copies with the hooks of the original
        hooks = []
        for name, net in networks(made).items():
            role = "teacher" if name == "teacher" else "student"
            role = role_of(name) if name in made.players else role
            role = "average" if name.endswith(" ema") else role
            hooks.append(net.register_forward_hook(hook(role), always_call=True))
        run(made, step, step + 1)
        told.update(declared(made))
        for handle in hooks:
            handle.remove()
    means = [{k: n / (last - first) for k, n in total.items()} for total in (counts, told)]
    return means[0], means[1]


def declared(made: Trainer) -> Cost:
    total: Counter[tuple[str, str, float]] = Counter()
    for item in made.passes():
        total[item.role, item.kind, item.batch] += item.count
    return {key: count for key, count in total.items() if count}


@every_case
def test_declared_passes_are_those_counted(method, keys) -> None:
    """Over forty steps, so that random exits average out; in the first and the last phase."""
    made = make(method, mlp_teacher(), steps=160, batch_size=4, **keys)
    for first in (0, 120):
        found, expected = costs(made, first, first + 40)
        assert found == pytest.approx(expected, abs=0.35)
        for key, count in expected.items():  # no walk of random length among the trained passes
            assert key[1] == "forward" or found[key] == count


def modules_held(made: Trainer) -> int:
    """Networks reached from a trainer's attributes, whatever they are called."""
    found, queue = {}, [made]
    while queue:
        item = queue.pop()
        if isinstance(item, Denoiser):
            found[id(item.net)] = item.net
        elif isinstance(item, (Trainer, Player)):
            queue += vars(item).values()
        elif isinstance(item, dict):
            queue += item.values()
        elif isinstance(item, (list, tuple)):
            queue += item
    return sum(any(True for _ in net.parameters()) for net in found.values())


@every_case
def test_networks_held_are_those_declared(method, keys) -> None:
    """At the beginning and, where there are phases, at the end."""
    made = make(method, mlp_teacher(), **keys)
    for step in (0, 5):
        made.prepare(step)
        assert sum(made.held().values()) == modules_held(made) == len(networks(made))


def test_networks_held_by_role() -> None:
    def held(method: str, **keys: Any) -> dict[str, int]:
        made = make(method, mlp_teacher(), **keys)
        made.prepare(5)
        return made.held()

    both = {"teacher": 1, "student": 1, "average": 1}
    assert held("reflow") == held("consistency") == both
    assert held("consistency", target="ema") == both | {"target": 1}
    assert held("sim") == held("dmd") == both | {"critic": 1}
    phases = held("phased_dmd", levels=(1.0, 0.6, 0.3, 0.0))
    assert phases == both | {"critic": 1, "expert": 2}
    assert held("denoising", network=SMALL_NETWORK) == {"student": 1, "average": 1}
