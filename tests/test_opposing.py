"""Adversarial methods: LADD, GDD (innate one-step generators), ADD and Flash-DMD against closed
forms, and what they freeze.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from stepdistill.losses.adversarial import AdversarialLoss, Hinge, NonSaturating, Relativistic
from stepdistill.losses.features import Pixels, Projected, RandomConv, Timm, widths
from stepdistill.losses.heads import Discriminator, Mlp, Quadratic, Tokens
from stepdistill.losses.preference import log_ratio, preference_loss
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.score.opponent import (
    Opponent,
    PictureConfig,
    PictureOpponent,
    TeacherConfig,
    TeacherOpponent,
)
from tests.helpers import (
    batch_of,
    dit_teacher,
    hermite2,
    make,
    mlp_teacher,
    noise,
    run,
    saved,
    unet_teacher,
)

LOSSES = [Hinge(), NonSaturating(), Relativistic()]
A, S = 0.8, 0.6  # of the bench's noised states
P, Q = (0.2, 1.1), (0.5, 1.3)  # mean and spread of the student's law and of the data's


def score(x_t: Tensor, law: tuple[float, float]) -> Tensor:
    """Score of a noised Gaussian."""
    return -(x_t - A * law[0]) / (A**2 * law[1] ** 2 + S**2)


def log_density(x_t: Tensor, law: tuple[float, float]) -> Tensor:
    """Its log density, without the constant."""
    var = A**2 * law[1] ** 2 + S**2
    return -0.5 * (x_t - A * law[0]) ** 2 / var - 0.5 * math.log(var)


def best_logit(x_t: Tensor) -> Tensor:
    """log q / p of the bench."""
    return log_density(x_t, Q) - log_density(x_t, P)


def waken(opponent: Opponent) -> None:
    """Give heads that begin at zero some weights."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for param in opponent.net.parameters():
            param.add_(0.3 * torch.randn_like(param))


# The losses and their heads -------------------------------------------------------------------


