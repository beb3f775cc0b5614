"""Settings that contradict each other, or would have no effect, are refused by name."""

from __future__ import annotations

import pytest
import torch

from stepdistill.commands.read import read_config
from stepdistill.commands.train import never_warm, train
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import RF
from stepdistill.diffusion.timesteps import LogitNormal, Uniform
from stepdistill.losses.guides import Spread
from stepdistill.run.config import CONFIGS
from stepdistill.run.errors import UserError
from stepdistill.trainers.onpolicy import opd
from stepdistill.trainers.score.opponent import label_rows
from tests.helpers import batch_of, dit_teacher, make, mlp_teacher, run, small_mlp
from tests.test_msd import SMALL

PAIRED = {"regression": {"pairs": {"num": 8}}}
REFUSED = [
    ("sida", {}, "adversary.from_step=100: the head would take part in none of steps=6"),
    ("f_distill", {"adversary": {"from_step": 6}}, "adversary.from_step=6"),
    ("dmd", {"guide": {"kind": "spread"}, "guidance": 7}, "guidance=7: guide=spread has scales"),
    ("dmd", {**PAIRED, "guide": "both", "guidance": 2}, "guidance=2: pairs are of the guided law"),
    ("dmd2", {"adversary": {"features": "state", "taps": ["x"]}}, "adversary.taps: features=state"),
    ("ladd", {"adversary": {"features": "state", "taps": ["x"]}}, "adversary.taps: features=state"),
    ("msd", {"students": 2, "guide": "both", "guidance": 2}, "guide: both asks each student's"),
    ("phased_dmd", {"critic_weight": "none"}, "critic_weight=none: the fake score's targets"),
    ("add", {"distil": {"weight": 0}, "guidance": 2}, "guidance: add does not ask the teacher"),
    ("crd", {"reference": 0, "guidance": 2}, "guidance: with reference=0 the teacher is not asked"),
    (
        "flash_dmd",
        {"preference": {"reward": "brightness", "from_step": 6}, "noise": "fresh"},
        "preference.from_step=6: preferences would take part in none of steps=6",
    ),
]


