"""Ends by kill -9 at one exact boundary of a run, for the child processes of the tests.

The variable STEPDISTILL_TEST_KILL names a boundary, and in most a number after a colon:

    step:N    before the turns of step N
    turn:N    in step N, after the first player's update: between the turns where there are two
    phase     as soon as a trainer's players have changed
    files:N   in the checkpoint of step N, after the first of its files
    mark:N    between the renaming of that checkpoint's folder and its COMPLETE
    remove:N  between the loss of that checkpoint's COMPLETE and that of its files
    shard:N   in pair shard N, of which half lies under a temporary name
    student   before the finished student's folder is renamed
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

KILL = "STEPDISTILL_TEST_KILL"


def install(boundary: str) -> None:
    """Have this process kill itself at a boundary; for good, so only in a child."""
    name, _, number = boundary.partition(":")
    BOUNDARIES[name](int(number or -1))


def die(*_: Any, **__: Any) -> None:
    """End this process as the kernel does; one of several once the others had time to come here."""
    time.sleep(0.2 * (os.environ.get("WORLD_SIZE", "1") != "1"))
    os.kill(os.getpid(), signal.SIGKILL)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Have ``owner.name(...)`` call ``wrapper(original, ...)``."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **keys: wrapper(original, *args, **keys))


def _of_trainer(name: str, wrapper: Callable[..., Any]) -> None:
    """Wrap a method of the trainer that a loop is given, whatever class overrides it."""
    from stepdistill.trainers.loop import Loop

    def begin(original: Any, loop: Any, trainer: Any, *args: Any, **keys: Any) -> None:
        _wrap(trainer, name, wrapper)
        original(loop, trainer, *args, **keys)

    _wrap(Loop, "__init__", begin)


def _step(number: int) -> None:
    def step(original: Any, now: int, *args: Any) -> Any:
        return die() if now == number else original(now, *args)

    _of_trainer("step", step)


def _turn(number: int) -> None:
    from stepdistill.run.player import Player

    reached: list[int] = []

    def step(original: Any, now: int, *args: Any) -> Any:
        reached.append(now)
        return original(now, *args)

    def update(original: Any, *args: Any) -> None:
        original(*args)
        if reached[-1] == number:
            die()

    _of_trainer("step", step)
    _wrap(Player, "step", update)


def _phase(_: int) -> None:
    def prepare(original: Any, now: int) -> None:
        before = set(original.__self__.players)
        original(now)
        if set(original.__self__.players) != before:
            die()

    _of_trainer("prepare", prepare)


def _files(number: int) -> None:
    from stepdistill.run import checkpoint

    def save_file(original: Any, tensors: Any, path: Path) -> None:
        original(tensors, path)
        if path.parent.name.startswith(f".step-{number:07d}"):
            die()

    _wrap(checkpoint, "save_file", save_file)


def _mark(number: int) -> None:
    from stepdistill.run import checkpoint

    def write_text(original: Any, path: Path, text: str) -> None:
        if path.name == checkpoint.MARK and path.parent.name == f"step-{number:07d}":
            die()
        original(path, text)

    _wrap(checkpoint, "write_text", write_text)


def _remove(number: int) -> None:
    def rmtree(original: Any, path: Any, *args: Any, **keys: Any) -> None:
        if Path(path).name == f"step-{number:07d}":
            die()
        original(path, *args, **keys)

    _wrap(shutil, "rmtree", rmtree)


def _shard(number: int) -> None:
    from stepdistill.data.pairs import folder

    def write_bytes(original: Any, path: Path, data: bytes) -> None:
        if path.name != f"pairs-{number:06d}.safetensors":
            return original(path, data)
        with mock.patch.object(Path, "replace", die):
            original(path, data[: len(data) // 2])

    _wrap(folder, "write_bytes", write_bytes)


def _student(_: int) -> None:
    from stepdistill.trainers import loop

    @contextmanager
    def whole_folder(original: Any, out: Path) -> Iterator[Path]:
        with original(out) as temp:
            yield temp
            die()

    _wrap(loop, "whole_folder", whole_folder)


BOUNDARIES: dict[str, Callable[[int], None]] = {
    "step": _step,
    "turn": _turn,
    "phase": _phase,
    "files": _files,
    "mark": _mark,
    "remove": _remove,
    "shard": _shard,
    "student": _student,
}