@pytest.mark.parametrize("head", [Quadratic(), Mlp(width=32)])
def test_a_logit_learns_the_log_ratio(head) -> None:
    """Within 0.1 inside three standard deviations of both laws."""
    u = (torch.arange(2000) + 0.5) / 2000
    points = [law[0] + law[1] * torch.special.ndtri(u)[:, None] for law in (Q, P)]
    net = Discriminator(head, [1], seed=0)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = NonSaturating().critic(*(net([x]) for x in points)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    x = torch.linspace(P[0] - 3 * P[1], P[0] + 3 * P[1], 200)[:, None]
    log_r = torch.log(torch.tensor(P[1] / Q[1])) - 0.5 * (
        ((x - Q[0]) / Q[1]) ** 2 - ((x - P[0]) / P[1]) ** 2
    )
    assert float((net([x]).detach() - log_r).abs().max()) < 0.1


def test_the_student_of_the_best_logit_descends_a_softened_divergence() -> None:
    """NS gives -E[1/(1+r) (s_q - s_p) a dx]; the saturating loss twice the JS of bench A."""
    x, e, weight = hermite2(80)
    mu, u = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in P)
    x_t = A * (mu + u * x) + S * e
    logit = best_logit(x_t)
    loss = (weight * NonSaturating().student(logit)).sum()
    found = torch.autograd.grad(loss, (mu, u), retain_graph=True)
    with torch.no_grad():
        push = -A * (score(x_t, Q) - score(x_t, P)) / (1 + logit.exp())
        expected = ((weight * push).sum(), (weight * push * x).sum())
    torch.testing.assert_close(found, expected)
    saturating = torch.autograd.grad((weight * -softplus(logit)).sum(), (mu, u))
    bench = torch.tensor([-0.036158, -0.038188], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(saturating), 2 * bench, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
@pytest.mark.parametrize("picture", [False, True], ids=["teacher", "pictures"])
def test_the_students_gradient_is_that_of_finite_differences(
    loss: AdversarialLoss, picture
) -> None:
    teacher, (batch, rng) = mlp_teacher(), (batch_of(make("ladd", mlp_teacher()), 0), Rng(3))
    opponent = (
        PictureOpponent(PictureConfig(loss=loss, project=8), teacher, 0)
        if picture
        else TeacherOpponent(TeacherConfig(loss=loss), teacher, 0)
    )
    waken(opponent)
    x, way = noise(1, (8, 4)).requires_grad_(), noise(2, (8, 4))
    (found,) = torch.autograd.grad(opponent.against(x, batch, rng).sum(), x)
    assert float(found.abs().sum()) > 0
    with torch.no_grad():
        step = 1e-2
        ahead, behind = (opponent.against(x + k * way, batch, rng) for k in (step, -step))
    slope = (ahead - behind) / (2 * step)
    torch.testing.assert_close((found * way).sum(dim=1), slope, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("method", ["ladd", "add", "gdd"])
def test_heads_at_zero_give_the_student_nothing(method) -> None:
    """And cost 2 a head by the hinge."""
    keys: dict[str, Any] = {"adversary": {"loss": "hinge"}}
    keys |= {"distil": {"weight": 0.0}} if method == "add" else {}
    made = make(method, dit_teacher(), **keys)
    batch = batch_of(made, 0)
    with made.players["student"].turn():
        made.student_loss(batch, Rng(0)).value.backward()
    assert all(not param.grad.any() for param in made.players["student"].params)
    heads = len(made.opponent.net.heads)
    assert heads == {"ladd": 2, "add": 3, "gdd": 3}[method]
    assert float(made.discriminator_loss(batch, Rng(0)).value) == 2 * heads


@pytest.mark.parametrize("method", ["ladd", "add", "gdd", "flash_dmd"])
def test_one_sample_serves_the_student_and_the_discriminator(method) -> None:
    made = make(method, mlp_teacher(), **({"freeze": ()} if method == "gdd" else {}))
    calls: list[bool] = []
    hook = made.denoiser("student").net.register_forward_hook(
        lambda *_: calls.append(torch.is_grad_enabled())
    )
    turns = [turn for turn in made.turns(1) if turn.player != "critic"]
    batch = batch_of(made, 1)
    turns[0].loss(batch, Rng(0))
    so_far = len(calls)
    turns[1].loss(batch, Rng(1))
    hook.remove()
    assert len(calls) == so_far and calls[-1]


def test_heads_of_pictures_are_told_the_class() -> None:
    teacher, made = mlp_teacher(), make("add", mlp_teacher())
    opponent, batch = PictureOpponent(PictureConfig(), teacher, 0), batch_of(made, 0)
    waken(opponent)
    x = noise(1, (8, 4))
    other = made.batch(0, x=batch.x, label=(batch.cond.label + 1) % 3)
    assert not torch.equal(*(opponent.logits(x, one, Rng(0)) for one in (batch, other)))


# LADD -----------------------------------------------------------------------------------------


def test_ladd_reads_the_teacher_with_a_graph_and_leaves_it_early() -> None:
    made = make("ladd", dit_teacher(), adversary={"taps": ("transformer_blocks.0",)})
    seen: list[str] = []
    for name, block in made.teacher.net.named_modules():
        if name.startswith("transformer_blocks.") and name.count(".") == 1:
            block.register_forward_hook(lambda *_, name=name: seen.append(name))
    waken(made.opponent)
    with made.players["student"].turn():
        made.student_loss(batch_of(made, 0), Rng(0)).value.backward()
    assert seen == ["transformer_blocks.0"]
    assert any(bool(param.grad.any()) for param in made.players["student"].params)


def test_ladd_starts_from_the_samplers_noise_and_from_noised_data_below() -> None:
    made = make("ladd", mlp_teacher(), student_steps=4, batch_size=64)
    batch, rng = batch_of(made, 0), Rng(0)
    given: list[tuple[Tensor, Tensor]] = []
    net = made.denoiser("student").net
    net.register_forward_pre_hook(lambda _, args: given.append((args[0], args[1])))
    made.generate(batch, rng)
    (x_t, time), z = given[0], made.z(batch, rng)
    t = (time / 1000)[:, None]
    assert {round(float(v), 3) for v in t} == {1.0, 0.75, 0.5, 0.25}
    torch.testing.assert_close(x_t, (1 - t) * batch.x + t * z)


def test_ladd_refuses_a_module_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"adversary.taps: .* no module 'nowhere'"):
        make("ladd", mlp_teacher(), adversary={"taps": ("nowhere",)})
    with pytest.raises(UserError, match="set guidance=1"):
        make("ladd", mlp_teacher(), guidance=2.0)


def test_ladd_trains_on_the_teachers_own_samples() -> None:
    """Where ``pairs`` asks for them, guided as they are made."""
    made = make("ladd", mlp_teacher(), guidance=2.0, pairs={"num": 16})
    assert made.needs == "pairs" and made.config.pair_store.num == 16
    run(made, 0, 2)
    assert make("ladd", mlp_teacher()).needs == "data"


# GDD ------------------------------------------------------------------------------------------


def test_gdd_freezes_the_convolutions_of_a_unet() -> None:
    """GDD: most of a UNet2DModel stays bit for bit what it was; the rest is trained."""
    made = make("gdd", unet_teacher(), adversary={"features": {"kind": "random_conv"}})
    student = made.denoiser("student")
    sizes = {name: param.numel() for name, param in student.net.named_parameters()}
    fixed = {name for name in sizes if name in student.fixed}
    assert {name.rsplit(".", 2)[-2] for name in fixed} == {"conv1", "conv2", "conv", "0"}
    for part in ("resnets.0.conv1.weight", "attentions.0.to_out.0.bias", "resnets.0.conv2.bias"):
        assert f"mid_block.{part}" in fixed
    trained = ("norm", "time_emb", "to_q", "to_k", "to_v", "conv_shortcut", "conv_in", "conv_out")
    assert not [name for name in fixed if any(part in name for part in trained)]
    assert sum(sizes[name] for name in fixed) > 0.5 * sum(sizes.values())
    before = {name: param.clone() for name, param in student.net.named_parameters()}
    run(made, 0, 3)
    same = {n for n, param in student.net.named_parameters() if torch.equal(param, before[n])}
    assert fixed <= same and "mid_block.resnets.0.norm1.weight" not in same
    average = dict(made.players["student"].ema.net.named_parameters())
    assert all(torch.equal(average[name], before[name]) for name in fixed)
    assert not any(param.requires_grad for param in student.net.parameters())


def test_gdd_asks_no_teacher_and_checkpoints_the_whole_student() -> None:
    made = make("gdd", dit_teacher())
    calls: list[int] = []
    made.teacher.net.register_forward_hook(lambda *_: calls.append(1))
    run(made, 0, 2)
    assert not calls
    assert {item.role for item in made.passes()} == {"student"}
    names = {name for name, _ in made.denoiser("student").net.named_parameters()}
    assert {f"net.{name}" for name in names} <= set(saved(made)[0]["student"])
    assert "transformer_blocks.0.ff.net.2.weight" in made.denoiser("student").fixed


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "no rule of GDD-I is known for VectorMLP"),
        ({"freeze": ("nothing.*",)}, "no parameter of VectorMLP is named like nothing"),
        ({"freeze": ("*",)}, "nothing is left to train"),
        ({"freeze": ("blocks.*",), "lora": {"rank": 2}}, "set lora=null"),
    ],
)
def test_gdd_refuses_what_it_cannot_freeze(keys, told) -> None:
    with pytest.raises(UserError, match=told):
        make("gdd", mlp_teacher(), **keys)


