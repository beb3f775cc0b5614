"""Dropout: the same in all that is compared, anew each step, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepdistill.adapters.dropout import Drop, dropped, droppers
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from tests.helpers import batch_of, dit_teacher, make, mlp_teacher, run, same, saved, unet_teacher

METHODS = (("consistency", {}), ("consistency", {"target": "ema"}), ("scm", {}), ("pcm", {}))


def drop(share: float, seed: int, index: Tensor) -> Drop:
    return Drop(share, lambda layer, count: Rng(seed).bits(layer, index, count))


@pytest.mark.parametrize("teacher", [dit_teacher, unet_teacher])
def test_what_a_sample_drops_is_its_own_in_every_call_and_batch(teacher) -> None:
    den, index = teacher(), torch.arange(4)
    batch = batch_of(make("consistency", den, batch_size=4), 0)
    t, x_t = torch.full((4,), 0.5), torch.randn(4, *den.sample_shape)

    def said(dropout: Drop | None, rows: slice = slice(None)) -> Tensor:
        den.dropout = dropout
        with torch.no_grad():
            out: Tensor = den(x_t[rows], t[rows], batch.cond.rows(rows)).h
        den.dropout = None
        return out

    torch.manual_seed(3)
    state, whole = torch.random.get_rng_state(), said(None)
    one, again, other = (said(drop(0.3, seed, index)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, whole)
    half = slice(2, 4)
    assert torch.allclose(said(drop(0.3, 1, index[half]), half), one[half], atol=1e-5)
    assert torch.equal(said(None), whole) and not den.net.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_mask_keeps_its_share_and_the_mean() -> None:
    like = torch.empty(64, 33, 7, dtype=torch.bfloat16)
    mask = drop(0.3, 0, torch.arange(64)).mask("layer", like)
    assert mask.shape == like.shape and mask.dtype == like.dtype
    assert float((mask == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert set(mask.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.7).bfloat16())}
    rows = (mask == 0).flatten(1).unique(dim=0)
    assert len(rows) == 64  # no two samples' alike
    assert bool(((mask == 0).float().mean(dim=0) > 0).all())


@pytest.mark.parametrize(("method", "keys"), METHODS)
def test_student_and_target_drop_alike_and_the_teacher_not_at_all(method, keys) -> None:
    made = make(method, dit_teacher(), dropout=0.4, batch_size=4, **keys)
    student = made.denoiser("student")
    held = [student, getattr(made, "target_net", None)]
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str, net: torch.nn.Module) -> None:
        def hook(_: object, args: tuple[Tensor]) -> None:
            seen.append((name, args[0] == 0))

        behind = net.get_submodule("transformer_blocks.0.ff.net.2")
        behind.register_forward_pre_hook(hook)

    for name, den in zip(("student", "target"), held, strict=True):
        if den is not None:
            watch(name, den.net)
    watch("teacher", made.teacher.net)
    loss = made.turns(0)[0].loss
    for step in range(2):
        loss(batch_of(made, step), Rng(0).at(step))
    masks = [mask for name, mask in seen if name != "teacher"]
    half = len(masks) // 2
    assert half >= 2 and 0.2 < float(masks[0].float().mean()) < 0.6
    assert all(torch.equal(mask, masks[0]) for mask in masks[:half])
    assert not torch.equal(masks[0], masks[half])
    assert not any(bool(mask.any()) for name, mask in seen if name == "teacher")


def test_a_run_that_drops_goes_on_from_a_checkpoint_to_the_bit() -> None:
    whole, first, second = (
        make("consistency", dit_teacher(), batch_size=4, dropout=0.3) for _ in range(3)
    )
    run(whole, 0, 4)
    run(first, 0, 2)
    second.load_state(2, *saved(first))
    run(second, 2, 4)
    same(saved(whole)[0], saved(second)[0])
    plain = make("consistency", dit_teacher(), batch_size=4)
    run(plain, 0, 4)
    pairs = zip(whole.players["student"].params, plain.players["student"].params, strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)


def test_what_cannot_drop_is_refused() -> None:
    with pytest.raises(
        UserError, match="^dropout: VectorMLP has no layers that drop; set dropout=null"
    ):
        make("scm", mlp_teacher(), dropout=0.1)
    for key in ("gradient_checkpointing", "compile"):
        with pytest.raises(
            UserError, match=f"^dropout: networks do not drop with {key}; set {key}"
        ):
            make("consistency", dit_teacher(), dropout=0.1, **{key: True})


def test_nothing_is_left_on_after_an_error() -> None:
    net = dit_teacher().net
    with pytest.raises(RuntimeError), dropped(net, drop(0.5, 0, torch.arange(2))):
        assert all(layer._forward_hooks for layer in droppers(net).values())
        raise RuntimeError
    assert not any(layer._forward_hooks for layer in droppers(net).values())


def test_two_processes_drop_what_one_does() -> None:
    """Each takes a half of the batch, by the samples' own numbers."""
    keys = {"dropout": 0.3, "batch_size": 8}
    one = make("consistency", dit_teacher(), **keys)
    halves = [make("consistency", dit_teacher(), rank=k, world=2, **keys) for k in (0, 1)]
    losses = []
    for made in (one, *halves):
        with torch.no_grad():
            losses.append(float(made.turns(0)[0].loss(batch_of(made, 0), Rng(0).at(0)).value))
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-5)


def test_tcm_s_first_network_drops_too_where_it_is_the_target() -> None:
    made = make("tcm", dit_teacher(), dropout=0.3, batch_size=4, steps=4)
    assert len(made.compared()) == 2
    made.prepare(3)
    assert made.compared()[-1] is made.finished[0]
    made.step(3, batch_of(made, 3))
    assert all(net is None or net.dropout is None for net in made.compared())
