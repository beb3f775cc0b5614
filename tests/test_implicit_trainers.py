"""SIM, SiD, SiDA, SiD-LSG and Uni-Instruct as their trainers run them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.losses.divergence import Divergence
from stepdistill.losses.gap import Seen
from stepdistill.losses.heads import ChannelMean, Discriminator
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from tests.helpers import batch_of, dit_teacher, make, mlp_teacher, run, saved

NO_HEAD: dict[str, Any] = {"adversary": None, "divergence": "reverse_kl"}
STATE = {"features": "state", "head": "mlp"}
LSG = {"guidance": 2.0, "guide": {"kind": "long_short", "train": 2.0, "fake": 2.0}}


def trained(method: str, state: Any = None, **keys: Any) -> Trainer:
    """A trainer after three steps, or in a state given."""
    made = make(method, mlp_teacher(), **keys)
    if state is None:
        run(made, 0, 3)
    else:
        made.load_state(3, *state)
    return made


def student_gradient(made: Trainer) -> Tensor:
    """Of the student's turn at step 3."""
    player, (turn, *_) = made.players["student"], made.turns(3)
    with player.turn():
        turn.loss(batch_of(made, 3), Rng(0).at(3, 0)).value.backward()
    found = torch.cat([param.grad.flatten() for param in player.params])
    player.optimizer.zero_grad(set_to_none=True)
    return found


# Equalities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "form"), [(1.0, "score"), (0.5, "full")], ids=["score form", "full form"]
)
def test_sim_with_l2_is_sid_without_its_normaliser(alpha, form) -> None:
    """Twice its gradient: to the bit in the score form, to rounding in the full one."""
    sim = trained("sim", distance="l2", form=form)
    sid = trained("sid", saved(sim), alpha=alpha, weights=())
    one, two = student_gradient(sim), 2 * student_gradient(sid)
    assert one.any()
    assert torch.equal(one, two) or form == "full"
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ratio", ["exact", "stopped"])
def test_uni_instruct_with_the_reverse_kl_is_sid_at_one_half(ratio) -> None:
    """Twice it, normalised alike; and without the normaliser SIM's full form with l2."""
    sid = trained("sid", alpha=0.5)
    uni = trained("uni_instruct", saved(sid), ratio=ratio, **NO_HEAD)
    torch.testing.assert_close(
        student_gradient(uni), 2 * student_gradient(sid), rtol=1e-5, atol=1e-7
    )
    bare = trained("uni_instruct", saved(sid), ratio=ratio, weights=(), **NO_HEAD)
    sim = trained("sim", saved(sid), distance="l2", form="full")
    torch.testing.assert_close(student_gradient(bare), student_gradient(sim), rtol=1e-5, atol=1e-7)


def test_uni_instruct_needs_its_ratio() -> None:
    """Another divergence, mode or ratio is another gradient."""
    keys = {"adversary": {**STATE, "student": 0.0}}
    made = trained("uni_instruct", **keys)
    found = [
        student_gradient(trained("uni_instruct", saved(made), **{**keys, **more}))
        for more in ({}, {"ratio": "stopped"}, {"divergence": "jensen_shannon"})
    ]
    found.append(student_gradient(trained("uni_instruct", saved(made), **keys, greatest_ratio=1.0)))
    for i, one in enumerate(found):
        assert one.any()
        assert not any(torch.allclose(one, two, rtol=1e-3, atol=1e-8) for two in found[:i])


def test_before_its_head_takes_part_uni_instruct_has_a_ratio_of_one() -> None:
    keys = {"adversary": {**STATE, "from_step": 5}, "weights": ()}
    made = trained("uni_instruct", **keys)
    late = student_gradient(made)
    sim = trained("sim", distance="l2")
    for name in ("student", "critic"):
        sim.denoiser(name).net.load_state_dict(made.denoiser(name).net.state_dict())
    torch.testing.assert_close(late, student_gradient(sim), rtol=1e-5, atol=1e-7)


def test_sida_before_its_head_takes_part_is_sid() -> None:
    sida = trained("sida", adversary={"from_step": 3})
    sid = trained("sid", alpha=1.0)
    for name in ("student", "critic"):
        one, two = (made.denoiser(name).net.state_dict() for made in (sida, sid))
        assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert not torch.equal(student_gradient(sida), student_gradient(sid))


