"""A config file: YAML, one parent by ``extends``, dotted overrides, and errors that say where."""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from stepdistill.run.errors import UserError, hint, nearest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
if not CONFIGS.is_dir():  # a checkout whose links were lost
    CONFIGS = CONFIGS.parent.parent / "configs"

M = TypeVar("M", bound=BaseModel)


@dataclass
class Raw:
    """A config as read: nested values, and where each dotted key was written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def place(self, key: str) -> str:
        """Where a key, or the nearest section around it, was written."""
        while key:
            if key in self.places:
                return self.places[key]
            key = key.rpartition(".")[0]
        return self.places.get("", "config")


def find(name: str) -> Path:
    """The file of a config: a path, or the name of one that is installed with the package.

    Raises:
        UserError: there is no such file; the nearest installed name is suggested.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
    if path.stem in known and path.parent in (Path(), Path("configs")):
        return CONFIGS / f"{path.stem}.yaml"
    raise UserError(f"config {name}: no such file; {hint(path.stem, known, 'installed are')}")


def about() -> list[tuple[str, str, str]]:
    """The installed configs: name, method, and the comment that the file begins with."""
    found = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = takewhile(lambda line: line.startswith("#"), lines)
        method = _read_file(path, ()).values["method"]
        found.append((path.stem, method, " ".join(line.lstrip("# ") for line in comment)))
    return found


def read(name: str, overrides: Sequence[str] = ()) -> Raw:
    """Read a config with its parents and apply ``key.sub=value`` overrides.

    Raises:
        UserError: a missing file, broken YAML, a circle of parents, or an override without "=".
    """
    raw = _read_file(find(name), ())
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"override {text!r}: write it as key.sub=value")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"override {text!r}: the value is not YAML") from error
        nested: Any = parsed
        for part in reversed(key.split(".")):
            nested = {part: nested}
        raw.values = _merge(raw.values, nested)
        place, sections = f"override {text}", accumulate(key.split("."), "{}.{}".format)
        raw.places = dict.fromkeys(sections, place) | raw.places
        raw.places |= dict.fromkeys(_keys(parsed, key), place)
    return raw


def validate(raw: Raw, model: type[M]) -> M:
    """Check a config against its model.

    Raises:
        UserError: the first thing that is wrong, with its place and the mend.
    """
    try:
        return model.model_validate(raw.values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        problems.sort(key=lambda p: p["type"] != "extra_forbidden")  # a typo is not a missing key
        line = _explain(problems[0], raw, model)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(line + more) from error


def dump(model: BaseModel) -> str:
    """The resolved config as YAML."""
    text: str = yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False)
    return text


def digest(model: BaseModel) -> str:
    """Short hash of a resolved config; a key that is null is as one that is not there."""
    text = json.dumps(model.model_dump(mode="json", exclude_none=True), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Any, new: Any, key: str) -> Iterator[str]:
    """The keys at and below ``key`` in which two resolved configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old | new:
            if old.get(name) != new.get(name):
                yield from differences(old.get(name), new.get(name), f"{key}.{name}")
    else:
        yield f"{key}={json.dumps(old)} (here {json.dumps(new)})"


def _read_file(path: Path, seen: tuple[Path, ...]) -> Raw:
    if path in seen:
        raise UserError(f"{path}: extends itself, by way of {seen[-1]}")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values")
    raw = Raw(values, {"": str(path)} | dict(_places(node, path)))
    parent = values.pop("extends", None)
    if parent is None:
        return raw
    base = _read_file(_parent(path, str(parent), raw.place("extends")), (*seen, path))
    return Raw(_merge(base.values, raw.values), base.places | raw.places)


def _parent(path: Path, name: str, place: str) -> Path:
    """The file that ``extends: name`` means: one beside ``path``, else what :func:`find` finds."""
    for beside in (path.parent / f"{name}.yaml", path.parent / name):
        if beside.is_file():
            return beside
    try:
        return find(name)
    except UserError as error:
        raise UserError(f"{place}: extends: {error}") from error


def _places(node: Any, path: Path, prefix: str = "") -> Iterator[tuple[str, str]]:
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        place = f"{path}:{key.start_mark.line + 1}"
        if name in seen:
            raise UserError(f"{place}: the key {name} is written twice")
        seen.add(name)
        yield name, place
        yield from _places(value, path, f"{name}.")


def _keys(value: Any, key: str) -> Iterator[str]:
    """A dotted key and those of all that is nested in its value."""
    yield key
    if isinstance(value, dict):
        for name, nested in value.items():
            yield from _keys(nested, f"{key}.{name}")


def _merge(base: Any, over: Any) -> Any:
    """Nested update; a section that names another ``kind`` replaces the old one whole."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if "kind" in over and over["kind"] != base.get("kind"):
        return over
    return base | {k: _merge(base[k], v) if k in base else v for k, v in over.items()}