# ADD ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", ["alpha", "alpha_sigma", "one"])
def test_add_draws_samples_to_the_teachers_estimate(c) -> None:
    """The gradient of 2.5 c(t) ||x - D_T||^2 is 5 c (x - D_T), with D_T held."""
    t = {"kind": "uniform", "low": 0.3, "high": 0.3}
    made = make("add", mlp_teacher(), distil={"c": c, "t": t})
    batch, rng = batch_of(made, 0), Rng(0)
    x = noise(1, (8, 4)).requires_grad_()
    (found,) = torch.autograd.grad(made.beside(x, batch, rng)["distance"].sum(), x)
    with torch.no_grad():
        level = torch.full((8,), 0.3)
        x_t = 0.7 * x + 0.3 * made.z(batch, rng, "e")
        aim = made.teacher(x_t, level, batch.cond).x
    factor = {"alpha": 0.7, "alpha_sigma": 0.21, "one": 1.0}[c]
    torch.testing.assert_close(found, 5 * factor * (x - aim), rtol=1e-4, atol=1e-5)


# Flash-DMD ------------------------------------------------------------------------------------


def test_flash_dmd_splits_its_exits_and_keeps_no_graph_of_the_walk() -> None:
    """Flash-DMD: an adversarial update has one pass with a graph, whose input has none."""
    made = make("flash_dmd", mlp_teacher())
    graphs: list[tuple[bool, bool, float]] = []
    made.denoiser("student").net.register_forward_pre_hook(
        lambda _, args: graphs.append(
            (torch.is_grad_enabled(), args[0].requires_grad, float(args[1][0]) / 1000)
        )
    )
    levels = {0: {1.0, 0.75}, 1: {0.5, 0.25}}
    for step in range(12):
        turn = made.turns(step)[0]
        graphs.clear()
        with made.players["student"].turn():
            loss = turn.loss(batch_of(made, step), Rng(0).at(step))
        assert [g[0] for g in graphs[:-1]] == [False] * (len(graphs) - 1)
        assert graphs[-1][:2] == (True, False)
        assert round(graphs[-1][2], 3) in levels[step % 2]
        assert len(graphs) == 5 if step % 2 else len(graphs) <= 2
        assert ("adversarial" in loss.logs) == bool(step % 2)
    with pytest.raises(UserError, match="leaves none of student_steps=2"):
        make("flash_dmd", mlp_teacher(), student_steps=2)


