"""The engine of score distillation: its discriminator, its two stages, and what equals what."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.adapters.taps import record
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.guidance import guided
from stepdistill.losses.adversarial import Hinge, NonSaturating, Relativistic
from stepdistill.losses.heads import ChannelMean, Discriminator, Mlp, Pooled, Tokens
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.score.adversary import ratio
from tests.helpers import batch_of, dit_teacher, make, mlp_teacher, noise, run, same, saved
from tests.helpers import turn_gradients as gradients

HEADS = [Tokens(width=8), Pooled(width=8), Mlp(width=8), ChannelMean()]


def asked(den: Denoiser, size: int = 6) -> tuple[Tensor, Tensor, Cond]:
    """A state, times and labels of a teacher."""
    return (
        noise(1, (size, *den.sample_shape)),
        torch.linspace(0.2, 0.8, size),
        Cond(torch.arange(size) % 3),
    )


# Features -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", [mlp_teacher, dit_teacher])
def test_features_of_a_pass_that_is_left_early_are_those_of_a_whole_one(teacher) -> None:
    den = teacher()
    x_t, t, cond = asked(den)
    (name,) = den.adapter.taps(den.net)
    calls = []
    last = list(den.net.modules())[-1]
    handle = last.register_forward_hook(lambda *_: calls.append(1))
    (early,) = den.features(x_t, t, cond, (name,))
    assert not calls
    whole = den(x_t, t, cond, taps=(name,)).features[name]
    handle.remove()
    assert calls and torch.equal(early, whole)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_frozen_tail_changes_no_number_and_keeps_the_features_graph(scale) -> None:
    den = dit_teacher()
    x_t, t, cond = asked(den)
    (name,) = den.adapter.taps(den.net)
    den.net.requires_grad_(False)
    plain = guided(den, x_t, t, cond, scale).x
    leaf = x_t.clone().requires_grad_()
    pred = guided(den, leaf, t, cond, scale, taps=(name,), tail="frozen")
    assert torch.equal(pred.x.detach(), plain) and not pred.h.requires_grad
    feature = pred.features[name]
    assert feature.requires_grad and len(feature) == len(x_t)
    (through,) = torch.autograd.grad(feature.sum(), leaf)
    (whole,) = torch.autograd.grad(den(leaf, t, cond, taps=(name,)).features[name].sum(), leaf)
    torch.testing.assert_close(through, whole, rtol=1e-5, atol=1e-6)
    assert torch.is_grad_enabled()


def test_a_tap_that_fails_leaves_gradients_on() -> None:
    den = mlp_teacher()
    with pytest.raises(RuntimeError), record(den.net, ("enter",), "frozen"):
        raise RuntimeError
    assert torch.is_grad_enabled()


# Heads and losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.kind)
def test_heads_take_maps_tokens_and_vectors(head) -> None:
    net = Discriminator(head, [5, 5, 5], seed=0)
    logits = net([noise(0, (4, 5, 3, 3)), noise(1, (4, 9, 5)), noise(2, (4, 5))])
    assert logits.dim() == 2 and len(logits) == 4
    if list(net.parameters()):
        assert not logits.any()  # they begin at 0
    again = Discriminator(head, [5, 5, 5], seed=0)
    same({"a": dict(net.state_dict())}, {"a": dict(again.state_dict())})


@pytest.mark.parametrize("head", HEADS[:3], ids=lambda head: head.kind)
def test_heads_stay_fp32_under_autocast(head) -> None:
    net = Discriminator(head, [5, 5], seed=0, labels=3)
    with torch.no_grad():
        for place, param in enumerate(net.parameters()):
            param.add_(noise(place, tuple(param.shape)))
    features, label = [noise(0, (4, 5, 3, 3)), noise(1, (4, 9, 5))], torch.tensor([0, 1, 2, 0])
    with torch.autocast("cpu", torch.bfloat16):
        assert (features[1] @ features[1].mT).dtype == torch.bfloat16
        logits = net(features, label)
    assert logits.dtype == torch.float32 and logits.any()
    assert torch.equal(logits, net(features, label))


@pytest.mark.parametrize("loss", [NonSaturating(), Hinge(), Relativistic()], ids=lambda x: x.kind)
def test_losses_fall_as_each_side_wins(loss) -> None:
    fake = torch.tensor([[0.3]], requires_grad=True)
    real = torch.tensor([[0.1]], requires_grad=True)
    by_fake, by_real = torch.autograd.grad(loss.critic(real, fake).sum(), (fake, real))
    assert by_fake > 0 > by_real
    (own,) = torch.autograd.grad(loss.student(fake, real.detach()).sum(), fake)
    assert own < 0


def test_a_hinge_of_zero_logits_is_two() -> None:
    zero = torch.zeros(3, 4)
    assert torch.equal(Hinge().critic(zero, zero), torch.full((3, 4), 2.0))


def test_the_ratio_is_the_exponential_of_the_mean_logit_in_bounds() -> None:
    logits = torch.tensor([[0.0, 2.0], [99.0, 99.0]])
    assert ratio(logits).tolist() == pytest.approx([torch.e, torch.e**10], rel=1e-6)


# Trainers -----------------------------------------------------------------------------------------

WITH = {"adversary": {"student": 0.5, "critic": 0.5}}


def test_dmd2_without_its_head_is_dmd_to_the_bit() -> None:
    more = {"critic_steps": 3, "student_steps": 2, "guidance": 2.0}
    dmd2 = make("dmd2", dit_teacher(), adversary=None, **more)
    dmd = make("dmd", dit_teacher(), **more)
    assert dmd2.needs == dmd.needs == "labels"
    for made in (dmd2, dmd):
        run(made, 0, 4)
    same(saved(dmd2)[0], saved(dmd)[0])


def whole(made: Trainer) -> Trainer:
    """A trainer whose heads say something."""
    with torch.no_grad():
        for param in made.adversary.net.parameters():
            param.add_(noise(len(param), tuple(param.shape)).to(param) * 0.3)
    return made


@pytest.mark.parametrize("features", ["critic", "teacher", "state"])
def test_a_head_at_zero_gives_the_student_no_gradient(features) -> None:
    more = {"adversary": {**WITH["adversary"], "features": features}}
    plain, zero = (make("dmd2", mlp_teacher(), **keys) for keys in ({"adversary": None}, more))
    for made in (plain, zero):
        made.players["critic"].params[0].data.add_(0.1)  # else there is no gap at the start
    a, b = gradients(plain, 0)[0], gradients(zero, 0)[0]
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    loud = whole(make("dmd2", mlp_teacher(), **more))
    loud.players["critic"].params[0].data.add_(0.1)
    assert any(
        (one - other).abs().max() > 1e-6
        for one, other in zip(a, gradients(loud, 0)[0], strict=True)
    )


@pytest.mark.parametrize("features", ["critic", "teacher", "state"])
def test_gradients_of_both_sides_reach_what_they_should(features) -> None:
    """The heads learn; a fake score whose features are read learns from them too."""
    keys = {"adversary": {"features": features, "critic": 1.0, "r1": 1.0}}
    made = whole(make("dmd2", dit_teacher(), critic_steps=1, **keys))
    student, critic = gradients(made, 0)
    assert all(grad.isfinite().all() for grad in (*student, *critic))
    heads = len(list(made.adversary.net.parameters()))
    assert all(grad.abs().sum() > 0 for grad in critic[-heads:])
    quiet = whole(
        make("dmd2", dit_teacher(), critic_steps=1, adversary={"features": features, "critic": 0.0})
    )
    own = zip(critic[:-heads], gradients(quiet, 0)[1][:-heads], strict=True)
    moved = any((one - other).abs().max() > 1e-7 for one, other in own)
    assert moved == (features == "critic")


def test_approximate_r1_is_the_square_of_what_a_little_noise_changes() -> None:
    """r1 mean (l(x) - l(x + r1_noise n))^2 of the data's logits, beside the plain loss."""
    keys = {"features": "state", "head": "mlp"}
    one, none = (make("dmd2", mlp_teacher(), adversary={**keys, "r1": r1}) for r1 in (3.0, 0.0))
    adversary, batch, rng = one.adversary, batch_of(one, 0), Rng(0).at(0, 1)
    for param in adversary.net.parameters():  # logits are 0 at first
        param.data.add_(0.1)
    none.adversary.net.load_state_dict(adversary.net.state_dict())
    t, x, e = torch.linspace(0.2, 0.8, len(batch)), one.z(batch, rng), one.z(batch, rng, "e")
    critic = one.denoiser("critic")
    told, plain = (
        made.adversary.discriminate(x, e, t, {}, critic, batch, rng) for made in (one, none)
    )
    own = e if adversary.config.same_noise else rng.normal("real-e", batch.index, x.shape[1:])
    x_t = one.process.noise(batch.x, own, t)
    near = x_t + adversary.config.r1_noise * rng.normal("r1", batch.index, x.shape[1:])
    logits = [
        adversary.net(adversary.features(y, t, critic, batch.cond), batch.cond.label)
        for y in (x_t, near)
    ]
    expected = 3.0 * (logits[0] - logits[1]).square().mean()
    assert float(expected) > 0
    torch.testing.assert_close(told - plain, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("loss", ["non_saturating", "hinge", "relativistic"])
def test_the_students_gradient_is_that_of_one_whole_graph(loss) -> None:
    """The adversarial part, taken in two stages behind a frozen tail, against plain autograd."""
    keys = {"adversary": {"student": 0.7, "loss": loss}}
    made = whole(make("dmd2", mlp_teacher(), weights=(), **keys))
    batch, rng = batch_of(made, 0), Rng(0)
    (turn, *_) = made.turns(0)
    with made.players["student"].turn():
        turn.loss(batch, rng).value.backward()
    found = [p.grad.clone() for p in made.players["student"].params]
    made.players["student"].optimizer.zero_grad(set_to_none=True)
    with made.players["student"].turn():
        sample = made.generate(batch, rng, exact=False)
        t = made.times(made.config.student_t, 0.0, batch, rng)
        x_t = made.kernel(sample.x, 0.0, t).state(sample.x, made.z(batch, rng, "e"))
        critic = made.denoiser("critic")
        pred = critic(x_t, t, batch.cond, taps=made.taps()[0])
        logits = made.adversary.net(list(pred.features.values()))
        real = made.adversary.net(
            made.adversary.real(t, made.denoiser("critic"), batch, rng)
        ).detach()
        loss_of = made.adversary.config.loss.student(logits, real).mean() * 0.7
        loss_of = loss_of * math.prod(made.teacher.sample_shape)
        gap = (pred.x - made.teacher(x_t, t, batch.cond).x).detach()
        (loss_of + (sample.x * gap).flatten(1).sum(dim=1).mean()).backward()
    for one, param in zip(found, made.players["student"].params, strict=True):
        torch.testing.assert_close(one, param.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["dmd2", "sim", "phased_dmd"])
def test_recomputed_in_two_stages_the_gradient_is_the_same(method) -> None:
    one, two = (make(method, dit_teacher(), recompute=again) for again in (False, True))
    for made in (one, two):
        if made.adversary:
            whole(made)
        made.players["critic"].params[0].data.add_(0.1)
    for a, b in zip(gradients(one, 3)[0], gradients(two, 3)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_the_fake_score_alone_at_first_and_following_after() -> None:
    made = make("dmd", mlp_teacher(), critic_first=2, critic_follows=0.25)
    before = [p.clone() for p in made.players["student"].params]
    run(made, 0, 2)
    assert all(
        torch.equal(a, b) for a, b in zip(before, made.players["student"].params, strict=True)
    )
    run(made, 2, 3)
    assert made.players["student"].updates == 1 and made.players["critic"].updates == 3
    critic, student = made.players["critic"], made.players["student"]
    start = critic.weights[0].clone()
    critic.follow(student, 0.25)
    torch.testing.assert_close(critic.weights[0], start + 0.25 * (student.weights[0] - start))


@pytest.mark.parametrize("features", ["critic", "teacher"])
def test_data_and_samples_are_told_apart_by_passes_of_the_same_labels(
    features, monkeypatch
) -> None:
    """Where labels are dropped, by those that are left; the R1 penalty's data too."""
    keys = {"adversary": {"features": features, "r1": 1.0}, "critic_drop": 0.5, "batch_size": 32}
    made, told = make("dmd2", mlp_teacher(), **keys), []
    batch, rng = batch_of(made, 1), Rng(0).at(1, 1)
    read = made.teacher if features == "teacher" else made.denoiser("critic")
    for name in ("forward", "features"):
        plain = getattr(Denoiser, name)

        def noted(den, x_t, t, cond, *args, plain=plain, **more):
            told.extend([cond.label] if den is read else [])
            return plain(den, x_t, t, cond, *args, **more)

        monkeypatch.setattr(Denoiser, name, noted)
    made.critic_loss(batch, rng)
    left = made.dropped(batch, rng).label
    assert 0 < int((left == 3).sum()) < 32
    assert len(told) == 3 and all(torch.equal(label, left) for label in told)


def test_a_tap_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^adversary.taps: VectorMLP has no module 'nowhere'"):
        make("dmd2", mlp_teacher(), adversary={"taps": ("nowhere",)})


def test_the_head_is_saved_with_the_fake_score() -> None:
    made = make("dmd2", mlp_teacher(), **WITH)
    run(made, 0, 2)
    names = [name for name in made.state()["critic"] if name.startswith("extra.")]
    assert len(names) == len(list(made.adversary.net.parameters()))
    assert saved(made)[1] == {"student": 2, "critic": 10}
