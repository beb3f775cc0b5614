"""DMD's regression on pairs of noise and the teacher's image, beside its matching."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.commands.pairs import pairs
from stepdistill.commands.train import train
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import RF
from stepdistill.diffusion.sampler import sample
from stepdistill.diffusion.timesteps import uniform_grid
from stepdistill.losses.gap import Seen, Weight
from stepdistill.oracles.denoiser import Oracle
from stepdistill.run.errors import UserError
from stepdistill.run.log import read_rows
from stepdistill.run.player import Player
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.score.dmd import DMDConfig
from tests.helpers import MEAN, STD, Affine, AffineAdapter, batch_of, make, mlp_teacher, noise
from tests.recipes import command

WALK = 64  # the teacher's steps for a pair


class Nothing(Weight):
    """No matching at all."""

    def __call__(self, seen: Seen) -> Tensor:
        """0 everywhere."""
        return torch.zeros_like(seen.x)


def affine(u: float, **keys: Any) -> tuple[Trainer, Affine]:
    """A trainer on 16 coordinates of N(0.5, 1.3^2) with the student u z."""
    teacher = Oracle(RF(), "velocity", torch.full((1, 16), MEAN), STD)
    optim = {"lr": 0.05, "betas": (0.5, 0.99), "decay": "cosine"}
    keys = {"regression": {"metric": "l2"}, "steps": 400, "batch_size": 32, **keys}
    made = make("dmd", teacher, optim=optim, **keys)
    student = Denoiser(Affine(0.0, u, 16), RF(), "x0", adapter=AffineAdapter())
    made.players["student"] = Player("student", student, made.config.optim, total=200)
    return made, student.net


@pytest.mark.parametrize("metric", ["l2", {"kind": "pseudo_huber", "scale": 0.1}])
def test_alone_it_leads_a_linear_student_to_the_teacher_s_map(metric) -> None:
    """From the wrong sign of the slope, which matching would leave as it is. The map is
    m + S z; Euler's steps of angles phi shrink S by the product of cos(phi_t - phi_r)."""
    made, student = affine(-0.5, weights=(Nothing(),), regression={"metric": metric})
    grid = uniform_grid(RF(), WALK)
    for step in range(200):
        z = Rng(3).at(step).normal("z", torch.arange(32), (16,))
        x = sample(made.teacher, z, grid, Cond(None))
        with made.players["student"].turn():
            batch, rng = made.batch(step, x=x, z=z), Rng(0).at(step)
            made.student_loss(batch, rng).value.backward()
            made.players["student"].step()
    phi = [math.atan2(t, (1 - t) * STD) for t in grid]
    bias = math.prod(math.cos(a - b) for a, b in zip(phi, phi[1:], strict=False))
    assert 0.97 < bias < 0.99
    assert (float(student.mu), float(student.u)) == pytest.approx((MEAN, STD * bias), abs=2e-3)


def test_its_gradient_is_added_to_that_of_the_matching() -> None:
    """weight times that of the distance, in the same turn and on the same labels."""
    keys = {"batch_size": 4, "steps": 6}
    both = make("dmd", mlp_teacher(), regression={"weight": 0.7}, **keys)
    plain = make("dmd", mlp_teacher(), **keys)
    assert (both.needs, plain.needs) == ("pairs", "labels")
    with torch.no_grad():
        for made in (both, plain):  # a fake score that is not the teacher, so that matching pulls
            for param in made.players["critic"].params:
                param.mul_(1.1)
    batch, found = batch_of(both, 0), []
    for made in (both, plain):
        with made.players["student"].turn():
            loss = made.student_loss(batch, Rng(0).at(0, 0))
            grads = torch.autograd.grad(loss.value, made.players["student"].params)
        found.append((loss, torch.cat([grad.flatten() for grad in grads])))
    (loss, grad), (matched, matched_grad) = found
    with both.players["student"].turn() as student:
        x = student(batch.z, torch.ones(4), batch.cond).x
        distance = (x - batch.x).square().sum(dim=1).mean()
        grads = torch.autograd.grad(distance, both.players["student"].params)
    alone = torch.cat([one.flatten() for one in grads])
    torch.testing.assert_close(loss.value, matched.value + 0.7 * distance)
    torch.testing.assert_close(grad, matched_grad + 0.7 * alone)
    assert matched_grad.norm() > 0 and alone.norm() > 0
    assert loss.logs.keys() - matched.logs.keys() == {"regression"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"student_steps": 2}, "student_steps=2: regression is for one-step students; set"),
        ({"start": 0.9}, "start=0.9: regression is on pairs from pure noise; set start=1"),
        ({"adversary": {"features": "state", "head": "mlp"}}, "adversary: a batch holds data or"),
    ],
)
def test_what_does_not_go_with_it_is_refused(keys, message) -> None:
    with pytest.raises(UserError, match=message):
        make("dmd", mlp_teacher(), regression={}, **keys)
    make("dmd", mlp_teacher(), **keys)


@pytest.mark.parametrize("metric", ["lpips", {"kind": "lpips"}])
def test_lpips_is_told_what_it_lacks(metric) -> None:
    with pytest.raises(ValueError, match="lpips|needs a pretrained network"):
        DMDConfig(method="dmd", run="r", teacher="t", steps=1, regression={"metric": metric})


def test_a_run_makes_its_pairs_and_regresses_on_them(tmp_path, monkeypatch) -> None:
    """As `stepdistill pairs` does ahead; without the regression there are none to make."""
    monkeypatch.chdir(tmp_path)
    _, name, *args = command("dmd", "own")
    keys = [f"regression.pairs.{key}" for key in ("num=20", "steps=2", "shard=16")]
    run = train(name, [*args, *keys, "steps=2", "batch_size=4"])
    assert len(list(run.glob("pairs/pairs-*.safetensors"))) == 2
    losses = [row["losses"]["student/regression"] for row in read_rows(run)]
    assert all(value > 0 for value in losses) and losses[0] != losses[1]
    folder = pairs(name, [*args, *keys, "run=other"])
    for path in sorted(folder.glob("pairs-*")):
        assert path.read_bytes() == (Path("own/pairs") / path.name).read_bytes()
    with pytest.raises(UserError, match="uses no pairs; reflow does, or set regression"):
        pairs(name, args)


def test_pairs_of_another_sign_are_not_what_matching_sees() -> None:
    """Matching alone keeps a slope's sign; with regression it turns over."""
    slopes = {}
    for weight in (None, 1.0):
        regression = None if weight is None else {"weight": weight}
        made, student = affine(-0.5, regression=regression)
        fake = made.teacher.clone()
        made.players["critic"] = Player("critic", fake, made.config.critic, total=1)
        for step in range(200):
            with torch.no_grad():  # an exact fake score
                fake.net.means.fill_(float(student.mu))
                fake.net.stds.fill_(abs(float(student.u)))
            z = noise(step, (32, 16))
            with made.players["student"].turn():
                batch = made.batch(step, x=MEAN + STD * z, z=z)
                made.student_loss(batch, Rng(0).at(step)).value.backward()
                made.players["student"].step()
        slopes[weight] = float(student.u)
    assert slopes[None] == pytest.approx(-STD, abs=0.03)
    assert slopes[1.0] == pytest.approx(STD, abs=0.03)
