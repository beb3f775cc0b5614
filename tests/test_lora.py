"""Low-rank adapters on a shared network: teacher, student, fake score and phases of one run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.adapters import lora
from stepdistill.adapters.cond import Cond
from stepdistill.adapters.recompute import recompute
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import RF
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from tests.helpers import (
    SMALL_NETWORK,
    batch_of,
    dit_teacher,
    make,
    mlp_teacher,
    run,
    same,
    saved,
    turn_gradients,
    unet_teacher,
)

TEACHERS = {"dit": dit_teacher, "unet": unet_teacher, "mlp": mlp_teacher}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("dmd", {"student_steps": 2, "critic_steps": 2}),
    ("sim", {}),
    ("phased_dmd", {}),
    ("consistency", {"target": "ema"}),
    ("reflow", {}),
    ("progressive", {"first": 2, "steps": 6}),
]
LORA = {"rank": 4, "alpha": 8}
every_method = pytest.mark.parametrize(("method", "keys"), METHODS, ids=[m for m, _ in METHODS])
every_teacher = pytest.mark.parametrize("teacher", TEACHERS.values(), ids=TEACHERS)


def adapted(method: str, teacher: Denoiser, **keys: Any) -> Trainer:
    return make(method, teacher, **{"batch_size": 4, "lora": LORA, **keys})


def asked(den: Denoiser) -> Tensor:
    """What a denoiser says of three fixed states."""
    shape = (3, *den.sample_shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return den.raw(x, torch.tensor([0.2, 0.5, 0.9]), Cond(torch.tensor([0, 1, 3])))


def stirred(den: Denoiser, name: str, scale: float = 0.1) -> Denoiser:
    """A branch whose adapter is far from zero."""
    branch = den.adapt(name, rank=4, alpha=8, targets=None, seed=0)
    draw = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, param in lora.parameters(den.net, name).items():
            if "lora_B" in key:
                param.copy_(scale * torch.randn(param.shape, generator=draw))
    return branch


# The shared network ---------------------------------------------------------------------------


@every_teacher
def test_an_adapter_begins_as_the_network_to_the_bit(teacher) -> None:
    den, bare = teacher(), teacher()
    flags = [param.requires_grad for param in den.net.parameters()]
    state = torch.random.get_rng_state()
    branches = [den.adapt(name, rank=4, alpha=4, targets=None, seed=3) for name in "ab"]
    assert torch.equal(state, torch.random.get_rng_state())
    for one in (den, *branches):
        assert torch.equal(asked(one), asked(bare))
    assert lora.plain_state(den.net).keys() == bare.net.state_dict().keys()
    assert [p.requires_grad for p in lora.plain_params(den.net)] == flags
    assert not any(param.requires_grad for branch in branches for param in branch.own())
    assert not any(module.training for module in den.net.modules())
    one, two = (branch.weights() for branch in branches)
    again = teacher().adapt("a", rank=4, alpha=4, targets=None, seed=3).weights()
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = teacher().adapt("a", rank=4, alpha=4, targets=None, seed=4).weights()
    assert not any(torch.equal(one[key], other[key]) for key in one if "lora_A" in key)
    assert not any(two[key].any() for key in two if "lora_B" in key)


@every_teacher
def test_branches_do_not_see_each_other(teacher) -> None:
    den, bare = teacher(), teacher()
    a, b = stirred(den, "a"), stirred(den, "bb")
    first = [asked(one) for one in (den, a, b)]
    assert torch.equal(first[0], asked(bare))
    assert not torch.equal(first[1], first[0]) and not torch.equal(first[1], first[2])
    for one, expected in ((b, first[2]), (den, first[0]), (a, first[1]), (b, first[2])):
        assert torch.equal(asked(one), expected)
    foreign = Denoiser(den.net, RF(), "velocity", adapter=den.adapter)
    asked(a)
    assert torch.equal(asked(foreign), first[0])  # nobody has to know of the adapters
    copied = copy.deepcopy(a)
    b.drop()
    assert torch.equal(asked(a), first[1]) and torch.equal(asked(den), first[0])
    assert lora.names(den.net) == ("a",) and lora.names(copied.net) == ("a", "bb")
    assert not any("bb" in name for name, _ in den.net.named_parameters())
    assert torch.equal(asked(copied), first[1])
    assert torch.equal(asked(copied.branch("bb")), first[2])
    with pytest.raises(ValueError, match="no adapter 'bb'"):
        asked(b)


@every_teacher
def test_merged_is_the_branch_and_a_plain_network(teacher, tmp_path: Path) -> None:
    den = teacher()
    branch, other = stirred(den, "a"), stirred(den, "bb")
    plain = branch.plain()
    assert type(plain) is type(den.net)
    assert plain.state_dict().keys() == teacher().net.state_dict().keys()
    assert [type(m) for m in plain.modules()] == [type(m) for m in teacher().net.modules()]
    assert vars(plain).keys() == vars(teacher().net).keys()
    plain.save_pretrained(tmp_path, safe_serialization=True)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    for net in (plain, loaded, branch.clone().net):
        again = Denoiser(net, RF(), "velocity", adapter=den.adapter)
        torch.testing.assert_close(asked(again), asked(branch), rtol=1e-5, atol=1e-5)
        assert (asked(again) - asked(other)).abs().max() > 1e-3
    assert torch.equal(asked(den.clone()), asked(den))
    assert all(param.requires_grad for param in branch.clone().net.parameters())


def test_peft_reads_the_saved_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    branch = stirred(dit_teacher(), "a")
    lora.save(branch.net, "a", tmp_path / "adapter")
    net = PeftModel.from_pretrained(dit_teacher().net, tmp_path / "adapter").eval()
    again = Denoiser(net, RF(), "velocity", adapter=branch.adapter)
    assert torch.equal(asked(again), asked(branch))


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (("to_q",), 2),
        (("attn1.to_q", "to_v"), 4),
        (("transformer_blocks.0.*",), 9),
        (("pos_embed.proj",), 1),
        (None, 12),
    ],
)
def test_targets_are_ends_of_names(targets, found) -> None:
    den = dit_teacher()
    branch = den.adapt("a", rank=2, alpha=2, targets=targets, seed=0)
    assert len(branch.own()) == 2 * found


def test_targets_that_match_nothing_are_told() -> None:
    with pytest.raises(UserError, match=r"lora.targets: q matches no linear .* to_out|to_q"):
        adapted("sim", dit_teacher(), lora={"targets": ("to_k", "q")})
    with pytest.raises(UserError, match="lora.targets: label matches no"):
        adapted("sim", mlp_teacher(), lora={"targets": ("label",)})
    with pytest.raises(UserError, match="set lora=null"):
        make("denoising", mlp_teacher(), network=SMALL_NETWORK, lora={})
    with pytest.raises(UserError, match="compile: .* set compile=false or lora=null"):
        adapted("sim", mlp_teacher(), compile=True)
    with pytest.raises(UserError, match="VectorMLP does not support it; set gradient_checkp"):
        adapted("sim", mlp_teacher(), gradient_checkpointing=True)
    teacher = mlp_teacher()
    adapted("sim", teacher)
    with pytest.raises(UserError, match="the student of another run; load it anew"):
        adapted("dmd", teacher)


# Training -------------------------------------------------------------------------------------


@every_teacher
@every_method
def test_every_method_trains_adapters_alone(method, keys, teacher) -> None:
    """The teacher answers the same bits before and after, and gradients reach only the player."""
    den, bare = teacher(), teacher()
    made = adapted(method, den, **keys)
    assert torch.equal(asked(made.denoiser("student")), asked(bare))
    run(made, 0, 5)
    made.prepare(5)
    assert torch.equal(asked(den), asked(bare))
    state = lora.plain_state(den.net)
    assert all(torch.equal(v, state[k]) for k, v in bare.net.state_dict().items())
    assert all(player.denoiser.net is den.net for player in made.players.values())
    batch = batch_of(made, 5)
    for place, turn in enumerate(made.turns(5)):
        player = made.players[turn.player]
        with player.turn():
            turn.loss(batch, Rng(0).at(5, place)).value.backward()
        reached = {id(param) for param in den.net.parameters() if param.grad is not None}
        assert reached == {id(param) for param in player.params}
        assert sum(float(param.grad.abs().sum()) for param in player.params) > 0
        player.optimizer.zero_grad(set_to_none=True)
    assert not any(param.requires_grad for param in den.net.parameters())
    for student in made.students():
        assert not torch.equal(asked(student.best), asked(bare))


@every_method
def test_resumed_runs_end_the_same(method, keys) -> None:
    """Around the border of a phase (step 3) too; a checkpoint holds adapters alone."""
    whole = adapted(method, mlp_teacher(), **keys)
    checkpoints = []
    for step in range(6):
        run(whole, step, step + 1)
        checkpoints.append(saved(whole))
    names = checkpoints[-1][0]["student"]
    assert all("lora_" in name for name in names if not name.startswith("optim"))
    for step in (1, 3, 4):
        resumed = adapted(method, mlp_teacher(), **keys)
        resumed.load_state(step, *checkpoints[step - 1])
        same(saved(resumed)[0], checkpoints[step - 1][0])
        run(resumed, step, 6)
        same(saved(resumed)[0], checkpoints[-1][0])
        assert torch.equal(*(asked(made.students()[-1].best) for made in (whole, resumed)))


@pytest.mark.parametrize("method", ["sim", "phased_dmd"])
def test_the_halves_of_a_batch_make_the_whole(method) -> None:
    whole = adapted(method, mlp_teacher(), batch_size=8)
    run(whole, 0, 4)
    made = [adapted(method, mlp_teacher(), batch_size=8, rank=r, world=2) for r in (0, 1)]
    for half in made:
        half.load_state(4, *saved(whole))
    one, left, right = (turn_gradients(each, 4) for each in (whole, *made))
    for turns in zip(one, left, right, strict=True):
        for expected, a, b in zip(*turns, strict=True):
            torch.testing.assert_close((a + b) / 2, expected, rtol=1e-4, atol=1e-6)


def test_a_new_phase_begins_at_the_teacher() -> None:
    made = adapted("phased_dmd", mlp_teacher(), levels=(1.0, 0.6, 0.3, 0.0))
    run(made, 0, 2)
    average = asked(made.students()[0].best)
    fresh = adapted("phased_dmd", mlp_teacher()).players["critic"].denoiser.weights()
    made.prepare(2)
    assert made.active == "student_2"
    first, second = made.students()
    assert torch.equal(asked(first.denoiser), average) and first.ema is None
    for den in (second.denoiser, second.best, made.denoiser("critic")):
        assert torch.equal(asked(den), asked(made.teacher))
    critic = made.denoiser("critic").weights()
    assert all(torch.equal(critic[key], fresh[key]) for key in fresh)
    assert set(lora.names(made.teacher.net)) == {
        "student",
        "critic",
        "student_2",
        "student_2_average",
    }
    made.prepare(5)
    assert made.held() == {"teacher": 1}
    assert made.adapters() == {"student": 1, "critic": 1, "average": 1, "expert": 2}


@pytest.mark.parametrize("adapter", ["student", "critic"])
def test_one_player_may_be_a_network_of_its_own(adapter) -> None:
    """A full student beside an adapter for the fake score, as in SwiftBrush, or the reverse."""
    made = adapted("phased_dmd", mlp_teacher(), lora={"players": (adapter,)})
    run(made, 0, 5)
    held = {"teacher": 1, "student": 1, "average": 1, "critic": 1, "expert": 1}
    own = {"critic"} if adapter == "critic" else {"student", "average", "expert"}
    assert made.adapters() == {role: held[role] for role in own}
    assert made.held() == {role: n for role, n in held.items() if role not in own}
    full = made.denoiser("critic" if adapter == "student" else "student")
    assert not lora.shared(full.net)
    assert full.net.state_dict().keys() == mlp_teacher().net.state_dict().keys()
    assert torch.equal(asked(made.teacher), asked(mlp_teacher()))


# Gradient checkpointing -----------------------------------------------------------------------


@pytest.mark.parametrize("teacher", [dit_teacher, unet_teacher], ids=["dit", "unet"])
@pytest.mark.parametrize(
    ("method", "keys"),
    [("sim", {}), ("sim", {"lora": None}), ("phased_dmd", {"guidance": 2.0}), ("dmd", {})],
)
def test_checkpointing_changes_no_gradient(method, keys, teacher) -> None:
    """SIM's student is differentiated after fake score and teacher had the network."""
    grads = []
    for on in (False, True):
        made = adapted(method, teacher(), **{"gradient_checkpointing": on, **keys})
        calls = counted(made.denoiser("student").net)
        for step in range(3):
            run(made, step, step + 1)
        before = len(calls)
        grads.append(turn_gradients(made, 3))
        assert len(calls) > before
        grads[-1].append([torch.tensor(float(len(calls) - before))])
    *plain, few = grads[0]
    *recomputed, many = grads[1]
    assert many[0] > few[0]  # blocks did run again
    for one, two in zip(plain, recomputed, strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)
    assert sum(float(a.abs().sum()) for a in plain[0]) > 0


