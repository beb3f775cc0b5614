"""Imports go down only, read from the syntax tree: no module knows what lies above it."""

from __future__ import annotations

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from stepdistill.pipelines.upscale import UpscalePipeline

FLOORS = (  # from the top; rooms of one floor do not know each other
    {"__main__"},
    {"cli"},
    {"__init__"},
    {"commands"},
    {"proof"},
    {"trainers", "pipelines", "eval"},
    {"data", "losses", "oracles"},
    {"run"},
    {"diffusion"},
    {"adapters"},
    {"configs"},  # only YAML
)
TRAVELLERS_MAY_IMPORT = {*sys.stdlib_module_names, "torch", "diffusers", "numpy", "PIL"}
TRAVELLERS_DERIVE_FROM = re.compile(
    r"\w*(Pipeline|Scheduler|SchedulerMixin|ModelMixin|ConfigMixin)"
)


def room(module: str) -> str:
    """The room of a module: run for stepdistill.run.rng, __init__ for stepdistill."""
    return [*module.split("."), "__init__"][1]


def floor(module: str) -> int:
    """How many floors lie above a module's room."""
    return next(i for i, rooms in enumerate(FLOORS) if room(module) in rooms)


def imports(source: str, modules: dict[str, Path]) -> set[str]:
    """All that a source imports, anywhere in it; a module's name as a string counts as well."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else name.rpartition(".")[0] for name in names}
            found -= {"stepdistill"} if names == ["stepdistill.__version__"] else set()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"stepdistill(\.\w+)+\.?", node.value):  # for import_module
                found.add(node.value.rstrip("."))
    return found


def goes_up(module: str, imported: str) -> bool:
    """Whether an import leaves its room for anything but a lower floor."""
    if imported.startswith("."):
        return True  # relative: its room cannot be read off, and the house imports absolutely
    if imported.split(".")[0] != "stepdistill" or room(imported) == room(module):
        return False
    return floor(imported) <= floor(module)


@pytest.fixture(scope="module")
def graph(modules) -> dict[str, set[str]]:
    """Module -> all that it imports."""
    return {name: imports(path.read_text("utf-8"), modules) for name, path in modules.items()}


def test_every_module_lies_in_a_known_room(modules) -> None:
    assert {room(name) for name in modules} <= set().union(*FLOORS)


def test_imports_go_down_only(graph) -> None:
    wrong = [f"{a} imports {b}" for a in graph for b in sorted(graph[a]) if goes_up(a, b)]
    assert not wrong, "\n".join(wrong)


def test_there_is_no_import_cycle(graph) -> None:
    TopologicalSorter({a: graph[a] & set(graph) - {a} for a in graph}).prepare()  # else CycleError


def test_files_that_travel_stand_alone(shipped) -> None:
    """A pipeline or scheduler file is copied into exported folders, where stepdistill is not."""
    wrong = []
    for name, path in shipped.items():
        if path.suffix != ".py" or not name.startswith(
            ("stepdistill/pipelines/", "stepdistill/assets/")
        ):
            continue
        source = path.read_text("utf-8")
        if name.endswith("pipelines/upscale.py"):  # travels in one file with the other pipeline
            source = UpscalePipeline.text
        bases = [
            ast.unparse(base).split(".")[-1]
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ClassDef)
            for base in node.bases
        ]
        if any(TRAVELLERS_DERIVE_FROM.fullmatch(base) for base in bases):
            foreign = {
                i for i in imports(source, {}) if i.split(".")[0] not in TRAVELLERS_MAY_IMPORT
            }
            wrong += [f"{name} imports {i}" for i in sorted(foreign)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "line", "up"),
    [
        ("stepdistill.trainers.base", "from stepdistill.eval import frechet", True),
        ("stepdistill.eval.frechet", "import stepdistill.pipelines.export", True),
        ("stepdistill.losses.score", "from stepdistill.data.batch import Batch", True),
        ("stepdistill.diffusion.heads", "def f():\n    from stepdistill.run import rng", True),
        ("stepdistill.adapters.unet", "from stepdistill.diffusion.denoiser import Denoiser", True),
        ("stepdistill.adapters.unet", "from .base import Adapter", True),
        ("stepdistill.run.config", "import_module(f'stepdistill.trainers.{name}')", True),
        ("stepdistill.run.config", "from stepdistill import Denoiser", True),
        ("stepdistill.run.config", "from stepdistill import __version__", False),
        ("stepdistill.trainers.score.sim", "from stepdistill.trainers.base import Trainer", False),
        ("stepdistill.trainers.base", "from stepdistill.diffusion import sampler", False),
        ("stepdistill.commands.train", "from stepdistill.trainers.base import Trainer", False),
    ],
)
def test_the_check_itself(module: str, line: str, up: bool) -> None:
    modules = dict.fromkeys(["stepdistill.eval.frechet", "stepdistill.diffusion.sampler"], Path())
    assert any(goes_up(module, imported) for imported in imports(line, modules)) == up
