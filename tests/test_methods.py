"""The contract that every method keeps, found by its file under trainers/."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.diffusion.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.oracles import Oracle
from stepdistill.diffusion.process import RF
from stepdistill.diffusion.sampler import sample
from stepdistill.run.errors import UserError
from stepdistill.run.player import OptimConfig, Player
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Trainer, Turn
from stepdistill.trainers.find import methods, trainer
from tests.helpers import (
    MEAN,
    STD,
    VARIANTS,
    Affine,
    AffineAdapter,
    batch_of,
    dit_teacher,
    make,
    mlp_teacher,
    run,
    saved,
    small_mlp,
)

METHODS = [method.name for method in methods()]
CASES = [
    pytest.param(name, keys, id=f"{name}-{variant}")
    for name in METHODS
    for variant, keys in VARIANTS.get(name, {"default": {}}).items()
]
every_case = pytest.mark.parametrize(("method", "keys"), CASES)


def networks(made: Trainer) -> dict[str, nn.Module]:
    """Every network that a trainer holds, by name."""
    found = {"teacher": made.teacher.net}
    for name, player in made.players.items():
        found[name] = player.denoiser.net
        if player.ema is not None:
            found[f"{name} ema"] = player.ema.net
    for name, value in vars(made).items():
        if isinstance(value, Denoiser) and name != "teacher":
            found[name] = value.net
    return found


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> None:
    """Equal to the bit, names and all."""
    assert a.keys() == b.keys()
    for player in a:
        assert a[player].keys() == b[player].keys()
        for name, value in a[player].items():
            assert torch.equal(value, b[player][name]), f"{player} {name}"


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
            grads = [param.grad for param in net.parameters()]
            if name == turn.player:
                assert all(grad is not None for grad in grads)
                assert sum(float(grad.abs().sum()) for grad in grads) > 0
            else:
                assert all(grad is None for grad in grads), f"{turn.player} reached {name}"
        player.optimizer.zero_grad(set_to_none=True)


def check_closed(made: Trainer) -> None:
    """Outside turns nothing asks for gradients, and nothing hangs in a graph."""
    for name, net in networks(made).items():
        for param in net.parameters():
            assert not param.requires_grad, name
            assert param.is_leaf
            assert param.grad is None


@every_case
@pytest.mark.parametrize("step", [2, 5])
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
    teacher = mlp_teacher()
    before = copy.deepcopy(teacher.net.state_dict())
    made = make(method, teacher, **keys)
    student = saved(made)[0]["student"]
    run(made, 0, 4)
    assert all(torch.equal(v, before[k]) for k, v in teacher.net.state_dict().items())
    assert not torch.equal(
        saved(made)[0]["student"]["net.leave.weight"], student["net.leave.weight"]
    )


@pytest.mark.parametrize("method", METHODS)
def test_images_and_a_real_backbone(method) -> None:
    """The same on 8x8 images with diffusers' DiT, whose own label dropout stays off."""
    teacher = dit_teacher()
    before = copy.deepcopy(teacher.net.state_dict())
    keys = next(iter(VARIANTS.get(method, {"": {}}).values()))
    made = make(method, teacher, batch_size=4, **keys)
    made.teacher.train()
    run(made, 0, 2)
    check_gradients(made, 2)
    check_closed(made)
    assert not any(m.training for net in networks(made).values() for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.net.state_dict().items())
    steps = min(made.grids())
    z = made.z(made.batch(0), Rng(0))
    images = [made.draw(z, made.batch(0).cond, steps, Rng(0), torch.arange(4)) for _ in range(2)]
    assert images[0].shape == (4, 1, 8, 8)
    assert torch.equal(*images)


@every_case
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_gradient_changes_no_weight_and_no_optimizer(method, keys, poison) -> None:
    made = make(method, mlp_teacher(), **keys)
    run(made, 0, 2)
    before, turns = saved(made)[0], made.turns

    def poisoned(step: int) -> list[Turn]:
        def spoil(turn: Turn) -> Turn:
            def loss(*args: Any) -> Loss:
                return Loss(turn.loss(*args).value * poison)

            return Turn(turn.player, loss)

        return [spoil(turn) for turn in turns(step)]

    made.turns = poisoned
    made.step(2, batch_of(made, 2))
    after = saved(made)[0]
    for name, player in made.players.items():
        assert not bool(player.finite)
        for key, value in after[name].items():
            assert key.startswith("ema.") or torch.equal(value, before[name][key]), key
    assert all(value.isfinite().all() for part in after.values() for value in part.values())
    made.turns = turns
    made.step(2, batch_of(made, 2))
    moved, after = saved(made)
    assert all(bool(player.finite) for player in made.players.values())
    assert not torch.equal(
        moved["student"]["net.leave.weight"], before["student"]["net.leave.weight"]
    )
    assert all(after[name] > updates[name] for name in after)


