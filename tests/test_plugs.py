"""Plug-ins: how a config names small classes, ours or those of a user's file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stepdistill.losses.adversarial import AdversarialLoss
from stepdistill.losses.consistency import PairWeight
from stepdistill.losses.distance import Distance, Power, PseudoHuber
from stepdistill.losses.divergence import Divergence, Jeffreys
from stepdistill.losses.gap import MeanAbs, Weight
from stepdistill.losses.guides import Guide
from stepdistill.losses.heads import HeadPlug
from stepdistill.losses.transport import Transport
from stepdistill.run.config import digest, dump, read, validate
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plug, kind_of, kinds, made
from stepdistill.trainers.find import trainer
from tests.helpers import batch_of, make, mlp_teacher, run

FAMILIES = (AdversarialLoss, Distance, Divergence, Guide, HeadPlug, PairWeight, Transport, Weight)
USER = '''
from __future__ import annotations

from typing import Literal

from pydantic import Field

from stepdistill.losses.distance import Distance
from stepdistill.losses.divergence import Divergence


class LogCosh(Distance):
    width: float = Field(1.0, gt=0)

    def __call__(self, y):
        return (self.width * (y / self.width).cosh().log()).flatten(1).sum(dim=1)


class Mixed(Divergence):
    share: float = 0.4
    side: Literal["forward", "reverse"] = "forward"

    def weight(self, r):
        a, b = (r, r**0) if self.side == "forward" else (r**0, r)
        return self.share * a + (1 - self.share) * b


class Unfinished(Divergence):
    """Without a weight."""


def weight(r):
    return r
'''
NEEDED = {"run": "unused", "teacher": "unused", "steps": 4, "batch_size": 8}


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A user's file of plug-ins."""
    path = tmp_path / "mine.py"
    path.write_text(USER, encoding="utf-8")
    return path


def config(folder: Path, method: str, *overrides: str, **keys: Any) -> Any:
    """A method's config by way of a YAML file and overrides."""
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump({"method": method, **NEEDED, **keys}), encoding="utf-8")
    return validate(read(str(path), overrides), trainer(method).Config)


