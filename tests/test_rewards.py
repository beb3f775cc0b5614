"""Rewards: as weights (Stream-R1), as SwiftBrush v2's clamped term, and a user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.commands.read import read_config
from stepdistill.data.digits import open_digits
from stepdistill.eval.rewards import DigitsClass
from stepdistill.losses.gap import Reward, Saliency, Seen, product
from stepdistill.losses.reward import Brightness, rewards
from stepdistill.losses.reward import Reward as AnyReward
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.score.engine import Sample
from tests.helpers import (
    batch_of,
    dit_teacher,
    make,
    mlp_teacher,
    noise,
    run,
    same,
    saved,
    turn_gradients,
)

CORNER = f"{__file__}:Corner"
OFF = [
    {"kind": "reward", "reward": "brightness", "beta": 0.0},
    {"kind": "saliency", "reward": "brightness", "floor": 1.0},
]


class Corner(AnyReward):
    """The first entry."""

    def __call__(self, x: Tensor, label: Tensor | None) -> Tensor:
        return x.flatten(1)[:, 0]


class Square(AnyReward):
    """Half the squared norm, whose gradient is the sample."""

    def __call__(self, x: Tensor, label: Tensor | None) -> Tensor:
        return 0.5 * x.flatten(1).square().sum(1)


class Held(AnyReward):
    """Without a gradient."""

    def __call__(self, x: Tensor, label: Tensor | None) -> Tensor:
        return x.detach().flatten(1).sum(1)


class Wide(AnyReward):
    """Not one number a sample."""

    def __call__(self, x: Tensor, label: Tensor | None) -> Tensor:
        return x.flatten(1)


def seen(x: Tensor) -> Seen:
    """A comparison of which only the sample matters."""
    none: Any = None
    return Seen(x, x, None, torch.zeros(len(x)), none, x, x, x)


# As weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", [mlp_teacher, dit_teacher])
def test_stream_r1_without_sharpness_and_saliency_is_dmd_to_the_bit(teacher) -> None:
    pair = [
        make("dmd", teacher(), batch_size=4, weights=["mean_abs", *OFF]),
        make("dmd", teacher(), batch_size=4),
    ]
    for made in pair:
        run(made, 0, 4)
    same(*(saved(made)[0] for made in pair))


@pytest.mark.parametrize("method", ["phased_dmd", "dmd2", "diff_instruct", "swiftbrush"])
def test_stream_r1_s_weights_fit_every_method_of_matching(method) -> None:
    on = [{**OFF[0], "beta": 2.0}, {**OFF[1], "reward": {"kind": "brightness"}, "floor": 0.1}]
    usual = list(make(method, mlp_teacher()).config.weights)
    made = [make(method, mlp_teacher(), weights=usual + more) for more in ([], OFF, on)]
    for one in made:
        run(one, 0, 3)
    same(saved(made[0])[0], saved(made[1])[0])
    with pytest.raises(AssertionError):
        same(saved(made[0])[0], saved(made[2])[0])


def test_stream_r1_is_a_config_of_dmd() -> None:
    cls, config = read_config("stream_r1-digits")
    assert config.method == "dmd"
    kinds = [weight.kind for weight in config.weights]
    assert kinds == ["mean_abs", "reward", "saliency"]
    assert all(type(weight.reward) is DigitsClass for weight in config.weights[1:])
    images, labels = open_digits().load(list(range(40)))
    look = Seen(**{**vars(seen(images)), "label": labels})
    found = product(config.weights[1:], look)
    assert found.shape == images.shape and found.isfinite().all()
    assert float(found.flatten(1).std(dim=1).min()) > 0.05


def test_a_reward_s_weight_is_the_exponential_of_its_own_unit() -> None:
    x = noise(0, (6, 1, 2, 2))
    weight = Reward(reward=Square(), beta=0.3, centre=2.0, scale=4.0, low=1e-3, high=1e3)
    expected = (0.3 * (0.5 * x.square().flatten(1).sum(1) - 2) / 4).exp()
    torch.testing.assert_close(weight(seen(x)), expected.reshape(6, 1, 1, 1))
    twice = Reward(reward=Square(), beta=0.6, centre=2.0, scale=8.0, low=1e-3, high=1e3)
    torch.testing.assert_close(twice(seen(x)), weight(seen(x)))
    sharp = Reward(reward=Square(), beta=100.0, centre=2.0)(seen(x))
    assert {round(one, 6) for one in sharp.flatten().tolist()} == {0.2, 5.0}


def test_saliency_is_the_gradient_s_size_over_its_largest() -> None:
    x = torch.tensor([[[[1.0, -4.0], [0.0, 2.0]]], [[[0.5, 0.5], [0.5, -0.5]]]])
    with torch.no_grad():  # as the comparison asks
        found = Saliency(reward=Square(), floor=0.2)(seen(x))
    raw = 0.2 + 0.8 * torch.tensor([[0.25, 1.0], [0.0, 0.5]])
    torch.testing.assert_close(found[0, 0], raw / raw.mean())
    assert torch.equal(found[1], torch.ones(1, 2, 2))
    one = Saliency(reward=Corner(), floor=0.0)(seen(x))
    assert torch.equal(one[:, 0], torch.tensor([[4.0, 0.0], [0.0, 0.0]]).expand(2, 2, 2))
    colours = noise(0, (5, 3, 4, 4))
    found = Saliency(reward=Square())(seen(colours))
    assert found.shape == (5, 1, 4, 4)
    torch.testing.assert_close(found.flatten(1).mean(1), torch.ones(5))
    assert torch.equal(Saliency(reward=Brightness(), floor=0.0)(seen(colours)), 0 * found + 1)
    flat = Saliency(reward=Square(), floor=0.0)(seen(torch.zeros(2, 1, 2, 2)))
    assert torch.equal(flat, torch.ones(2, 1, 2, 2))


def test_a_weight_of_a_sample_multiplies_an_implicit_cost_s_gradient() -> None:
    """A clipped weight that is 2 for all."""
    twice = [{"kind": "reward", "reward": "brightness", "beta": 1.0, "centre": -99.0, "high": 2.0}]
    made = [make("sim", mlp_teacher(), weights=weights) for weights in ([], twice)]
    run(made[0], 0, 2)
    made[1].load_state(2, *saved(made[0]))
    for a, b in zip(*(turn_gradients(one, 2)[0] for one in made), strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("method", ["sim", "sid", "sida", "uni_instruct"])
def test_saliency_multiplies_the_entries_of_an_implicit_gradient(method) -> None:
    """That in the image, with the head's part of it."""
    keys = {"batch_size": 4} | ({"adversary": {"from_step": 0}} if method == "sida" else {})
    plain, flat, corner = (
        make(method, dit_teacher(), weights=weights, **keys)
        for weights in ([], OFF[1:], [{"kind": "saliency", "reward": CORNER, "floor": 0.25}])
    )
    run(plain, 0, 6)
    for one in (flat, corner):
        one.load_state(6, *saved(plain))
    x = noise(1, (4, *plain.teacher.sample_shape))
    found = []
    for one in (plain, flat, corner):
        one.turns(6)
        leaf = x.clone().requires_grad_()
        made = Sample(leaf, 0.0, leaf)
        loss = one.compare(made, batch_of(one, 6), Rng(0).at(6)).value
        found += torch.autograd.grad(loss, leaf)
    assert torch.equal(found[0], found[1])
    share = torch.full(x.shape, 0.25)
    share[:, 0, 0, 0] = 1.0
    torch.testing.assert_close(found[2], found[0] * share / share[0].mean())
    assert float(found[0].abs().max()) > 0
    run(corner, 6, 8)


