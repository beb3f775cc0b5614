"""What the trajectory methods do where a config is silent, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from stepdistill.commands.entries import entries_of
from stepdistill.diffusion.derivative import along, drift
from stepdistill.losses.consistency import One
from stepdistill.run.assets import load_teacher
from stepdistill.run.errors import UserError
from tests.helpers import batch_of, dit_teacher, make, mlp_teacher, run


@pytest.mark.parametrize(
    ("pairs", "kept"),
    [
        ({"kind": "ect", "stages": 2}, ("steps",)),
        ({"kind": "ect", "stages": 1}, ()),
        ({"kind": "doubling", "first": 2, "last": 8}, ("steps",)),
        ({"kind": "grid", "steps": 4}, ()),
    ],
)
def test_a_curriculum_s_stages_are_parts_of_the_steps_of_the_run(pairs, kept) -> None:
    """So a resumed run keeps ``steps``: with others it would fall back to an earlier stage."""
    assert make("consistency", mlp_teacher(), pairs=pairs).kept == kept


def test_a_random_step_from_pure_noise_is_refused() -> None:
    solver = {"kind": "sde", "eta": 0.3}
    with pytest.raises(UserError, match="^solver: a random step from pure noise keeps nothing"):
        make("consistency", mlp_teacher(), solver=solver)
    assert make("consistency", mlp_teacher(), solver=solver, start=0.97).top < 1
    assert make("consistency", mlp_teacher(), solver={"kind": "sde", "eta": 0}).top == 1


def test_scott_begins_a_little_below_pure_noise_and_with_heads() -> None:
    made = make("scott", dit_teacher())
    assert made.start == 0.97 and made.rival is not None
    assert make("scott", dit_teacher(), start=0.9).start == 0.9
    assert make("scott", load_teacher("digits-unet")).start < 0.8


@pytest.mark.parametrize("way", ["difference", "upwind", "semi", "central", "jvp"])
def test_derivatives_below_the_first_of_times_stay_finite(way) -> None:
    """A noise predictor's cleanest time is above 0, and densities reach below it."""
    den = load_teacher("digits-unet")
    t = torch.tensor([0.0, den.process.t_min / 5, den.process.t_min])
    x = torch.randn(3, *den.sample_shape, generator=torch.Generator().manual_seed(0))
    cond = batch_of(make("sim", den, batch_size=8), 0).cond.rows(slice(0, 3))
    _, slope = along(den, x, t, cond, torch.ones_like(x), drift, way=way, step=0.02)
    assert bool(torch.isfinite(slope).all()) and float(slope.abs().max()) < 100


def test_scm_warms_up_over_a_tenth_of_the_run() -> None:
    made = make("scm", mlp_teacher(), steps=100)
    assert made.warmup == 10 and made.warmth(0) < 0.1 and made.warmth(10) == 1
    assert make("scm", mlp_teacher(), steps=100, warmup=0).warmth(0) == 1


def test_scm_s_weight_of_times_begins_at_its_optimum() -> None:
    """A tangent of norm near 1 has mean squares of 1 / D, whose best log weight is ln D."""
    made = make("scm", mlp_teacher())
    assert made.weigh is not None
    assert float(made.weigh.line.bias) == pytest.approx(
        math.log(math.prod(made.teacher.sample_shape))
    )
    plain = make("scm", mlp_teacher(), normal="none")
    assert plain.weigh is not None and float(plain.weigh.line.bias) == 0


@pytest.mark.parametrize("method", ["scm", "tbcm", "rcm", "sana_sprint", "pcm", "scott", "dcm"])
def test_defaults_train(method) -> None:
    """A config that names no more than method, teacher and steps."""
    teacher = dit_teacher() if method in ("sana_sprint", "scott") else mlp_teacher()
    made = make(method, teacher, batch_size=128 if method == "tbcm" else 8)
    before = [param.clone() for param in made.players["student"].params]
    run(made, 0, 2)
    after = made.players["student"].params
    assert all(bool(torch.isfinite(param).all()) for param in after)
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["digits-dit", "digits-unet"])
def test_dcm_s_border_is_the_middle_of_its_grid_for_any_teacher(name) -> None:
    made = make("dcm", load_teacher(name), pairs={"kind": "grid", "steps": 8})
    assert made.place == 4 and made.boundary == float(made.span.grid(8)[4])


def test_segments_are_weighed_alike() -> None:
    """With 1 / (t - r) a discriminator's published weight would count as little as an interval."""
    for method in ("pcm", "tlcm", "hyper_sd", "dcm", "scott", "lcm"):
        assert make(method, dit_teacher()).config.weight == One()


@pytest.mark.parametrize(("segments", "own"), [(8, 4), (6, 3), (2, 2), (1, 1), (7, 1)])
def test_tlcm_s_own_steps_divide_its_segments(segments, own) -> None:
    pairs = {"kind": "grid", "steps": segments}
    assert make("tlcm", mlp_teacher(), student_steps=segments, pairs=pairs).own_steps == own


@pytest.mark.parametrize("key", ["kappa", "label_drop", "guided_times"])
def test_mean_flow_refuses_settings_of_guiding_itself(key) -> None:
    value = (0.1, 0.5) if key == "guided_times" else 0.5
    with pytest.raises(UserError, match=f"^{key}: is of students that guide themselves"):
        make("mean_flow", dit_teacher(), **{key: value})


def test_jumps_rest_less_where_the_student_begins_as_the_field() -> None:
    assert make("mean_flow", dit_teacher()).resting == 0.25
    assert make("mean_flow", dit_teacher(), velocity="data").resting == 0.75
    assert make("mean_flow", dit_teacher(), diagonal=0.5).resting == 0.5


def test_who_does_not_take_part_is_told(capsys) -> None:
    entries = entries_of(None, [2], "0", teacher="digits-unet", family="trajectory")
    found = {entry.method for entry in entries}
    assert "dcm" in found and "flash_wam" not in found
    assert "flash_wam-digits is left out: teacher: boundary" in capsys.readouterr().err