def refusal(folder: Path, method: str, *overrides: str, **keys: Any) -> str:
    """The one line that it is refused with."""
    with pytest.raises(UserError) as caught:
        config(folder, method, *overrides, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Names and settings -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_plug_in_of_ours_is_found_by_its_name_and_says_what_it_is(family) -> None:
    found = kinds(family)
    assert found
    for name, cls in found.items():
        assert kind_of(cls) == name == name.lower()
        assert cls.__doc__ and cls.__doc__ != family.__doc__
        for key, field in cls.model_fields.items():
            assert field.description, f"{name}.{key} has no description"
        if all(not field.is_required() for field in cls.model_fields.values()):
            one = made(family, name)
            assert type(one) is cls and one.kind == name
            assert made(family, one) is one and made(family, one.named) == one


def test_names_are_in_snake_case() -> None:
    assert kinds(Divergence).keys() >= {"reverse_kl", "forward_kl", "jensen_shannon", "jeffreys"}
    assert set(kinds(Distance)) == {"pseudo_huber", "huber", "l2", "power"}


def test_a_class_of_tests_is_none_of_ours() -> None:
    class Own(Divergence):
        def weight(self, r: torch.Tensor) -> torch.Tensor:
            return r

    assert "own" not in kinds(Divergence)
    assert Own().kind == "own"


def test_a_name_or_a_kind_with_settings(tmp_path) -> None:
    assert config(tmp_path, "sim").distance == PseudoHuber()
    assert config(tmp_path, "sim", distance="power").distance == Power()
    given = config(tmp_path, "sim", distance={"kind": "power", "p": 3})
    assert given.distance == Power(p=3.0)
    listed = config(tmp_path, "sid", weights=["kl", {"kind": "mean_abs", "floor": 0.1}])
    assert [one.kind for one in listed.weights] == ["kl", "mean_abs"]
    assert listed.weights[1] == MeanAbs(floor=0.1)


def test_plug_ins_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Power().p = 2.0  # type: ignore[misc]


def test_overrides_name_another_or_change_a_setting(tmp_path) -> None:
    """Another kind drops the settings of the old one; the same kind keeps them."""
    kept = {"divergence": "forward_kl"}
    assert config(tmp_path, "uni_instruct", "divergence=jeffreys", **kept).divergence == Jeffreys()
    found = config(tmp_path, "uni_instruct", "divergence.kind=jeffreys", **kept)
    assert found.divergence == Jeffreys()
    power = {"distance": {"kind": "power", "p": 3}}
    assert config(tmp_path, "sim", "distance.p=1.5", **power).distance == Power(p=1.5)
    assert config(tmp_path, "sim", "distance.kind=pseudo_huber", **power).distance == PseudoHuber()
    both = config(tmp_path, "sim", "distance={kind: pseudo_huber, scale: 0.5}", **power)
    assert both.distance == PseudoHuber(scale=0.5)


# What is refused, in one line ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("jefreys", "kind jefreys is unknown; did you mean jeffreys?"),
        ("nonsense", "kind nonsense is unknown; known are reverse_kl, forward_kl"),
        ({"kind": "jeffreys", "share": 1}, "jeffreys: share: unknown key; known are none"),
        ({"share": 1}, "must name a kind; known are reverse_kl"),
        ({"kind": 3}, "must name a kind"),
        (3, "must name a kind"),
        ([], "must name a kind"),
        (None, "must name a kind"),
        ("nowhere.py:Mixed", "nowhere.py: no such file; give its path from where you are"),
        (f"{__file__[:-4]}.py:Mixed", f"no such file; did you mean {__file__}?"),
        ("no_such_module:Mixed", "no_such_module: cannot be imported: ModuleNotFoundError"),
        ("stepdistill.losses.gap:Kl", "has no class Kl derived from Divergence"),
        ("stepdistill.losses.divergence:Divergence", "Divergence does not say weight"),
    ],
)
def test_what_names_no_plug_in_is_refused(value, message, tmp_path) -> None:
    line = refusal(tmp_path, "uni_instruct", divergence=value)
    place = f"{tmp_path / 'uni_instruct.yaml'}:1: divergence="  # keys are written sorted
    assert message in line, line
    assert "divergence=" in line and line.startswith(place[: len(str(tmp_path))])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"kind": "power", "p": 0.5}, "power: p: input should be greater than or equal to 1"),
        ({"kind": "power", "p": "much"}, "power: p: input should be a valid number"),
        ({"kind": "power", "q": 1}, "power: q: unknown key; known are p"),
        ({"kind": "power", "p": float("nan")}, "power: p: input should be a finite number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(value, message, tmp_path) -> None:
    assert message in refusal(tmp_path, "sim", distance=value)


def test_the_place_of_what_is_wrong_is_told(tmp_path) -> None:
    line = refusal(tmp_path, "sim", "distance=powr")
    assert line.startswith("override distance=powr: distance='powr': kind powr is unknown;")
    line = refusal(tmp_path, "sid", "weights=[kl, mean]")
    assert line.startswith("override weights=[kl, mean]: weights.1='mean': kind mean is unknown;")


# A user's own -------------------------------------------------------------------------------------


def test_a_user_s_class_is_named_by_its_file(user, tmp_path, monkeypatch) -> None:
    """By a path, relative or not, or by its module; with settings, under postponed annotations."""
    found = config(tmp_path, "uni_instruct", divergence=f"{user}:Mixed").divergence
    assert found.kind == f"{user}:Mixed" and found.share == 0.4
    r = torch.tensor([0.5, 2.0])
    torch.testing.assert_close(found.weight(r), 0.4 * r + 0.6)
    torch.testing.assert_close(found.rest(r), torch.full((2,), 0.6))  # F - r F'
    monkeypatch.chdir(user.parent)
    beside = config(
        tmp_path, "uni_instruct", divergence={"kind": "mine.py:Mixed", "side": "reverse"}
    ).divergence
    assert type(beside) is type(found) and beside.kind == "mine.py:Mixed"
    monkeypatch.syspath_prepend(str(user.parent))
    assert (
        config(tmp_path, "sim", distance={"kind": "mine:LogCosh", "width": 2}).distance.width == 2
    )


def test_a_file_that_changed_is_read_anew(user) -> None:
    first = made(Divergence, f"{user}:Mixed")
    assert type(made(Divergence, f"{user}:Mixed")) is type(first)
    user.write_text(USER.replace("0.4", "0.7"), encoding="utf-8")
    os.utime(user, ns=(1, 1))
    assert made(Divergence, f"{user}:Mixed").share == 0.7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Mixd", "mine.py has no class Mixd derived from Divergence"),
        ("LogCosh", "mine.py has no class LogCosh derived from Divergence"),
        ("weight", "mine.py has no class weight derived from Divergence"),
        ("Unfinished", "Unfinished does not say weight"),
    ],
)
def test_classes_that_are_missing_are_told(user, name, message, tmp_path) -> None:
    assert message in refusal(tmp_path, "uni_instruct", divergence=f"{user}:{name}")


def test_a_user_s_settings_are_checked_like_ours(user, tmp_path) -> None:
    wrong = {"kind": f"{user}:LogCosh", "width": -1}
    line = refusal(tmp_path, "sim", distance=wrong)
    assert f"{user}:LogCosh: width: input should be greater than 0" in line
    wrong = {"kind": f"{user}:LogCosh", "wdth": 1}
    assert "wdth: unknown key; known are width" in refusal(tmp_path, "sim", distance=wrong)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Mixed(", "cannot be imported: SyntaxError"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("raise ValueError('{a}\\nb')", "cannot be imported: ValueError: (a) b"),
    ],
)
def test_a_broken_file_is_told_in_one_line_and_leaves_nothing(
    text, message, user, tmp_path
) -> None:
    user.write_text(text, encoding="utf-8")
    for _ in range(2):  # not a half-made module the second time
        assert message in refusal(tmp_path, "uni_instruct", divergence=f"{user}:Mixed")
    user.write_text(USER, encoding="utf-8")
    assert made(Divergence, f"{user}:Mixed").share == 0.4