@pytest.mark.parametrize(("method", "keys", "line"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_contradicts_itself_is_refused(method, keys, line) -> None:
    with pytest.raises(UserError) as caught:
        make(method, mlp_teacher(), **keys)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize("method", ["dmd2", "ladd"])
def test_a_head_on_frozen_features_has_weights(method) -> None:
    """Else nothing of the discriminator would learn."""
    keys = {"adversary": {"features": "teacher", "head": "channel_mean"}}
    with pytest.raises(UserError, match="^head: channel_mean has no weights of its own"):
        make(method, dit_teacher(), **keys)


def test_labels_are_not_dropped_where_none_means_no_class() -> None:
    known = mlp_teacher()
    teacher = Denoiser(known.net, RF(), "velocity", classes=known.classes)
    with pytest.raises(UserError, match=r"^critic_drop=0\.5: the teacher has no label"):
        make("dmd", teacher, critic_drop=0.5)
    assert make("dmd", teacher, critic_drop=0.0).teacher.null_label is None


def test_a_scale_is_not_drawn_between_bounds_that_cross() -> None:
    with pytest.raises(ValueError, match="must not be below low=6"):
        Spread(low=6)
    assert Spread(low=2).high == 4


def test_a_head_has_a_row_for_a_null_label_further_on() -> None:
    """A network may have more labels than its classes have names."""
    den = Denoiser(small_mlp(num_classes=7), RF(), "velocity", classes=("a", "b"), null_label=7)
    assert label_rows(den) == 8
    keys = {"adversary": {"features": "state"}, "critic_drop": 0.9}
    run(made := make("dmd2", den, **keys), 0, 1)
    assert made.players["critic"].updates == 5


def test_the_fake_score_alone_means_alone() -> None:
    """Also beside preferences, and after the scores of smaller students."""
    keys = {"preference": {"reward": "brightness", "updates": 2}, "noise": "fresh"}
    made = make("flash_dmd", mlp_teacher(), critic_first=3, steps=8, **keys)
    turns = [[turn.player for turn in made.turns(step)] for step in range(4)]
    assert turns[:3] == [["critic", "discriminator"]] * 3
    assert turns[3] == ["student", "critic", "student", "student", "discriminator"]
    assert made.players["student"].total == 5 + 2 * 5


def test_the_fake_score_begins_alone_after_a_small_student_s_scores() -> None:
    """It has seen none of that student's samples before."""
    keys = {"network": {**SMALL, "steps": 2}, "students": 1, "critic_first": 2, "batch_size": 4}
    made = make("msd", dit_teacher(), **keys)
    turns = [{turn.player for turn in made.turns(step)} for step in range(6)]
    assert turns == [{"student"}] * 2 + [{"critic"}] * 2 + [{"student", "critic"}] * 2
    with pytest.raises(UserError, match="^network.steps=2 and critic_first=4 leave one of 1"):
        make("msd", dit_teacher(), **{**keys, "critic_first": 4})


def test_further_teachers_know_the_same_classes(monkeypatch) -> None:
    """Labels are told by number, so that the same names in another order will not do."""
    known = mlp_teacher()
    other = Denoiser(known.net, RF(), "velocity", classes=("c", "a", "b"), null_label=3)
    monkeypatch.setattr(opd, "load_teacher", lambda name: other)
    with pytest.raises(UserError, match="^more_teachers: other has the classes c, a, b, the"):
        make("opd", mlp_teacher(), more_teachers=("other",), routes={"a": 1})


def test_stages_that_are_parts_of_all_steps_hold_a_resumed_run_to_them() -> None:
    assert make("disback", mlp_teacher(), steps=60).kept == ("steps",)
    keys = {"record_every": 2, "interval": 4}
    assert make("disback", mlp_teacher(), steps=60, **keys).kept == ()


def test_what_is_not_asked_costs_nothing() -> None:
    made = make("crd", mlp_teacher(), reference=0, batch_size=8)
    assert "teacher" not in {one.role for one in made.passes()}
    asked: list[int] = []
    made.teacher.net.register_forward_hook(lambda *_: asked.append(1))
    logs = made.step(0, batch_of(made, 0))
    assert not asked and "student/regression" in logs and "student/gap" not in logs


def test_a_density_keeps_its_law_below_the_start_of_the_students() -> None:
    """What is noisier is left out; the rest is as it was, and not drawn together."""
    u, density = torch.linspace(0.001, 0.999, 999).double(), LogitNormal(mean=-1.2, std=1.2)
    made = make("dmd", mlp_teacher(), start=0.75)
    t = made.drawn(density, u)
    whole = density.sample(u, RF())
    kept = whole[whole <= 0.75]
    assert float(t.max()) <= 0.75 and len(kept) < len(whole)
    grid = torch.linspace(0.02, 0.98, 49).double()
    torch.testing.assert_close(t.quantile(grid), kept.quantile(grid), atol=2e-3, rtol=0)
    with pytest.raises(UserError, match=r"^start=0\.75: nothing noisier than the time 0\.75"):
        made.drawn(Uniform(low=0.8), u)


SAID = [
    ("scm-digits", ("derivative=jvp",), "difference_step: does nothing with derivative=jvp"),
    ("scm-digits", ("normal=clamp", "norm_floor=1"), "norm_floor: does nothing with normal=clamp"),
    ("mean_flow-digits", ("power=0", "power_floor=1"), "power_floor: does nothing with power=0"),
    ("tlcm-digits", ("states=data", "walk_steps=9"), "walk_steps: does nothing with states=data"),
    (
        "consistency-digits",
        ("target_decay=0.9",),
        "target_decay: does nothing with target=stop_gradient",
    ),
    (
        "consistency-digits",
        ("guidance=3", "guidance_range=[1,3]"),
        "guidance: does nothing with a guidance_range that is not told",
    ),
    (
        "hyper_sd-digits",
        ("discriminator.lr=1e-3",),
        "discriminator: does nothing with adversary=null",
    ),
    (
        "flow_map-digits",
        ("form=psd_m", "gradient=semi"),
        "gradient: does nothing with form=psd_m",
    ),
    (
        "hyper_sd-digits",
        ("student_steps=4", "adversary={student: 0.1}"),
        "adversary: does nothing in stages of 4 segments and more",
    ),
]


def test_a_rate_that_never_comes_to_its_own_is_said() -> None:
    """Of each player, by the updates that its schedule spans: of stages, the present one's."""
    optim = {"warmup_steps": 100, "lr": 1e-3}
    made = make("consistency", mlp_teacher(), steps=50, optim=optim)
    line = "student: of warmup_steps=100 it makes 50, so that its learning rate comes to 50% of lr="
    assert never_warm(made) == [f"{line}0.001"]
    assert never_warm(make("consistency", mlp_teacher(), steps=100, optim=optim)) == []
    keys = {"pairs": {"kind": "ect", "stages": 2}, "steps": 120, "optim": optim}
    assert "it makes 60" in never_warm(make("tcm", mlp_teacher(), **keys))[0]
    critic = make("sim", mlp_teacher(), steps=20, critic={"warmup_steps": 500})
    assert [one.partition(":")[0] for one in never_warm(critic)] == ["critic"]


@pytest.mark.parametrize(("config", "keys", "line"), SAID, ids=lambda v: str(v)[:40])
def test_a_value_that_does_nothing_beside_another_is_said(config, keys, line) -> None:
    """And not refused: configs hold values for choices that one may try others of."""
    assert line in read_config(config, keys)[1].without_effect()
    assert line not in read_config(config)[1].without_effect()


def test_a_training_says_what_does_nothing(tmp_path, capsys) -> None:
    own = [f"run={tmp_path / 'run'}", "steps=1", "batch_size=4", "power_floor=1", "power=0"]
    train("mean_flow-digits", own)
    assert "power_floor: does nothing with power=0" in capsys.readouterr().err


def test_what_is_shipped_has_no_value_that_does_nothing() -> None:
    for path in CONFIGS.glob("*.yaml"):
        assert read_config(str(path))[1].without_effect() == [], path.name