# As SwiftBrush v2's term ---------------------------------------------------------------------


def student_gradient(made: Trainer, step: int = 2) -> Tensor:
    """Of the student's turn, as one vector."""
    return torch.cat([grad.flatten() for grad in turn_gradients(made, step)[0]])


def swiftbrush(state: Any = None, **alignment: Any) -> Trainer:
    """A trainer at step 2, with the term if it has settings."""
    terms = [{"kind": "clamped", **alignment}] if alignment else []
    made = make("swiftbrush", mlp_teacher(), terms=terms)
    made.load_state(2, *state) if state else run(made, 0, 2)
    return made


def test_the_clamped_term_pulls_towards_the_reward_up_to_its_threshold() -> None:
    bare = swiftbrush()
    state, parts = saved(bare), {"reward": "brightness", "weight": 0.7}
    plain = student_gradient(bare)
    met = swiftbrush(state, **parts, threshold=-50.0)
    assert torch.equal(student_gradient(met), plain)
    short = swiftbrush(state, **parts, threshold=50.0)
    player = bare.players["student"]
    with player.turn():
        made = bare.generate(batch_of(bare, 2), Rng(0).at(2, 0), exact=False)
        (-0.7 * made.x.mean()).backward()
    pulled = torch.cat([param.grad.flatten() for param in player.params])
    torch.testing.assert_close(student_gradient(short), plain + pulled, rtol=1e-4, atol=1e-6)