# Two stages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("sim", {}),
        ("sim", {"form": "full", "space": "score", "distance": "power"}),
        ("sid", {}),
        ("sid", LSG),
        ("sida", {"adversary": {"from_step": 0}}),
        ("uni_instruct", {}),
        ("uni_instruct", {"adversary": STATE, "divergence": "jensen_shannon"}),
    ],
)
def test_a_two_stage_backward_is_the_direct_one(method, keys) -> None:
    """The image's gradient first and then the student's, against one graph of everything."""
    made: Any = trained(method, **keys)
    staged = student_gradient(made)
    batch, rng = batch_of(made, 3), Rng(0).at(3, 0)
    player = made.players["student"]
    with player.turn():
        x = made.generate(batch, rng, exact=False).x
        t = made.times(made.config.student_t, 0.0, batch, rng)
        x_t = made.process.noise(x, made.z(batch, rng, "e"), t)
        asked = made.ask(x_t, t, batch, rng, graph=True)
        c = made.process.coefs(t).expand(x)
        seen = Seen(x, x, batch.cond.label, t, c, x_t, asked.fake.x, asked.real.x)
        total = torch.zeros(())
        if made.adversary is not None:
            critic = made.denoiser("critic")
            total, logits = made.adversary.oppose(
                asked.features, critic, t, batch, rng, made.push(seen)
            )
            ratio = logits.detach().mean(dim=1).exp()
            seen = Seen(x, x, batch.cond.label, t, c, x_t, asked.fake.x, asked.real.x, ratio)
        (total + (made.weight(seen)[0] * made.cost(seen)).mean()).backward()
        direct = torch.cat([param.grad.flatten() for param in player.params])
    torch.testing.assert_close(staged, direct, rtol=1e-4, atol=1e-6 * float(direct.abs().max()))


@pytest.mark.parametrize("method", ["uni_instruct", "sida"])
def test_scores_and_head_share_one_backward_through_the_fake_score(method) -> None:
    """By its first layer, which lies before the features as well."""
    made: Any = trained(method, adversary={"from_step": 0})
    passed: list[int] = []
    layer = made.denoiser("critic").net.enter
    layer.register_full_backward_hook(lambda *_: passed.append(1))
    assert student_gradient(made).any() and made.opposed
    assert len(passed) == 1


# Guides: SiD-LSG ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_fake_score_s_guided_prediction_is_what_trains(scale) -> None:
    """By hand: null + scale (cond - null) against the target, a tenth of the labels without."""
    made: Any = trained(
        "sid",
        batch_size=64,
        guidance=2.0,
        guide={"kind": "long_short", "train": scale, "fake": 2.0},
        critic_steps=2,
    )
    batch, rng = batch_of(made, 3), Rng(0).at(3, 2)  # a turn with samples of its own
    made.shared = None
    with torch.no_grad():
        got = made.critic_loss(batch, rng).logs["loss"]
        x = made.generate(batch, rng, exact=True).x
        t = made.times(made.config.critic_t, 0.0, batch, rng)
        e = made.z(batch, rng, "critic-e")
        x_t = made.process.noise(x, e, t)
        lost = rng.uniform("drop", batch.index) < 0.1
        assert 0 < int(lost.sum()) < 20
        label = batch.cond.label.masked_fill(lost, 3)
        net = made.denoiser("critic").net
        time = made.process.network_time(t)
        h, h_null = net(x_t, time, label), net(x_t, time, torch.full_like(label, 3))
        expected = (h_null + scale * (h - h_null) - (e - x)).square().mean()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("guide", "guidance", "share"),
    [
        ("teacher", 2.0, 0.0),
        ("both", 2.0, 0.1),
        ("both", 1.0, 0.0),
        ({"kind": "long_short", "train": 1.0, "fake": 1.0}, 2.0, 0.0),
        ({"kind": "long_short", "train": 1.0, "fake": 2.0}, 2.0, 0.1),
        ({"kind": "long_short", "train": 2.0, "fake": 1.0}, 1.0, 0.1),
    ],
)
def test_labels_are_dropped_where_the_fake_score_must_know_no_class(guide, guidance, share) -> None:
    made: Any = make("sid", mlp_teacher(), batch_size=512, guide=guide, guidance=guidance)
    batch = made.batch(0)
    dropped = made.dropped(batch, Rng(0).at(0)).label
    found = float((dropped == 3).float().mean())
    assert found == 0 if share == 0 else abs(found - share) < 0.05
    given: Any = make(
        "sid", mlp_teacher(), batch_size=512, guide=guide, guidance=guidance, critic_drop=0.5
    )
    assert abs(float((given.dropped(batch, Rng(0).at(0)).label == 3).float().mean()) - 0.5) < 0.1


def test_a_fake_score_is_guided_only_away_from_a_label_for_none() -> None:
    teacher = mlp_teacher()
    teacher.null_label = None
    guide = {"kind": "long_short", "train": 2.0}
    with pytest.raises(UserError, match="guide: long_short guides the fake score.*guide=teacher"):
        make("sid", teacher, guide=guide)


def test_scales_of_long_and_short_guidance_are_those_asked() -> None:
    """The fake score is asked at ``fake``, the teacher at ``guidance``."""
    made: Any = make(
        "sid", mlp_teacher(), guidance=3.0, guide={"kind": "long_short", "fake": 1.5, "train": 2.0}
    )
    batch, rng = made.batch(0), Rng(0).at(0)
    t = torch.full((8,), 0.5)
    x_t = made.z(batch, rng)
    asked = made.ask(x_t, t, batch, rng, graph=False)
    label = batch.cond.label
    net, null = made.teacher.net, torch.full_like(label, 3)  # at the start the fake score's too
    h, h_null = net(x_t, 1000 * t, label), net(x_t, 1000 * t, null)
    torch.testing.assert_close(asked.fake.h, h_null + 1.5 * (h - h_null))
    torch.testing.assert_close(asked.real.h, h_null + 3.0 * (h - h_null))


