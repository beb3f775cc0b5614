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


@pytest.mark.parametrize("teacher", [dit_teacher, unet_teacher])
def test_calls_drop_by_the_seed_alone(teacher) -> None:
    den = teacher()
    batch = batch_of(make("consistency", den, batch_size=4), 0)
    t, x_t = torch.full((4,), 0.5), torch.randn(4, *den.sample_shape)

    def said(drop: Drop | None) -> Tensor:
        den.dropout = drop
        with torch.no_grad():
            out: Tensor = den(x_t, t, batch.cond).h
        den.dropout = None
        return out

    torch.manual_seed(3)
    state, whole = torch.random.get_rng_state(), said(None)
    one, again, other = said(Drop(0.3, 1)), said(Drop(0.3, 1)), said(Drop(0.3, 2))
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, whole)
    assert torch.equal(said(None), whole) and not den.net.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(layer.training for layer in droppers(den.net))


@pytest.mark.parametrize(("method", "keys"), METHODS)
def test_student_and_target_drop_alike_and_the_teacher_not_at_all(method, keys) -> None:
    made = make(method, dit_teacher(), dropout=0.4, batch_size=4, **keys)
    student = made.denoiser("student")
    held = [student, getattr(made, "target_net", None)]
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str, layer: torch.nn.Module) -> None:
        def hook(_: object, args: tuple[Tensor], out: Tensor) -> None:
            seen.append((name, (out == 0) & (args[0] != 0)))

        layer.register_forward_hook(hook)

    for name, den in zip(("student", "target"), held, strict=True):
        if den is not None:
            watch(name, droppers(den.net)[0])
    watch("teacher", droppers(made.teacher.net)[0])
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
    with pytest.raises(UserError, match="^dropout: what is computed a second time would not drop"):
        make("consistency", dit_teacher(), dropout=0.1, gradient_checkpointing=True)


def test_nothing_is_left_on_after_an_error() -> None:
    net = dit_teacher().net
    with pytest.raises(RuntimeError), dropped(net, Drop(0.5, 0)):
        assert all(layer.training and layer.p == 0.5 for layer in droppers(net))
        raise RuntimeError
    assert not any(layer.training or layer.p for layer in droppers(net))