def _explain(problem: Any, raw: Raw, model: type[BaseModel]) -> str:
    parts = [str(part) for part in problem["loc"]]
    key = ".".join(_written(parts, raw.values))
    if problem["type"].startswith("union_tag"):
        kinds = ", ".join(m.model_fields["kind"].default for m in _sections(model, parts))
        kind = problem["ctx"].get("tag")
        wrong = f"{key}.kind={kind} is unknown" if kind else f"the key {key}.kind is missing"
        return f"{raw.place(f'{key}.kind')}: {wrong}; known are {kinds}"
    if problem["type"] == "extra_forbidden":
        sections = _sections(model, parts[:-1])
        known = list(dict.fromkeys(name for m in sections for name in m.model_fields))
        prefix = f"{key.rpartition('.')[0]}." if "." in key else ""
        below = dict.fromkeys(deep for m in sections for deep in _below(m, parts[-1]))
        slip, far = (nearest(parts[-1], known, cut) for cut in (0.8, 0.5))
        meant = " or ".join(f"{prefix}{name}" for name in slip or list(below) or far)
        mend = f"did you mean {meant}?" if meant else f"known are {', '.join(known)}"
        return f"{raw.place(key)}: unknown key {key}; {mend}"
    if problem["type"] == "missing":
        return f"{raw.place(key)}: the key {key} is missing"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    if problem["type"] in ("tuple_type", "list_type"):
        message = "this key holds a list; write it in [ ]"
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = f"this is a group of keys; {_inside(key, _sections(model, parts))}"
    if problem["type"] == "none_required":
        message = "this method has no such setting; leave it out"
    return f"{raw.place(key)}: {key}={problem['input']!r}: {message}"


def _inside(key: str, sections: Sequence[Any]) -> str:
    """What could be set in a group of keys."""
    fields = [m.model_fields for m in sections]
    kinds = [own["kind"].default for own in fields if "kind" in own]
    if kinds:
        return f"set {key}.kind to one of {', '.join(map(str, kinds))}"
    names = list(dict.fromkeys(name for own in fields for name in own))
    return f"set {', '.join(f'{key}.{name}' for name in names)}" if names else "write it in { }"


def _written(parts: Sequence[str], values: Any) -> Iterator[str]:
    """The keys and indices of an error's place, without the tags of unions that are among them."""
    for part in parts:
        if isinstance(values, dict) and part not in values and values.get("kind") == part:
            continue
        yield part
        values = values.get(part) if isinstance(values, dict) else None


def _sections(model: Any, parts: Sequence[str]) -> list[Any]:
    """The models that the section at ``parts`` may have; tags of unions among them choose one."""
    models = [model]
    for part in parts:
        nested: list[Any] = []
        for m in models:
            if part in m.model_fields:
                nested += _models(m.model_fields[part].annotation)
            elif "kind" in m.model_fields and m.model_fields["kind"].default == part:
                nested.append(m)
        models = nested or models
    return models


def _below(model: type[BaseModel], name: str) -> Iterator[str]:
    """The dotted keys in the sections of a model that end in ``name``."""
    for key, info in model.model_fields.items():
        for section in _models(info.annotation):
            if name in section.model_fields:
                yield f"{key}.{name}"


def _models(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated, tuple, list):
        for part in typing.get_args(annotation):
            yield from _models(part)