def counted(net: nn.Module) -> list[int]:
    """A list that grows with every call of the network's first block."""
    calls: list[int] = []
    blocks = [
        m for m in net.modules() if type(m).__name__ in ("BasicTransformerBlock", "ResnetBlock2D")
    ]
    blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_the_check_sees_a_block_recomputed_with_another_adapter() -> None:
    """Without the switch, torch's own checkpointing takes the adapter that is on by then."""
    found = []
    for way in ("none", "own", "torch's"):
        den = dit_teacher()
        a, b = stirred(den, "a"), stirred(den, "bb")
        if way == "own":
            recompute(den.net)
        elif way == "torch's":
            den.net.enable_gradient_checkpointing()
        for param in a.own():
            param.requires_grad_(True)
        x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
        cond = Cond(torch.tensor([1]))
        out = a.raw(x, torch.tensor([0.5]), cond)
        asked(b)
        try:
            out.square().sum().backward()
        except RuntimeError:  # torch sees that other tensors are kept
            continue
        assert lora.active(den.net) == "bb"  # the recomputation left things as they were
        found.append([param.grad for param in a.own()])
    assert all(torch.equal(p, q) for p, q in zip(found[0], found[1], strict=True))
    assert len(found) == 2 or any(
        q is None or not torch.equal(p, q) for p, q in zip(found[0], found[2], strict=True)
    )


def test_features_leave_a_recomputed_network_in_the_middle() -> None:
    """Taps, their early end and the frozen tail, in blocks that are recomputed."""
    grads = []
    for on in (False, True):
        den = dit_teacher()
        a = stirred(den, "a")
        if on:
            recompute(den.net)
        x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).requires_grad_()
        t, cond, taps = torch.tensor([0.5]), Cond(torch.tensor([1])), a.adapter.taps(a.net)
        loss = sum(f.square().sum() for f in a.features(x, t, cond, taps))
        tapped = a(x, t, cond, taps=taps, tail="frozen")
        loss = loss + sum(f.sum() for f in tapped.features.values())
        asked(den)
        grads.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*grads)