def test_flash_dmd_prefers_nothing_among_equals() -> None:
    """Flash-DMD: H is 0 and its gradient finite where candidates are equal."""
    y, reference = noise(1), noise(2)
    mean, spread = noise(3).requires_grad_(), torch.full((16,), 0.5)
    loss = preference_loss(y, y, mean, reference, spread, beta=7.0)
    torch.testing.assert_close(loss, torch.full((16,), math.log(2.0)))
    (grad,) = torch.autograd.grad(loss.sum(), mean)
    assert bool(grad.isfinite().all()) and float(grad.abs().max()) < 1e-5


def test_a_preference_makes_the_better_state_likelier() -> None:
    """The log ratio is that of two Gaussians, and a step down raises it for the best."""
    best, worst, reference = noise(1), noise(2), noise(3)
    mean, spread = noise(4).requires_grad_(), torch.linspace(0.4, 0.9, 16)
    laws = [torch.distributions.Normal(m, spread[:, None]) for m in (mean, reference)]
    exact = (laws[0].log_prob(best) - laws[1].log_prob(best)).sum(dim=1)
    torch.testing.assert_close(log_ratio(best, mean, reference, spread), exact)
    loss = preference_loss(best, worst, mean, reference, spread, beta=0.1)
    (grad,) = torch.autograd.grad(loss.sum(), mean)
    assert bool(((grad * (best - worst)).sum(dim=1) < 0).all())


def test_flash_dmd_follows_a_reward() -> None:
    """Flash-DMD with preferences for bright samples makes them brighter than without."""

    def brightness(preference: dict[str, Any] | None) -> float:
        keys = {"optim": {"lr": 3e-3}, "opponent": {"student": 0.0}, "steps": 40}
        made = make("flash_dmd", mlp_teacher(), preference=preference, batch_size=64, **keys)
        run(made, 0, 40)
        batch = made.batch(0)
        z = made.z(batch, Rng(5))
        return float(made.draw(z, batch.cond, 4, Rng(5), batch.index).mean())

    wish = {"reward": "brightness", "updates": 2, "beta": 5.0}
    assert brightness(wish) > brightness(None) + 0.05


# Features of pictures -------------------------------------------------------------------------


def test_random_features_are_those_of_their_seed() -> None:
    x = noise(0, (2, 1, 8, 8))
    maps = RandomConv(widths=(4, 8)).build((1, 8, 8))(x)
    assert [tuple(f.shape) for f in maps] == [(2, 4, 8, 8), (2, 8, 4, 4)]
    again = RandomConv(widths=(4, 8)).build((1, 8, 8))(x)
    other = RandomConv(widths=(4, 8), seed=1).build((1, 8, 8))(x)
    assert torch.equal(maps[1], again[1]) and not torch.equal(maps[1], other[1])
    assert widths(RandomConv().build((4,))(noise())) == [32, 64, 128]
    assert torch.equal(Pixels().build((4,))(noise())[0], noise())


def test_projected_features_mix_coarse_levels_into_fine_ones() -> None:
    net = RandomConv(widths=(4, 8)).build((1, 8, 8))
    mixed = Projected(net, [4, 8], 6, seed=0)
    x = noise(0, (2, 1, 8, 8))
    fine, coarse = mixed(x)
    assert fine.shape == (2, 6, 8, 8) and coarse.shape == (2, 6, 4, 4)
    alone = mixed.across[0](net(x)[0].movedim(1, -1)).movedim(-1, 1)
    assert not torch.allclose(fine, alone)


def test_timm_gives_frozen_features_and_downloads_nothing(tmp_path) -> None:
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="no such file"):
        Timm(model="resnet10t", weights=str(tmp_path / "none.safetensors")).build((1, 8, 8))
    with pytest.raises(UserError, match="features.model=resnet-none"):
        Timm(model="resnet-none", weights="random").build((1, 8, 8))
    with pytest.raises(UserError, match="not vectors"):
        Timm(model="resnet10t", weights="random").build((4,))
    plug = Timm(model="resnet10t", weights="random", levels=(1, 2))
    opponent = PictureOpponent(PictureConfig(features=plug, head=Tokens()), unet_teacher(), 0)
    found = opponent.features(noise(0, (2, 1, 8, 8)))
    assert len(found) == 2 and all(f.dim() == 4 for f in found)
    assert not any(param.requires_grad for param in opponent.features.parameters())
    import timm

    file = tmp_path / "weights.pth"
    net: nn.Module = timm.create_model("resnet10t", pretrained=False)
    torch.save(net.state_dict(), file)
    own = Timm(model="resnet10t", weights=str(file)).build((1, 8, 8))
    loaded = {id(p): p for p in own.parameters()}
    first = next(iter(net.parameters()))
    assert any(torch.equal(first, p) for p in loaded.values() if p.shape == first.shape)