# Resuming, processes -------------------------------------------------------------------------


@every_case
def test_resumed_at_any_step_a_run_ends_the_same(method, keys) -> None:
    """Phased methods too, at and around the border of a phase (step 3)."""
    whole = make(method, mlp_teacher(), **keys)
    checkpoints = []
    for step in range(6):
        run(whole, step, step + 1)
        checkpoints.append(saved(whole))
    z, index = torch.ones(8, 4), torch.arange(8)
    cond = whole.batch(0).cond
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


def turn_gradients(made: Trainer, step: int) -> list[list[Tensor]]:
    """The gradients of every turn of a step, without updates."""
    found, batch = [], batch_of(made, step)
    for place, turn in enumerate(made.turns(step)):
        player = made.players[turn.player]
        with player.turn():
            turn.loss(batch, Rng(0).at(step, place)).value.backward()
        found.append([param.grad.clone() for param in player.params])
        player.optimizer.zero_grad(set_to_none=True)
    return found


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


# Cost ----------------------------------------------------------------------------------------


class Passes:
    """Counts the forward passes of a trainer's networks by role, kind and batch."""

    def __init__(self, made: Trainer) -> None:
        self.made, self.size = made, made.config.batch_size
        self.seen: set[int] = set()
        self.counts: Counter[tuple[str, str, int]] = Counter()

    def watch(self) -> None:
        """Hook networks that are new."""
        for name, net in networks(self.made).items():
            if id(net) not in self.seen:
                self.seen.add(id(net))
                role = name if name in ("teacher", "critic") else "student"
                role = "average" if name.endswith(" ema") else role
                net.register_forward_hook(self.hook(role))

    def hook(self, role: str) -> Any:
        def note(net: nn.Module, args: tuple[Any, ...], _: Any) -> None:
            x = args[0]
            if torch.is_grad_enabled() and any(p.requires_grad for p in net.parameters()):
                kind = "train"
            elif torch.is_grad_enabled() and x.requires_grad:
                kind = "input"
            else:
                kind = "forward"
            self.counts[role, kind, len(x) // self.size] += 1

        return note


def declared(made: Trainer) -> dict[tuple[str, str, int], float]:
    total: Counter[tuple[str, str, int]] = Counter()
    for item in made.passes():
        total[item.role, item.kind, item.batch] += item.count
    return {key: count for key, count in total.items() if count}


@every_case
def test_declared_passes_are_those_counted(method, keys) -> None:
    """Over a hundred steps, so that random exits average out; phase by phase."""
    half = 100
    made = make(method, mlp_teacher(), steps=2 * half, batch_size=2, **keys)
    counter = Passes(made)
    for first in (0, half):
        made.prepare(first)
        counter.watch()
        counter.counts.clear()
        run(made, first, first + half)
        counted = {key: count / half for key, count in counter.counts.items()}
        expected = declared(made)
        assert counted == pytest.approx(expected, abs=0.25)
        whole = {key: n for key, n in expected.items() if n == int(n) and key[1] != "forward"}
        assert {key: counted[key] for key in whole} == whole  # to the pass where none is random


# Equivalences and fixed points ---------------------------------------------------------------


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


@pytest.mark.parametrize("method", ["dmd", "sim", "phased_dmd"])
def test_where_fake_and_teacher_agree_nothing_moves(method) -> None:
    """The fake score starts as the teacher: the first student gradient is zero.

    Exactly so for a direction; to rounding where it is differentiated through both.
    """
    made = make(method, mlp_teacher())
    first = sum(float(grad.abs().sum()) for grad in turn_gradients(made, 0)[0])
    run(made, 0, 2)
    later = sum(float(grad.abs().sum()) for grad in turn_gradients(made, 2)[0])
    assert first <= (1e-4 * later if method == "sim" else 0.0)


TIED = {  # law of the one-step student mu + u z, as (mean, std) of clean images; where it rests
    "dmd": (lambda mu, u: (mu, abs(u)), (MEAN, STD)),
    "sim": (lambda mu, u: (mu, abs(u)), (MEAN, STD)),
    # phase 1 ends at t = 1/2 with x_s = (mu + u z + z) / 2, as clean N(mu, (1 + u)^2 - 1) would
    "phased_dmd": (
        lambda mu, u: (mu, math.sqrt(max(1e-6, (1 + u) ** 2 - 1))),
        (MEAN, math.sqrt(1 + STD**2) - 1),
    ),
}


@pytest.mark.parametrize("method", TIED)
def test_with_an_exact_fake_score_the_trainer_reaches_the_target(method) -> None:
    """From (0, .5), by the trainer's own student turn on 64 coordinates."""
    law, target = TIED[method]
    steps, dim = 300, 64
    more = {"levels": (1.0, 0.5, 0.0), "phase_steps": 1} if method == "phased_dmd" else {}
    teacher = Oracle(RF(), "velocity", torch.full((1, dim), MEAN), STD)
    optim = {"lr": 0.03, "betas": (0.5, 0.99), "decay": "cosine"}
    made = make(method, teacher, steps=2 * steps, batch_size=32, optim=optim, **more)
    student = Denoiser(Affine(0.0, 0.5, dim), RF(), "x0", adapter=AffineAdapter())
    player = Player("student", student, made.config.optim, total=steps)
    made.players["student"] = player
    fake = made.players["critic"].denoiser.net
    for step in range(steps):
        mean, std = law(float(student.net.mu), float(student.net.u))
        fake.means.fill_(mean)
        fake.stds.fill_(std)
        with player.turn():
            turn = made.turns(step)[0]
            turn.loss(made.batch(step), Rng(0).at(step)).value.backward()
            player.step()
    assert float(student.net.mu) == pytest.approx(target[0], abs=0.02)
    assert float(student.net.u) == pytest.approx(target[1], abs=0.02)


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


# Player --------------------------------------------------------------------------------------


def player_and_twin(**keys: Any) -> tuple[Player, nn.Module]:
    den = Denoiser(small_mlp(num_classes=0), RF(), "velocity")
    twin = copy.deepcopy(den.net)
    return Player("student", den, OptimConfig(**keys), total=10, ema_decay=0.9), twin


def losses(net: nn.Module) -> Iterator[Tensor]:
    """Five losses with gradients of very different norms."""
    for step, scale in enumerate((0.01, 100.0, 1.0, 0.1, 10.0)):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        yield scale * net(x, torch.full((8,), 500.0)).square().mean()


@pytest.mark.parametrize("clip", [None, 0.5])
def test_player_is_adamw_with_clipping_and_an_average(clip) -> None:
    keys = {"lr": 1e-2, "betas": (0.8, 0.99), "weight_decay": 0.1}
    player, twin = player_and_twin(clip=clip, **keys)
    optimizer = torch.optim.AdamW(twin.parameters(), **keys)
    average = [p.detach().clone() for p in twin.parameters()]
    theirs = losses(twin)
    for update, loss in enumerate(_in_turn(player), start=1):
        optimizer.zero_grad()
        next(theirs).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters()])
        for param in twin.parameters():
            param.grad.div_(max(1.0, float(norm) / clip) if clip else 1.0)
        optimizer.step()
        decay = min(0.9, (1 + update) / (10 + update))
        for i, param in enumerate(twin.parameters()):
            average[i].lerp_(param.detach(), 1 - decay)
            torch.testing.assert_close(player.params[i].detach(), param.detach())
        torch.testing.assert_close(player.norm, norm)
        assert loss.isfinite()
    for value, param in zip(average, player.ema.net.parameters(), strict=True):
        torch.testing.assert_close(param, value)