def test_the_clamped_term_can_be_reached_and_is_logged() -> None:
    keys = {"steps": 150, "optim": {"lr": 0.02}}
    term = {"kind": "clamped", "reward": "brightness", "threshold": 0.8, "weight": 50.0}
    made = make("swiftbrush", mlp_teacher(), terms=[term], **keys)
    logs = [made.step(step, batch_of(made, step)) for step in range(150)]
    first, last = (float(rows["student/term_clamped"]) for rows in (logs[0], logs[-1]))
    assert first > 15 and last < 0.3 * first


# A user's own --------------------------------------------------------------------------------

OWN = """
from stepdistill.losses.reward import Reward


class Dark(Reward):
    \"\"\"How dark an image is.\"\"\"

    by: float = 1.0

    def __call__(self, x, label):
        return -self.by * x.flatten(1).mean(dim=1)
"""


def test_a_reward_of_a_user_s_own_file(tmp_path: Path) -> None:
    file = tmp_path / "dark.py"
    file.write_text(OWN)
    assert OWN.count("\n") <= 13
    kind = f"{file}:Dark"
    weight = {"kind": "reward", "reward": {"kind": kind, "by": 3.0}, "high": 9.0, "low": 0.01}
    made = make("dmd", mlp_teacher(), weights=[weight])
    x = noise(0, (4, 4))
    found = made.config.weights[0](seen(x)).flatten()
    torch.testing.assert_close(found, (-3 * x.mean(1)).exp().clamp(0.01, 9.0))
    assert made.config.weights[0].reward.kind == kind
    run(made, 0, 2)


@pytest.mark.parametrize(
    ("reward", "slope", "message"),
    [
        (Wide(), False, r"gives values of shape \[3, 4\] for 3 samples; give one number a sample"),
        (Held(), True, "has no gradient in the image"),
        (DigitsClass(), False, "sees 1x8x8 images of a class, not 4 without classes"),
    ],
)
def test_a_reward_that_does_not_fit_is_told_in_one_line(reward, slope, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        rewards(reward, noise(0, (3, 4)).requires_grad_(), None, slope=slope)
    assert "\n" not in str(caught.value)


def test_the_digits_reward_knows_a_digit_and_trains_nothing() -> None:
    images, labels = open_digits().load(list(range(200)))
    right = DigitsClass()(images, labels)
    wrong = DigitsClass()(images, (labels + 1) % 10)
    assert right.shape == (200,) and float(right.max()) < 0
    assert float(right.mean()) > -0.3 and float(wrong.mean()) < -3
    leaf = images[:3].clone().requires_grad_()
    value = rewards(DigitsClass(), leaf, labels[:3], slope=True)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    assert float(slope.abs().sum()) > 0
