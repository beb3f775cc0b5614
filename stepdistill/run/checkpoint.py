"""Checkpoints: safetensors and JSON in a folder that is either complete or passed over.

A folder is written under a temporary name, every file is flushed to the disk, the folder is
renamed, and only then is it marked by COMPLETE, which lists its files with sizes and SHA-256.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.run.errors import UserError
from stepdistill.run.files import flush, named, sha256, whole_folder, write_text

MARK, STATE = "COMPLETE", "state.json"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read.

    Args:
        step: steps that were done when it was written.
        tensors: by part, then name.
        meta: whatever else was saved.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]
) -> Path:
    """Write ``folder/step-NNNNNNN`` and mark it complete.

    Raises:
        OSError: the disk does not take it; nothing of it is left.
    """
    path = folder / f"step-{step:07d}"
    with whole_folder(path) as temp:
        for part, values in tensors.items():
            flat = {k: v.detach().cpu().contiguous() for k, v in values.items()}
            save_file(flat, temp / f"{part}.safetensors")
        meta_text = json.dumps({"step": step, "parts": sorted(tensors), **meta}, indent=1)
        (temp / STATE).write_text(meta_text, encoding="utf-8")
        listed = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
            for file in sorted(temp.iterdir())
        }
    try:
        write_text(path / MARK, json.dumps(listed))
        with named(path):
            flush(path)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return path


def problem(path: Path, *, hashes: bool = False) -> str | None:
    """Why a checkpoint cannot be used, or None if it is complete.

    Args:
        path: its folder.
        hashes: also read every file; marks of earlier versions list none to compare with.
    """
    if not path.is_dir():
        return "no such folder"
    mark = path / MARK
    if not mark.is_file():
        return f"it has no {MARK}: its writing was cut short"
    try:
        listed = json.loads(mark.read_text(encoding="utf-8"))
        facts = {name: _facts(entry) for name, entry in listed.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        facts = {}
    if STATE not in facts:
        return f"its {MARK} is damaged"
    for name, (size, _) in facts.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    for name, (_, known) in facts.items() if hashes else ():
        try:
            same = known is None or sha256(path / name) == known
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if not same:
            return f"{name} is damaged: its content is not what was written"
    return None


def _facts(entry: Any) -> tuple[int, str | None]:
    """Size and hash of a file in a mark; earlier versions listed the size alone."""
    return (entry, None) if isinstance(entry, int) else (int(entry["bytes"]), entry["sha256"])


def load(path: Path, *, checked: bool = False) -> Saved:
    """Read a checkpoint.

    Args:
        path: its folder.
        checked: its hashes have been compared just now, by :func:`newest`.

    Raises:
        UserError: it is not complete, or a file in it is damaged.
    """
    why = problem(path, hashes=not checked)
    if why:
        raise UserError(f"checkpoint {path}: {why}; resume=auto takes the newest complete one")
    try:
        meta = json.loads((path / STATE).read_text(encoding="utf-8"))
        tensors = {part: load_file(path / f"{part}.safetensors") for part in meta["parts"]}
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(
            f"checkpoint {path}: damaged: {error}; remove it, and resume=auto takes another"
        ) from error
    return Saved(meta["step"], tensors, meta)


def found(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, complete or not."""
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint; each damaged one on the way is named through ``say``."""
    for path in found(folder):
        why = problem(path, hashes=True)
        if why is None:
            return path
        say(f"passed over checkpoint {path.name}: {why}")
    return None


def remove(path: Path) -> None:
    """Remove a checkpoint; one that is half removed is no longer complete."""
    (path / MARK).unlink(missing_ok=True)
    shutil.rmtree(path)


def drop_after(folder: Path, step: int, say: Callable[[str], None]) -> None:
    """Remove the complete checkpoints of later steps, as a run that goes back must."""
    for path in found(folder):
        if path.name > f"step-{step:07d}" and problem(path) is None:
            say(f"removed checkpoint {path.name}: the run goes on from step {step}")
            remove(path)


def prune(folder: Path, keep: int, best: str | None) -> None:
    """Keep the newest ``keep`` complete checkpoints and the one named ``best``.

    What a save that was cut off left under a temporary name goes too.
    """
    whole = [path for path in found(folder) if problem(path) is None]
    for path in whole[keep:]:
        if path.name != best:
            remove(path)
    for left in folder.glob(".step-*"):
        shutil.rmtree(left)
