"""Plug-ins: small classes that a config names by ``kind``, ours or a user's own.

A family of plug-ins is a base class. Ours are its subclasses, named in snake case; a user's own
subclass is named by where it lies, ``kind: path/to/file.py:Class`` or ``kind: module:Class``. The
class's fields are its settings.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    PrivateAttr,
    ValidationError,
)
from pydantic_core import CoreSchema, PydanticCustomError

from stepdistill.run.errors import UserError, hint

if TYPE_CHECKING:
    from torch import Tensor


class Plug(BaseModel):
    """A plug-in; its fields are the keys that stand beside ``kind``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    _place: str = PrivateAttr("")

    @property
    def kind(self) -> str:
        """The name by which a config finds this class."""
        return self._place or kind_of(type(self))

    @property
    def named(self) -> dict[str, Any]:
        """What a config writes for it; a key that is null by itself is left out, so that configs of
        before it was there are the same."""
        null = {name for name, field in type(self).model_fields.items() if field.default is None}
        own = self.model_dump(mode="json").items()
        return {"kind": self.kind} | {k: v for k, v in own if v is not None or k not in null}


P = TypeVar("P", bound=Plug)


def kind_of(cls: type[Plug]) -> str:
    """The name of one of our plug-ins: its class's in snake case."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()


def kinds(base: type[P]) -> dict[str, type[P]]:
    """Our plug-ins of a family, by name."""
    found: dict[str, type[P]] = {}
    for cls in base.__subclasses__():
        if cls.__module__.startswith("stepdistill."):
            own = {} if getattr(cls, "__abstractmethods__", None) else {kind_of(cls): cls}
            found |= own | kinds(cls)
    return found


def made(base: type[P], value: Any) -> P:
    """The plug-in that a config's value names.

    Args:
        base: its family.
        value: a plug-in, a name, or a mapping of ``kind`` and settings.

    Raises:
        PydanticCustomError: none of that name, or settings that it does not take, in one line.
    """
    if isinstance(value, base):
        return value
    settings = {"kind": value} if isinstance(value, str) else value
    if not isinstance(settings, dict) or not isinstance(settings.get("kind"), str):
        known = ", ".join(kinds(base))
        raise PydanticCustomError("plug", f"must name a kind; known are {known}, or FILE.py:CLASS")
    kind = settings["kind"]
    cls = _class(base, kind)
    try:
        plug = cls.model_validate({k: v for k, v in settings.items() if k != "kind"})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        said = problem["msg"][0].lower() + problem["msg"][1:]
        if problem["type"] == "extra_forbidden":
            said = f"unknown key; known are {', '.join(cls.model_fields) or 'none'}"
        raise PydanticCustomError("plug", _plain(f"{kind}: {key}: {said}")) from error
    if ":" in kind:
        plug._place = kind
    return plug


if TYPE_CHECKING:
    Plugged = Annotated[P, "a plug-in"]
else:

    class Plugged:
        """``Plugged[Weight]`` is the type of a config key that holds a plug-in of that family."""

        def __class_getitem__(cls, base: type[P]) -> Any:
            return Annotated[
                base,
                BeforeValidator(lambda value: made(base, value)),
                PlainSerializer(lambda value: value.named, return_type=dict),
                _Schema(base),
            ]


class _Schema:
    """The JSON schema of a key that holds a plug-in: a kind, or a mapping with one and its keys."""

    def __init__(self, base: type[Plug]) -> None:
        self.base = base

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: Any) -> dict[str, Any]:
        known = kinds(self.base)
        place = {"type": "string", "pattern": ":", "description": "a class of your own"}
        found: list[dict[str, Any]] = [{"enum": list(known)}, place]
        for name, cls in known.items():
            found.append(handler(cls.__pydantic_core_schema__))
            own = handler.resolve_ref_schema(found[-1])
            own["properties"] = {"kind": {"const": name}} | own.get("properties", {})
            own["required"] = ["kind", *(key for key in own.get("required", ()) if key != "kind")]
        mine = {"type": "object", "properties": {"kind": place}, "required": ["kind"]}
        return {"anyOf": [*found, mine]}


def _class(base: type[P], kind: str) -> type[P]:
    place, colon, name = kind.rpartition(":")
    if not colon:
        known = kinds(base)
        if kind not in known:
            wrong = f"kind {kind} is unknown; {hint(kind, known)}"
            raise PydanticCustomError("plug", _plain(wrong))
        return known[kind]
    found = getattr(_module(place), name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PydanticCustomError(
            "plug", _plain(f"{kind}: {place} has no class {name} derived from {base.__name__}")
        )
    if inspect.isabstract(found):
        lacking = ", ".join(sorted(found.__abstractmethods__))
        raise PydanticCustomError("plug", _plain(f"{kind}: {name} does not say {lacking}"))
    return found


def _module(place: str) -> Any:
    """A module by its name, or a Python file by its path."""
    path = Path(place)
    if place.endswith(".py") and not path.is_file():
        beside = [str(other) for other in sorted(path.parent.glob("*.py"))]
        near = difflib.get_close_matches(place, beside, 1)
        mend = f"did you mean {near[0]}?" if near else "give its path from where you are"
        raise PydanticCustomError("plug", _plain(f"{place}: no such file; {mend}"))
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        return _file(path.resolve())
    except Exception as error:
        text = f"{place}: cannot be imported: {type(error).__name__}: {error}"
        raise PydanticCustomError("plug", _plain(text)) from error


def a_sample(plug: Plug, key: str, found: Tensor, count: int) -> Tensor:
    """What the plug-in of a key gives for so many samples, one number for each [B].

    Raises:
        UserError: another shape.
    """
    if found.shape != (count,):
        raise UserError(
            f"{key}: {plug.kind} gives values of shape {list(found.shape)} for {count} samples; "
            "give one number a sample"
        )
    return found


def _file(path: Path) -> Any:
    """A Python file as a module, run once for each state of the file."""
    state = f"{path} {path.stat().st_mtime_ns}"
    name = f"plug_{hashlib.sha256(state.encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # annotations look there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _plain(text: str) -> str:
    """A message in one line, without what pydantic would fill in."""
    return " ".join(text.replace("{", "(").replace("}", ")").split())