def _in_turn(player: Player) -> Iterator[Tensor]:
    """Make the player's updates on the same losses, one at a time."""
    for step in range(5):
        with player.turn():
            parts = losses(player.denoiser.net)
            loss = [next(parts) for _ in range(step + 1)][-1]
            loss.backward()
            player.step()
        yield loss.detach()


def test_learning_rate_schedule() -> None:
    rate = OptimConfig(lr=1.0, warmup_steps=3, decay="cosine", final_lr=0.1).lr_at
    assert [rate(step, 11) for step in range(3)] == [0.25, 0.5, 0.75]
    assert rate(3, 11) == 1.0
    assert rate(7, 11) == pytest.approx(0.55)
    assert rate(11, 11) == rate(50, 11) == pytest.approx(0.1)
    linear = OptimConfig(lr=1.0, decay="linear").lr_at
    assert linear(5, 10) == 0.5
    assert OptimConfig(lr=1.0).lr_at(9, 10) == 1.0


def test_networks_share_nothing_with_their_source() -> None:
    teacher = mlp_teacher()
    copied = teacher.clone()
    assert copied.process is teacher.process
    assert not {p.data_ptr() for p in copied.net.parameters()} & {
        p.data_ptr() for p in teacher.net.parameters()
    }
    x, t = torch.ones(2, 4), torch.full((2,), 0.5)
    cond = Cond(torch.tensor([0, 3]))
    assert torch.equal(copied(x, t, cond).x, teacher(x, t, cond).x)
