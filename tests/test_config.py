"""Config files: what they inherit, what overrides change, and errors that name place and mend."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from stepdistill.commands.methods import schema
from stepdistill.commands.read import read_config
from stepdistill.run import config as configs
from stepdistill.run.config import CONFIGS, differences, digest, dump, find, read, validate
from stepdistill.run.errors import UserError
from stepdistill.trainers.find import methods
from stepdistill.trainers.settings import TrainConfig

KEYS = (  # that scripts rely on
    "run seed steps batch_size teacher data optim.lr ema.decay log.every_steps sample.every_steps"
    " checkpoint.every_steps checkpoint.keep resume data.on_error"
).split()
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
PAPERS = ("snoopi", "stream_r1", "sid_lsg", "ict", "ect", "rfpp", "instaflow")
NAMED = {f"{name}-digits{teacher}": name for name in PAPERS for teacher in ("", "-unet")}
"""Configs of papers that are settings of another method."""
METHODS = [method.name for method in methods()]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Optim(Section):
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)


class Circle(Section):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


class Square(Section):
    kind: Literal["square"] = "square"
    side: float = 1.0
    optim: Optim = Optim()


class Model(Section):
    steps: int = Field(ge=1)
    optim: Optim = Optim()
    shape: Annotated[Circle | Square, Field(discriminator="kind")] = Circle()
    size: int | None = None


def write(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def message(name: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        validate(read(name, overrides), Model)
    text = str(caught.value)
    assert "\n" not in text
    return text


# What a config says -------------------------------------------------------------------------------


def test_later_values_win_and_sections_are_merged(tmp_path) -> None:
    write(tmp_path, "oldest", "steps: 1\noptim: {lr: 0.1, betas: [0, 0]}\nsize: 3\n")
    write(tmp_path, "base", "extends: oldest\noptim:\n  lr: 0.2\n")
    name = write(tmp_path, "child", "extends: base.yaml\nsteps: 7\nsize: null\n")
    got = validate(read(name, ["optim.betas=[0.5, 0.6]", "steps=8", "steps=9"]), Model)
    assert got == Model(steps=9, optim=Optim(lr=0.2, betas=(0.5, 0.6)), size=None)


def test_another_kind_replaces_the_section(tmp_path) -> None:
    name = write(tmp_path, "a", "steps: 1\nshape: {kind: circle, radius: 5}\n")
    assert validate(read(name, ["shape.kind=square", "shape.side=2"]), Model).shape == Square(
        side=2
    )
    assert validate(read(name, ["shape.kind=circle"]), Model).shape == Circle(radius=5)


def test_numbers_as_people_write_them(tmp_path) -> None:
    """YAML 1.1 takes 3e-4 for a string; the model takes the string for a number."""
    name = write(tmp_path, "a", "steps: 1\noptim: {lr: 3e-4}\n")
    assert validate(read(name), Model).optim.lr == 3e-4
    assert validate(read(name, ["optim.lr=1e-5"]), Model).optim.lr == 1e-5


def test_a_config_is_found_by_path_by_name_and_as_if_in_the_repository(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    installed = CONFIGS / "sim-digits.yaml"
    assert find("sim-digits") == find("sim-digits.yaml") == find("configs/sim-digits") == installed
    (tmp_path / "sim-digits.yaml").write_text("steps: 1\n")
    assert find("sim-digits.yaml") == Path("sim-digits.yaml")
    with pytest.raises(UserError, match="elsewhere/sim-digits: no such file; did you mean sim-dig"):
        find("elsewhere/sim-digits")
    with pytest.raises(UserError, match=f"qqq: no such file; installed are {', '.join(NAMES)}"):
        find("qqq")
    with pytest.raises(UserError, match=r"^config scm: no such file; did you mean scm-digits\?$"):
        find("scm")


# What is wrong, where, and what mends it ---------------------------------------------------------


def test_an_unknown_key_is_told_with_its_line_and_the_closest_one(tmp_path) -> None:
    name = write(tmp_path, "a", "steps: 1\n\noptim:\n  betas: [0, 0]\n  lrr: 0.1\n")
    assert message(name) == f"{name}:5: unknown key optim.lrr; did you mean optim.lr?"
    name = write(tmp_path, "a", "steps: 1\nstep: 2\n")
    assert message(name) == f"{name}:2: unknown key step; did you mean steps?"
    name = write(tmp_path, "a", "steps: 1\nlr: 2\n")  # known one section deeper
    assert message(name) == f"{name}:2: unknown key lr; did you mean optim.lr?"
    name = write(tmp_path, "a", "steps: 1\nside: 2\n")
    assert message(name) == f"{name}:2: unknown key side; did you mean shape.side?"
    name = write(tmp_path, "a", "steps: 1\nqqqqq: 2\n")
    assert message(name) == f"{name}:2: unknown key qqqqq; known are steps, optim, shape, size"


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("kind: circle\n  xyz: 2", "unknown key shape.xyz; known are kind, radius"),
        ("kind: circle\n  radios: 2", "unknown key shape.radios; did you mean shape.radius?"),
        ("kind: square\n  sides: 2", "unknown key shape.sides; did you mean shape.side?"),
        (
            "kind: square\n  optim: {lrs: 2}",
            "unknown key shape.optim.lrs; did you mean shape.optim.lr?",
        ),
        ("kind: square\n  side: x", "shape.side='x': input should be a valid number"),
        ("other: 1\n  kind: star", "shape.kind=star is unknown; known are circle, square"),
    ],
)
def test_keys_of_a_tagged_union_are_those_of_the_chosen_kind(tmp_path, section, line) -> None:
    name = write(tmp_path, "a", f"steps: 1\nshape:\n  {section}\n")
    assert message(name).startswith(f"{name}:4: {line}")


def test_a_missing_kind_names_the_kinds(tmp_path) -> None:
    name = write(tmp_path, "a", "steps: 1\nshape:\n  side: 2\n")
    wrong = "the key shape.kind is missing; known are circle, square"
    assert message(name) == f"{name}:2: {wrong}"
    name = write(tmp_path, "a", "steps: 1\n")
    assert message(name, "shape.side=2") == f"override shape.side=2: {wrong}"


def test_wrong_values_and_missing_keys_name_their_place(tmp_path) -> None:
    name = write(tmp_path, "a", "optim: {lr: -1}\n")
    assert message(name) == f"{name}: the key steps is missing (and 1 more)"
    name = write(tmp_path, "a", "steps: many\n")
    assert message(name).startswith(f"{name}:1: steps='many': input should be a valid integer")
    name = write(tmp_path, "a", "steps: 1\noptim: {betas: [0, x]}\n")
    assert message(name).startswith(f"{name}:2: optim.betas.1='x': input should be a valid number")
    name = write(tmp_path, "a", "steps: 1\noptim: {betas: 0.9}\n")
    assert message(name) == f"{name}:2: optim.betas=0.9: this key holds a list; write it in [ ]"
    name = write(tmp_path, "a", "steps: 1\noptim: 3\n")
    assert message(name).startswith(f"{name}:2: optim=3: this is a group of keys; set optim.lr, ")
    name = write(tmp_path, "a", "steps: 1\n")
    kinds = "this is a group of keys; set shape.kind to one of circle, square"
    assert message(name, "shape=circle") == f"override shape=circle: shape='circle': {kinds}"


def test_what_two_configs_differ_in_is_told_by_dotted_keys() -> None:
    old = {"optim": {"lr": 0.1, "betas": [0, 1]}, "adversary": None, "seed": 1}
    new = {"optim": {"lr": 0.2, "betas": [0, 1], "eps": 1e-8}, "adversary": {"pace": 2}, "seed": 1}
    assert list(differences(old, new, "all")) == [
        "all.optim.lr=0.1 (here 0.2)",
        "all.optim.eps=null (here 1e-08)",
        'all.adversary=null (here {"pace": 2})',
    ]


def test_a_wrong_value_is_placed_where_it_was_written_last(tmp_path) -> None:
    base = write(tmp_path, "base", "steps: 1\noptim:\n  lr: -1\n")
    name = write(tmp_path, "a", "extends: base\nsize: 2\n")
    assert message(name).startswith(f"{base}:3: optim.lr=-1: ")
    assert message(name, "optim.lr=-2").startswith("override optim.lr=-2: optim.lr=-2: ")
    assert message(name, "optim={lr: -3}").startswith("override optim={lr: -3}: optim.lr=-3: ")
    assert message(name, "optim.lr=0.1", "siz=3").startswith("override siz=3: unknown key siz; ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("steps: 1\noptim: [1, 2\n", ":3: not YAML: "),
        ("steps: 1\n\tsize: 2\n", ":2: not YAML: "),
        ("steps: !!python/object:os.system {}\n", ":1: not YAML: "),
        ("- steps\n", ": a config is a mapping"),
        ("", ": a config is a mapping"),
        ("steps: 1\noptim:\n  lr: 1\n  lr: 2\n", ":4: the key optim.lr is written twice"),
        ("steps: 1\nextends: simm-digits\n", ":2: extends: config simm-digits: no such file; did"),
    ],
)
def test_a_broken_file_names_its_line(tmp_path, text, line) -> None:
    name = write(tmp_path, "a", text)
    assert message(name).startswith(f"{name}{line}")


def test_a_file_that_is_no_text(tmp_path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"steps: \xff\xfe\n")
    assert "a.yaml: cannot be read as YAML" in message(str(tmp_path / "a.yaml"))


def test_a_circle_of_parents_is_named(tmp_path) -> None:
    name = write(tmp_path, "a", "extends: b\n")
    second = write(tmp_path, "b", "extends: a\n")
    assert message(name) == f"{name}: extends itself, by way of {second}"
    name = write(tmp_path, "c", "extends: c\n")
    assert message(name) == f"{name}: extends itself, by way of {name}"


@pytest.mark.parametrize("text", ["steps", "=3", ""])
def test_an_override_without_key_or_value(tmp_path, text) -> None:
    name = write(tmp_path, "a", "steps: 1\n")
    assert message(name, text) == f"override {text!r}: write it as key.sub=value"


def test_an_override_that_is_no_yaml(tmp_path) -> None:
    name = write(tmp_path, "a", "steps: 1\n")
    assert message(name, "optim=[1") == "override 'optim=[1': the value is not YAML"


def test_the_method_is_needed_and_looked_up(tmp_path) -> None:
    name = write(tmp_path, "a", "steps: 1\n")
    with pytest.raises(UserError, match="a.yaml: the key method is missing"):
        read_config(name)
    with pytest.raises(UserError, match="method 'consistancy' is unknown; did you mean consis"):
        read_config(name, ["method=consistancy"])


def test_a_plug_in_s_key_that_is_null_by_itself_changes_no_hash() -> None:
    """So that runs and records of before it was there go on."""
    plain = read_config("ect-digits")[1]
    named = read_config("ect-digits", ["weight={kind: inverse_gap}"])[1]
    assert digest(plain) == digest(named)
    assert "k" not in plain.pairs.named and "levels" not in plain.weight.named
    other = read_config("ect-digits", ["pairs.k=8"])[1]
    assert other.pairs.named["k"] == 8 and digest(other) != digest(plain)


# The configs and schemas that ship ----------------------------------------------------------------


def test_every_method_has_a_config_of_its_name() -> None:
    trained = {f"{name}-digits" for name in METHODS} - {"denoising-digits"}
    assert trained | {"teacher-digits-dit", "teacher-digits-unet"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configs_are_valid_and_carry_the_common_keys(name) -> None:
    cls, config = read_config(name)
    assert name.startswith(("teacher-", f"{NAMED.get(name, config.method)}-"))
    assert config.run == Path("runs", name)
    resolved = yaml.safe_load(dump(config))
    for key in KEYS:
        section: Any = resolved
        for part in key.split("."):
            assert part in section, key
            section = section[part]
    again = validate(configs.Raw(resolved), cls.Config)
    assert again == config and digest(again) == digest(config)
    other = validate(configs.Raw(resolved | {"seed": 1}), cls.Config)
    assert digest(other) != digest(config)


@pytest.mark.parametrize("method", METHODS)
def test_schema_is_one_that_the_configs_fit(method) -> None:
    made = json.loads(schema(method))
    assert made["$schema"].startswith("https://json-schema.org/")
    for part in _walk(made):
        if "$ref" in part:
            place = part["$ref"].removeprefix("#/$defs/")
            assert place in made["$defs"]
    assert made["additionalProperties"] is False
    for name in NAMES:
        values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        if values.get("method") == method:
            assert not list(_misfits(values, made, made["$defs"]))
            wrong = values | {"optim": {"lr": "high"}, "sede": 1, "method": "other"}
            assert len(list(_misfits(wrong, made, made["$defs"]))) == 3


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        ("heun", True),
        ({"kind": "sde", "eta": 0.5}, True),
        ("mine.py:Solver", True),
        ({"kind": "mine.py:Solver", "order": 3}, True),
        ("hoin", False),
        ({"kind": "sde", "eat": 0.5}, False),
        ({"kind": "sde", "eta": "much"}, False),
        ({"eta": 0.5}, False),
    ],
)
def test_the_schema_knows_the_keys_of_plug_ins(value, fits) -> None:
    made = json.loads(schema("consistency"))
    assert (not list(_misfits(value, made["properties"]["solver"], made["$defs"]))) is fits


def test_every_key_is_described() -> None:
    for method in METHODS:
        made = json.loads(schema(method))
        for name, entry in made["properties"].items():
            assert entry.get("description"), f"{method}: {name}"


def test_the_common_keys_are_in_the_base_class() -> None:
    assert {key.split(".")[0] for key in KEYS} <= set(TrainConfig.model_fields)


def _walk(node: Any) -> Any:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from _walk(value)


def _misfits(value: Any, rule: dict[str, Any], defs: dict[str, Any]) -> Any:
    """What does not fit a JSON schema, by the keywords that pydantic writes."""
    if "$ref" in rule:
        yield from _misfits(value, defs[rule["$ref"].removeprefix("#/$defs/")], defs)
    any_of = rule.get("anyOf") or rule.get("oneOf")
    if any_of and all(list(_misfits(value, option, defs)) for option in any_of):
        yield f"{value!r} fits none"
    if "const" in rule and value != rule["const"] or value not in rule.get("enum", [value]):
        yield f"{value!r} is not allowed"
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
    kinds |= {"number": (int, float), "null": type(None)}
    if "type" in rule and not isinstance(value, kinds[rule["type"]]):
        yield f"{value!r} is no {rule['type']}"
    elif "pattern" in rule and not re.search(rule["pattern"], value):
        yield f"{value!r} is not written as {rule['pattern']}"
    elif isinstance(value, dict) and "properties" in rule:
        known = rule["properties"]
        yield from (f"missing {key}" for key in rule.get("required", []) if key not in value)
        for key, nested in value.items():
            if key in known:
                yield from _misfits(nested, known[key], defs)
            elif rule.get("additionalProperties") is False:
                yield f"unknown {key}"


@pytest.mark.parametrize(
    ("name", "override", "line"),
    [
        ("sim-digits", "optim.betas=[0.9, 1.0]", "optim.betas.1=1.0: input should be less than 1"),
        ("sim-digits", "optim.lr=.inf", "optim.lr=inf: input should be a finite number"),
        (
            "dmd-digits",
            "student_t={kind: uniform, low: 0.9, high: 0.1}",
            "student_t.high=0.1: must not be below low=0.9",
        ),
        (
            "consistency-digits",
            "guidance_range=[3, 1]",
            "guidance_range=[3, 1]: the first must not be above the second",
        ),
        (
            "consistency-digits",
            "guidance_range=[-1, 1]",
            "guidance_range.0=-1: input should be greater than or equal to 0",
        ),
        (
            "consistency-digits",
            "pairs={kind: grid, steps: 4, skip: 5}",
            "pairs={'kind': 'grid', 'steps': 4, 'skip': 5}: grid: skip: must not be above steps=4",
        ),
        (
            "phased_dmd-digits",
            "levels=[1.0, 0.2, 0.6, 0.0]",
            "levels=[1.0, 0.2, 0.6, 0.0]: must fall from pure noise to 0",
        ),
        (
            "reflow-digits",
            "t={kind: u_shaped, a: 1000}",
            "t.a=1000: input should be less than or equal to 100",
        ),
        ("sim-digits", "eval.steps=0", "eval.steps=0: input should be greater than or equal to 1"),
        ("sim-digits", "start=0", "start=0: input should be greater than 0"),
    ],
)
def test_numbers_out_of_range_are_named_in_a_line(name, override, line) -> None:
    with pytest.raises(UserError) as caught:
        read_config(name, [override])
    assert str(caught.value) == f"override {override}: {line}"
