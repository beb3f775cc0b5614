"""A teacher's own pipeline folder with a student in its network's place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from stepdistill.pipelines.folder import INDEX, refuse_taken
from stepdistill.pipelines.literal_grid import FILE_NAME, LiteralGridScheduler
from stepdistill.run.errors import UserError
from stepdistill.run.files import whole_folder

SCHEDULER = "scheduler"
PICKLED = shutil.ignore_patterns("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.onnx")


def write_stock(
    out: Path,
    source: Path,
    key: str,
    module: nn.Module,
    scheduler: Any,
    *,
    card: str,
    walks: Mapping[int, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a stock pipeline: the teacher's class and other parts, the student and its scheduler.

    Args:
        out: the folder to write.
        source: the teacher's folder.
        key: name of its network, such as unet or transformer.
        module: the student's network, of the same class.
        scheduler: a :class:`LiteralGridScheduler`, whose file travels along, or a stock one.
        card: text of README.md.
        walks: what a call is told beside each number of steps, such as sigmas; kept in walks.json.
        overwrite: replace a pipeline folder that is already there.
        check: is shown the folder before it takes its place; what it raises leaves ``out`` alone.

    Raises:
        UserError: ``out`` is taken, or the teacher is of another class of networks.
    """
    refuse_taken(out, overwrite)
    index = json.loads((source / INDEX).read_text(encoding="utf-8"))
    saved: Any = module
    if index[key][1] != type(saved).__name__:
        raise UserError(f"{source}: its {key} is a {index[key][1]}, not a {type(saved).__name__}")
    own = isinstance(scheduler, LiteralGridScheduler)
    module_name = FILE_NAME.removesuffix(".py") if own else "diffusers"
    index[SCHEDULER] = [module_name, type(scheduler).__name__]
    index.pop("_name_or_path", None)
    with whole_folder(out) as folder:
        for name, entry in index.items():
            part = isinstance(entry, list) and len(entry) == 2 and entry[1]
            if part and name not in (key, SCHEDULER):
                shutil.copytree(source / name, folder / name, ignore=PICKLED)
        saved.save_pretrained(folder / key, safe_serialization=True)
        scheduler.save_pretrained(folder / SCHEDULER)
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
        if walks:
            (folder / "walks.json").write_text(json.dumps(walks) + "\n", encoding="utf-8")
        _tidy(folder / key)
        if check is not None:
            check(folder)
    return out


def _tidy(folder: Path) -> None:
    """Take this machine's paths out of a network's config, and give its weights its mode."""
    config = folder / "config.json"
    entries = json.loads(config.read_text(encoding="utf-8"))
    entries.pop("_name_or_path", None)
    config.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    for weights in folder.glob("*.safetensors"):
        weights.chmod(config.stat().st_mode)
