"""Every key of every method's config: misspelt or out of range, it gives one line that says so.

The keys, their bounds and their choices are read from the models, so a new one is tested too.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import annotated_types as bounds
import pytest
import yaml
from pydantic import BaseModel

from stepdistill.run.config import find, read, validate
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plug, kinds
from stepdistill.trainers.find import trainer
from tests.recipes import METHODS, recipe

UNIONS = (typing.Union, types.UnionType)


@dataclass(frozen=True)
class Key:
    """A key of a config.

    Args:
        parts: names of the sections around it, and its own.
        annotation: its type.
        metadata: what bounds its value.
        beside: what the sections around it cannot do without, by their dotted names.
    """

    parts: tuple[str, ...]
    annotation: Any
    metadata: tuple[Any, ...]
    beside: Mapping[str, Mapping[str, str]]

    def __str__(self) -> str:
        """Its dotted name."""
        return ".".join(self.parts)


def models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a key may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models(part)]


def standing(annotation: Any) -> str:
    """A value for a key that must have one: a kind of its plug-in, or any word."""
    plugged = isinstance(annotation, type) and issubclass(annotation, Plug)
    return next(iter(kinds(annotation))) if plugged else "unused"


def keys(
    model: type[BaseModel], parts: tuple[str, ...] = (), beside: Mapping[str, Any] | None = None
) -> Iterator[Key]:
    """Every key of a model and of the sections in it, of each kind that they may have."""
    fields = model.model_fields
    needed = {n: standing(field.annotation) for n, field in fields.items() if field.is_required()}
    needed |= {"kind": fields["kind"].default} if "kind" in fields else {}
    beside = {**(beside or {}), ".".join(parts): needed}
    for name, field in fields.items():
        if name != "kind":
            own = (*parts, name)
            yield Key(own, field.annotation, tuple(field.metadata), beside)
            for section in models(field.annotation):
                yield from keys(section, own, beside)


def beyond(annotation: Any, metadata: tuple[Any, ...]) -> Iterator[Any]:
    """Values of the right type just outside of each bound, and no choice of those given."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    small = 1 if annotation is int or int in args else 0.001
    for bound in metadata:
        if isinstance(bound, bounds.Ge):
            yield bound.ge - small
        elif isinstance(bound, bounds.Gt):
            yield bound.gt
        elif isinstance(bound, bounds.Le):
            yield bound.le + small
        elif isinstance(bound, bounds.Lt):
            yield bound.lt
    if origin is typing.Literal:
        yield args[0] * 2 if isinstance(args[0], str) else max(args) + 1
    elif origin is typing.Annotated:
        yield from beyond(args[0], args[1:])
    elif origin is tuple:
        yield from ([value] * len(args) for value in beyond(args[0], ()))
    elif origin in UNIONS:
        for part in args:
            yield from beyond(part, ())


def wrong(key: Key) -> list[Any]:
    """Values that a key must refuse: of another type, and beyond its bounds."""
    mapped = bool(models(key.annotation)) or typing.get_origin(key.annotation) is dict
    return [3 if mapped else {}, *beyond(key.annotation, key.metadata)]


def nested(key: Key, name: str, value: Any) -> dict[str, Any]:
    """A config that sets one key, written as ``name``, and else what it cannot do without."""
    found: dict[str, Any] = {name: value}
    for depth in reversed(range(len(key.parts))):
        beside = key.beside[".".join(key.parts[:depth])]
        found = {k: v for k, v in beside.items() if k != key.parts[depth]} | found
        found = {key.parts[depth - 1]: found} if depth else found
    return found


def refusal(model: type[BaseModel], path: Path, *overrides: str) -> str:
    """The one line that a config is refused with."""
    with pytest.raises(UserError) as caught:
        validate(read(str(path), overrides), model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@cache
def shipped(method: str) -> dict[str, Any]:
    """The values of a method's own config."""
    return yaml.safe_load(find(recipe(method)).read_text("utf-8"))


def written(method: str, folder: Path, values: Mapping[str, Any]) -> tuple[Path, int]:
    """A file of a config, its needed keys as in the method's own; and the number of its lines."""
    own = shipped(method)
    values = {
        key: own.get(key, value) if value == "unused" else value for key, value in values.items()
    }
    text = yaml.safe_dump(values, sort_keys=False)
    path = folder / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return path, text.count("\n")


@pytest.mark.parametrize("method", METHODS)
def test_every_key_refuses_what_is_out_of_range(method, tmp_path) -> None:
    """By an override, which is named, or in a file, whose line is."""
    model, bounded = trainer(method).Config, 0
    for key in keys(model):
        for value in wrong(key):
            bounded += value != {} and value != 3
            path, length = written(method, tmp_path, nested(key, key.parts[-1], value))
            place = f"{path}:{length}"
            if isinstance(value, list):  # in a file it fills several lines
                place = f"override {key}={value}"
                path, _ = written(method, tmp_path, nested(key, key.parts[-1], None))
                line = refusal(model, path, f"{key}={value}")
                assert line.startswith(f"{place}: {key}.0="), line
            else:
                line = refusal(model, path)
                assert line.startswith(f"{place}: {key}="), line
    assert bounded > 40


@pytest.mark.parametrize("method", METHODS)
def test_every_key_misspelt_is_told_the_right_one(method, tmp_path) -> None:
    """With a letter too many in a file, and one too few in an override; itself it is not there."""
    model, count = trainer(method).Config, 0
    for key in keys(model):
        *around, name = key.parts
        beside = {other.parts[-1] for other in keys(model) if other.parts[:-1] == key.parts[:-1]}
        for misspelt in {name + name[-1], name[:-1]} - {""} - beside:
            path, length = written(method, tmp_path, nested(key, misspelt, 1))
            wrong = ".".join([*around, misspelt])
            told = f"unknown key {wrong}; did you mean {key}?"
            fewer = len(misspelt) < len(name)
            line = refusal(model, path, *[f"{wrong}=1"] * fewer)
            place = f"override {wrong}=1" if fewer else f"{path}:{length}"
            assert line.startswith(f"{place}: {told}"), line
            count += 1
    assert count > 100