# The ratio of densities ---------------------------------------------------------------------------


@pytest.mark.parametrize("rollout", [True, False])
@pytest.mark.parametrize("method", ["uni_instruct", "f_distill"])
def test_the_ratio_counts_at_exits_whose_images_the_head_knows(
    method, rollout, monkeypatch
) -> None:
    """Of heads that learn what the sampler makes that is the last one; others take weight one."""
    head = {"features": "state", "head": "mlp", "student": 0.0}
    made: Any = trained(method, student_steps=3, critic_rollout=rollout, adversary=head)
    seen: list[Any] = []
    asked = "cost" if method == "uni_instruct" else "direction"
    original = getattr(made, asked)
    monkeypatch.setattr(made, asked, lambda one: (seen.append(one), original(one))[1])
    exits = []
    for step in range(3, 15):
        rng = Rng(0).at(step, 0)
        exits.append(rng.integer("exit", 3))
        with made.players["student"].turn():
            made.student_loss(batch_of(made, step), rng)
    assert set(exits) == {0, 1, 2}
    assert [one.ratio is not None for one in seen] == [e == 2 or not rollout for e in exits]
    told = next(one for one in seen if one.ratio is not None)
    plain = original(replace(told, ratio=None))
    assert not torch.equal(original(told), plain)
    ones = original(replace(told, ratio=torch.ones_like(told.ratio)))
    torch.testing.assert_close(ones, plain)


# SiDA's head --------------------------------------------------------------------------------------


def test_channel_mean_gives_a_logit_a_position_and_has_no_weights() -> None:
    net = Discriminator(ChannelMean(), [4, 6], 0)
    maps, tokens = torch.randn(3, 4, 2, 5), torch.randn(3, 7, 6)
    logits = net([maps, tokens])
    assert logits.shape == (3, 17) and not list(net.parameters())
    torch.testing.assert_close(logits[:, :10], maps.mean(dim=1).flatten(1))
    torch.testing.assert_close(logits[:, 10:], tokens.mean(dim=2))


def test_sida_s_adversarial_loss_is_normalised_like_its_scores() -> None:
    """Each sample's by 1 / mean|x - D_T|, once for each of its entries; and same noise for data and
    samples by default."""
    made: Any = trained("sida", adversary={"from_step": 0, "student": 0.5})
    assert made.config.adversary.same_noise and made.config.adversary.head == ChannelMean()
    batch, rng = batch_of(made, 3), Rng(0).at(3, 0)
    with made.players["student"].turn():
        logs = made.student_loss(batch, rng).logs
        x = made.generate(batch, rng, exact=False).x
        t = made.times(made.config.student_t, 0.0, batch, rng)
        x_t = made.process.noise(x, made.z(batch, rng, "e"), t)
        asked = made.ask(x_t, t, batch, rng, graph=True)
        logits = made.adversary.net(asked.features)
        size = (x - asked.real.x).abs().flatten(1).mean(dim=1)
        each = torch.nn.functional.softplus(-logits).mean(dim=1)
        torch.testing.assert_close(logs["adversarial"], 0.5 * x[0].numel() * (each / size).mean())


def test_a_head_that_begins_later_is_declared_when_it_does() -> None:
    made = make("sida", dit_teacher(), batch_size=4, adversary={"from_step": 2})
    run(made, 0, 1)
    before = made.passes()
    run(made, 1, 3)
    after = made.passes()
    assert sum(p.count for p in after) == sum(p.count for p in before) + 1  # the data's own


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "keys", "message"),
    [
        ("sida", {"adversary": None}, "adversary: without a head sida is sid; set method=sid"),
        ("uni_instruct", {"adversary": None}, "forward_kl takes the density ratio from"),
        (
            "uni_instruct",
            {"adversary": {"loss": "hinge"}},
            "adversary.loss=hinge: its logits are no log density ratios",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(method, keys, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make(method, mlp_teacher(), **keys)
    assert "\n" not in str(caught.value)


def test_uni_instruct_and_sim_take_what_users_write() -> None:
    """A divergence by its weight alone: with F = 1 it is the reverse KL, head or none."""

    class One(Divergence):
        def weight(self, r: Tensor) -> Tensor:
            return torch.ones_like(r)

    keys = {"adversary": {**STATE, "student": 0.0}}
    own = trained("uni_instruct", divergence=One(), **keys)
    ours = trained("uni_instruct", divergence="reverse_kl", **keys)
    assert torch.equal(student_gradient(own), student_gradient(ours))