# Round trips --------------------------------------------------------------------------------------


def cases(user: Path) -> list[tuple[str, dict[str, Any]]]:
    """Configs with plug-ins of ours, with settings, in lists and sections, and of a user's file."""
    return [
        ("sim", {"distance": "l2"}),
        ("sim", {"distance": {"kind": f"{user}:LogCosh", "width": 0.5}}),
        ("sid", {"weights": ["kl", "mean_abs"], "guide": {"kind": "long_short", "train": 2}}),
        ("uni_instruct", {"divergence": {"kind": f"{user}:Mixed", "share": 0.1}}),
        ("sida", {"adversary": {"head": {"kind": "pooled", "width": 8}}}),
    ]


@pytest.mark.parametrize("place", range(5))
def test_a_resolved_config_reads_as_itself(place, user, tmp_path) -> None:
    """As YAML, as a checkpoint's JSON, and by its hash."""
    method, keys = cases(user)[place]
    found = config(tmp_path, method, **keys)
    again = tmp_path / "resolved.yaml"
    again.write_text(dump(found), encoding="utf-8")
    back = validate(read(str(again)), trainer(method).Config)
    assert back == found and dump(back) == dump(found) and digest(back) == digest(found)
    assert back.model_dump(mode="json") == found.model_dump(mode="json")
    plain = config(tmp_path, method)
    changed = {
        key
        for key, value in found.model_dump(mode="json").items()
        if plain.model_dump(mode="json")[key] != value
    }
    assert changed == set(keys)


def test_a_name_and_its_written_out_form_are_one_config(tmp_path) -> None:
    """So a run goes on from its checkpoint whichever way its file has it."""
    short = config(tmp_path, "sim", distance="pseudo_huber")
    long = config(tmp_path, "sim", distance={"kind": "pseudo_huber", "scale": 0.00054})
    assert digest(short) == digest(long) == digest(config(tmp_path, "sim"))
    assert digest(config(tmp_path, "sim", distance={"kind": "pseudo_huber", "scale": 1})) != digest(
        short
    )


def test_named_plug_in_in_ten_lines_trains(user, tmp_path) -> None:
    """A Distance by d(y) alone and a Divergence by its weight, named in configs, move students."""
    for method, key, place, other in (
        ("sim", "distance", f"{user}:LogCosh", "l2"),
        ("uni_instruct", "divergence", f"{user}:Mixed", "chi_square"),
    ):
        made_by = {}
        for value in (place, other):
            found = config(tmp_path, method, **{key: value})
            trained = trainer(method)(found, mlp_teacher())
            run(trained, 0, 4)
            made_by[value] = trained.denoiser("student").net.leave.weight.clone()
            assert made_by[value].isfinite().all()
        before = mlp_teacher().net.leave.weight
        assert not torch.equal(made_by[place], before)
        assert not torch.equal(made_by[place], made_by[other])


def test_a_run_of_a_user_s_plug_in_goes_on_from_its_checkpoint(user, tmp_path) -> None:
    """As users do it; with another setting of it, or another kind, the checkpoint is refused."""
    from stepdistill import train

    folder = tmp_path / "run"
    keys = [f"run={folder}", "batch_size=4", "checkpoint.every_steps=2", "log.tensorboard=false"]
    keys += ["sample.every_steps=0", "eval.every_steps=0", f"distance={user}:LogCosh"]
    train("sim-digits", [*keys, "steps=2"])
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["distance"] == {"kind": f"{user}:LogCosh", "width": 1.0}
    for changed in (f"distance={{kind: '{user}:LogCosh', width: 2}}", "distance=l2"):
        with pytest.raises(UserError, match=r"other settings: distance\.(width|kind)="):
            train("sim-digits", [*keys, changed, "steps=3", "resume=auto"])
    train("sim-digits", [*keys, "steps=3", "resume=auto"])
    assert (folder / "checkpoints" / "step-0000003").is_dir()


def test_a_plug_in_is_a_model_of_its_settings() -> None:
    assert Power(p=2.0).named == {"kind": "power", "p": 2.0}
    assert isinstance(Power(), Plug)
    with pytest.raises(ValueError, match="extra"):
        Power(q=1)


def test_training_sees_the_settings(tmp_path) -> None:
    """Not only the config: two powers give two gradients."""
    found = []
    for p in (1.0, 3.0):
        trained = make("sim", mlp_teacher(), distance={"kind": "power", "p": p})
        run(trained, 0, 1)
        found.append(trained.step(1, batch_of(trained, 1))["student/grad_norm"])
    assert found[0] != found[1]
