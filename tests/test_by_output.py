"""What is compared of predicted noise counts in units of that noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.denoiser import Denoiser, Prediction
from stepdistill.diffusion.heads import HEADS
from stepdistill.run.assets import load_teacher
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from tests.helpers import batch_of, dit_teacher, make

TIMES = torch.tensor([0.76, 0.7, 0.39, 0.1])
PLAIN = {"normal": "none", "adaptive": False, "derivative": "difference"}
Read = Callable[[Prediction], Tensor]


def motion(den: Denoiser, t: Tensor, read: Read) -> Tensor:
    """How far a reading of predictions at times t goes as the raw output does by one [B]."""
    x_t = torch.zeros(len(t), 1, 8, 8)
    c = den.process.coefs(t).expand(x_t)
    one, two = (read(den.prediction(x_t + said, x_t, c)) for said in (0.0, 0.01))
    return ((two - one).abs() / 0.01).mean(dim=(1, 2, 3)).clamp_min(1)


def moved(den: Denoiser, seed: int) -> None:
    """Change a network a little, so that it is not its copies."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in den.net.parameters():
            param += 0.02 * torch.randn(param.shape, generator=draw)


def outputs(den: Denoiser) -> list[tuple[Tensor, Tensor]]:
    """What a network says from now on where gradients are kept, with its times."""
    found, raw = [], den.raw

    def said(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        h = raw(x_t, t, cond)
        if h.requires_grad:
            h.retain_grad()
            found.append((h, t))
        return h

    den.raw = said  # type: ignore[method-assign]
    return found


def pair(method: str, **keys: Any) -> list[Trainer]:
    """Trainers of a student of digits-unet: plain, and by its output."""
    return [
        make(method, load_teacher("digits-unet"), by_output=own, **keys) for own in (False, None)
    ]


def felt(made: Trainer, role: str, turn: int) -> list[tuple[Tensor, Tensor]]:
    """The length of each sample's gradient in the outputs of a network in a turn, with times."""
    batch, found = batch_of(made, 0), outputs(made.denoiser(role))
    with made.players[role].turn():
        made.turns(0)[turn].loss(batch, Rng(0).at(0)).value.backward()
    return [(h.grad.flatten(1).norm(dim=1), t) for h, t in found if h.grad is not None]


# What a loss feels -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "keys", "power"),
    [
        ("consistency", {"metric": "l2"}, 2),
        ("ect", {"metric": "l2", "solver": "data"}, 2),
        ("scm", PLAIN, 2),
        ("scm", PLAIN | {"normal": "norm"}, 1),
        ("tbcm", PLAIN | {"points": 4}, 2),
        ("mean_flow", {"power": 0.0}, 2),
        ("flow_map", {"form": "psd_m"}, 2),
        ("flow_map", {"form": "lsd", "gradient": "semi"}, 2),
        ("flow_map", {"form": "esd", "gradient": "semi"}, 2),
        ("twin_flow", {"rectify": 0.0, "c": 1e4}, 2),
    ],
)
def test_gradients_in_the_output_are_of_one_unit(method, keys, power) -> None:
    """Plain, they are as large as what is compared moves with the output, to the loss's power."""
    plain, even = pair("consistency" if method == "ect" else method, **keys)
    [(more, t)], [(less, _)] = felt(plain, "student", 0), felt(even, "student", 0)
    read: Read = lambda pred: pred.drift  # noqa: E731
    if method in ("consistency", "ect"):
        read = lambda pred: pred.x  # noqa: E731
    elif method in ("scm", "tbcm"):
        read = even.field
    times = motion(even.teacher, t, read)
    assert float(times.max()) > 2
    torch.testing.assert_close(less * times**power, more, rtol=2e-2, atol=1e-7)


def test_rcm_s_pull_and_fake_score_are_of_one_unit_too() -> None:
    plain, even = pair("rcm", alone=0, warmup=0, own_steps=4)
    for made in (plain, even):
        moved(made.denoiser("critic"), 1)
    (_, (more, at)), (_, (less, _)) = felt(plain, "student", 0), felt(even, "student", 0)
    times = motion(even.teacher, at, lambda pred: pred.x)
    assert float(times.max()) > 2
    torch.testing.assert_close(less * times, more, rtol=2e-2, atol=1e-7)
    [(more, t)], [(less, _)] = felt(plain, "critic", 1), felt(even, "critic", 1)
    times = motion(even.teacher, t, even.field)
    torch.testing.assert_close(less * times**2, more, rtol=2e-2, atol=1e-7)


def test_twin_flow_s_pull_is_of_one_unit_too() -> None:
    found = []
    for made in pair("twin_flow"):
        moved(made.denoiser("student"), 2)
        batch = batch_of(made, 0)
        u = torch.ones_like(batch.x, requires_grad=True)
        made.pull(u, batch.x, batch, Rng(0).at(0)).backward()
        found.append(u.grad)
    times = motion(made.teacher, torch.tensor([made.top]), lambda pred: pred.drift)
    assert float(times) > 10 and bool(found[0].any())
    torch.testing.assert_close(found[1] * times, found[0])


def test_discriminators_feel_estimates_in_one_unit_too() -> None:
    """sana_sprint's, and those beside a distance: same images, gradients by the output."""
    found = []
    for made in pair("sana_sprint"):
        seen = outputs(made.denoiser("student"))
        with made.players["student"].turn():
            made.estimate(batch_of(made, 0), Rng(0).at(0)).sum().backward()
        [(h, t)] = seen
        found.append(h.grad)
    times = motion(made.teacher, t, lambda pred: pred.x)[:, None, None, None]
    assert float(times.max()) > 10
    torch.testing.assert_close(found[1] * times, found[0])
    plain, even = pair("scott")
    x = torch.ones(4, 1, 8, 8, requires_grad=True)
    landing = even.landing(torch.zeros(4))
    assert plain.eased(x, TIMES, landing) is x and even.eased(x, TIMES, landing).equal(x)
    even.eased(x, TIMES, landing).sum().backward()
    times = motion(even.teacher, TIMES, lambda pred: pred.x)
    torch.testing.assert_close(x.grad[:, 0, 0, 0] * times, torch.ones(4))


# The units themselves ----------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "keys"), [("consistency", {}), ("pcm", {"student_steps": 2})])
def test_estimates_count_by_where_they_land(method, keys) -> None:
    plain, even = pair(method, **keys)
    delta, end = torch.ones(4, 1, 8, 8), even.end(TIMES)
    times = motion(even.teacher, TIMES, lambda pred: even.landed(pred, end))
    assert times[0] > 1 == times[-1]
    found = even.evened(delta, TIMES, even.landing(end)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, 1 / times, rtol=1e-3, atol=1e-3)
    assert plain.evened(delta, TIMES, plain.landing(end)) is delta


def test_predicted_images_may_count_so_and_velocities_do_not() -> None:
    with pytest.raises(UserError, match="^by_output: is of predicted noise or images, .* velocity"):
        make("consistency", dit_teacher(), by_output=True)
    teacher = load_teacher("digits-unet")
    plain = make("mean_flow", teacher)
    plain.teacher.head = HEADS["x0"]
    delta = torch.ones(4, 1, 8, 8)
    assert plain.by_drift(delta, TIMES) is delta
    plain.config.by_output = True
    c = teacher.process.coefs(TIMES)
    expected = 1 / ((c.alpha + c.sigma) / c.sigma).clamp_min(1)
    torch.testing.assert_close(plain.by_drift(delta, TIMES)[:, 0, 0, 0], expected)
