"""Methods are found by their files: trainers/<family>/<method>.py, ending in ``TRAINER = ...``."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.run.errors import UserError, hint

if TYPE_CHECKING:
    from stepdistill.trainers.base import Trainer

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Method:
    """A method's file, read without importing it.

    Args:
        name: the file's name, which a config gives as ``method``.
        family: the folder it lies in.
        summary: first line of the file's docstring.
    """

    name: str
    family: str
    summary: str


def methods() -> list[Method]:
    """All methods, by family and name."""
    out = []
    for path in sorted(ROOT.glob("*/*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(_is_trainer(node) for node in tree.body):
            text = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
            out.append(Method(path.stem, path.parent.name, text))
    return out


def trainer(name: str) -> type[Trainer]:
    """The trainer class of a method; only its own module is imported.

    Raises:
        UserError: there is no such method; the nearest is suggested.
    """
    known = {method.name: method for method in methods()}
    if name not in known:
        raise UserError(f"method {name!r} is unknown; {hint(name, known)}")
    module = import_module(f"stepdistill.trainers.{known[name].family}.{name}")
    found: type[Trainer] = module.TRAINER
    return found


def _is_trainer(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id == "TRAINER" for target in node.targets
    )
