"""Guidance of a range: the teacher is asked by the scale that the student is told."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from tests.helpers import batch_of, dit_teacher, make, mlp_teacher, run, same, saved

KEYS = {"guidance": 2.0, "guidance_range": (1.0, 5.0)}
TOLD = {"embedding": True}
MORE: dict[str, dict[str, Any]] = {
    "flow_map": {},
    "hyper_sd": TOLD | {"end": "told", "pairs": {"kind": "grid", "steps": 16}},
    "lcm": {},
    "mean_flow": {},
    "pcm": TOLD,
    "progressive": {},
    "sana_sprint": {},
    "scm": {},
    "scott": TOLD,
    "tbcm": {"points": 4},
    "tlcm": TOLD,
    "twin_flow": {},
}
TELLING = tuple(MORE)


@pytest.mark.parametrize("method", TELLING)
def test_the_teacher_is_asked_by_what_the_student_is_told(method, monkeypatch) -> None:
    made, seen = make(method, mlp_teacher(), **KEYS, **MORE[method]), []
    places = [*(cls.__module__ for cls in type(made).__mro__), "stepdistill.trainers.solvers"]
    modules = map(importlib.import_module, places)
    module = next(one for one in modules if hasattr(one, "guided"))
    real = module.guided

    def asked(den, x_t, t, cond, scale):
        assert isinstance(scale, Tensor)
        assert torch.allclose(cond.guidance, scale) and len(scale) == len(x_t)
        seen.append(scale)
        return real(den, x_t, t, cond, scale)

    monkeypatch.setattr(module, "guided", asked)
    told: list[Tensor] = []
    student = made.denoiser("student")
    student.register_forward_pre_hook(lambda den, args: told.append(args[2].guidance))
    run(made, 0, 1)
    drawn = set(seen[0].tolist())
    assert len(drawn) > 1 and all(1 <= one <= 5 for one in drawn)
    sets = [set(one.tolist()) for one in told]  # of twin flow's some are of a part of the batch
    assert drawn in sets and all(one <= drawn for one in sets)


def told(made: Trainer, scale: float) -> Tensor:
    """The student's output where it is told a scale."""
    x_t, t, label = torch.ones(4, 1, 8, 8), torch.full((4,), 0.7), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        cond = Cond(label, guidance=torch.full((4,), scale))
        return made.denoiser("student")(x_t, t, cond).h


@pytest.mark.parametrize("method", TELLING)
def test_a_student_heeds_the_scale_once_it_has_learnt(method) -> None:
    """From none to some, and the same after a resume."""
    keys = KEYS | MORE[method]
    made, again = (make(method, dit_teacher(), steps=8, **keys) for _ in range(2))
    assert told(made, 1.0).equal(told(made, 3.0))
    run(made, 0, 4)
    between = saved(made)
    run(made, 4, 8)
    assert not told(made, 1.0).equal(told(made, 3.0))
    again.load_state(4, *between)
    run(again, 4, 8)
    same(made.state(), again.state())


def test_the_points_of_a_walk_share_its_scale() -> None:
    made = make("tbcm", mlp_teacher(), batch_size=8, points=4, **KEYS)
    batch = batch_of(made, 0)
    scale = made.scale(batch, Rng(0).at(0))
    assert torch.equal(scale[:4], scale[:1].expand(4)) and torch.equal(
        scale[4:], scale[4:5].expand(4)
    )
    assert scale[0] != scale[4]


@pytest.mark.parametrize("method", TELLING)
def test_what_cannot_be_told_is_refused(method) -> None:
    for keys, line in (
        ({"guidance": 6.0}, "must begin at 1 or more and hold it"),
        ({"guidance_range": (0.5, 3.0)}, "must begin at 1 or more and hold it"),
        ({"lora": {"rank": 2}}, "lora=null$"),
    ):
        with pytest.raises(UserError, match=line):
            make(method, mlp_teacher(), **KEYS | MORE[method] | keys)


@pytest.mark.parametrize("method", ["tcm", "dcm"])
def test_of_two_networks_none_is_told(method) -> None:
    with pytest.raises(UserError, match="^embedding: exports tell one network its guidance"):
        make(method, mlp_teacher(), **KEYS, **TOLD)


def test_a_mean_flow_that_guides_itself_does_so_by_what_it_is_told() -> None:
    """The target is affine in the scale, as long as the student does not heed it."""
    keys = {"velocity": "data", "guided_times": (0.0, 1.0), "label_drop": 0.0}
    made = make("mean_flow", dit_teacher(), batch_size=8, **keys, **KEYS)
    draw = made.draw_steps(batch_of(made, 3), Rng(0).at(3))
    assert len(set(draw.cond.guidance.tolist())) == 8

    def target(scale: Tensor) -> Tensor:
        return made.field(replace(draw, cond=replace(draw.cond, guidance=scale)))

    one, five = (target(torch.full((8,), float(scale))) for scale in (1, 5))
    share = (draw.cond.guidance - 1)[:, None, None, None] / 4
    assert (one - five).abs().max() > 0.01
    torch.testing.assert_close(target(draw.cond.guidance), torch.lerp(one, five, share))


def test_a_fake_score_is_of_one_law() -> None:
    with pytest.raises(ValidationError, match="guidance_range"):
        make("rcm", mlp_teacher(), **KEYS)
