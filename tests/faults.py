"""Faults for the child processes of the tests: what breaks, and when, by an environment variable.

The variable STEPDISTILL_TEST_FAULT names a fault and, after a colon, the step or size it needs:

    teacher:N   the teacher's output is NaN from its Nth pass on
    image:K     image K of the data is NaN
    gradient:N  the student's gradient is NaN at step N alone
    gradients:N from step N on
    critic:N    the critic's weights grow tenfold a step from step N on
    slow:SECONDS  each file of a checkpoint takes so long, the first waits for a signal before; a
                file named saving shows it has begun
    signal:N    step N waits for a signal: in the last process where there are several
    shard:N     so does pair shard N
    refuse:N    the checkpoint of step N is refused by the disk
    size:BYTES  no file may grow beyond that
    fill:N      the run's disk is full from the row of step N on; a file named filler holds it
"""

from __future__ import annotations

import errno
import math
import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

FAULT = "STEPDISTILL_TEST_FAULT"


def install(fault: str) -> None:
    """Break this process for good."""
    name, _, number = fault.partition(":")
    FAULTS[name](float(number))


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Have ``owner.name(...)`` call ``wrapper(original, ...)``."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **keys: wrapper(original, *args, **keys))


def _teacher(number: float) -> None:
    from stepdistill.commands import equip

    def load(original: Any, *args: Any) -> Any:
        teacher, passes = original(*args), []

        def spoil(module: Any, given: Any, out: Any) -> Any:
            if module is not teacher.net:  # a player that began as its copy
                return out
            passes.append(None)
            return (out[0] * math.nan,) if len(passes) > number else out

        teacher.net.register_forward_hook(spoil)
        return teacher

    _wrap(equip, "load_teacher", load)


def _image(number: float) -> None:
    from stepdistill.data.loader import Loader

    def begin(original: Any, loader: Any, data: Any, *args: Any, **keys: Any) -> None:
        load = data.load

        def spoilt(positions: list[int]) -> Any:
            x, label = load(positions)
            x = x.clone()
            x[[place == number for place in positions]] = math.nan
            return x, label

        data.load = spoilt
        original(loader, data, *args, **keys)

    _wrap(Loader, "__init__", begin)


def _of_steps(bad: Callable[[int], bool], spoil: Callable[[Any], None], player: str) -> None:
    """Spoil a player just before its updates of the steps that are bad."""
    from stepdistill.run.player import Player

    def step(original: Any, own: Player) -> None:
        if own.name == player and bad(own.updates):
            spoil(own)
        original(own)

    _wrap_method(Player, "step", step)


def _wrap_method(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """The same where the owner is a class: ``wrapper(original, self, ...)``."""
    original = getattr(owner, name)

    def method(self: Any, *args: Any) -> Any:
        return wrapper(original, self, *args)

    setattr(owner, name, method)


def _nan_gradient(player: Any) -> None:
    player.params[0].grad.mul_(math.nan)


def _explode(player: Any) -> None:
    import torch

    with torch.no_grad():
        for param in player.params:
            param.mul_(3.0)


def _slow(seconds: float) -> None:
    from stepdistill.run import checkpoint

    def save_file(original: Any, tensors: Any, path: Path) -> None:
        if not Path("saving").exists():
            heard = _listen()
            Path("saving").touch()
            heard()
        time.sleep(seconds)
        original(tensors, path)

    _wrap(checkpoint, "save_file", save_file)


def _listen() -> Callable[[], None]:
    """From now on hear SIGTERM and SIGINT, whose handlers go on; what is given waits for one."""
    came: list[int] = []
    for kind in (signal.SIGTERM, signal.SIGINT):
        _hear(kind, came)

    def wait() -> None:
        end = time.monotonic() + 60
        while not came and time.monotonic() < end:
            time.sleep(0.002)

    return wait


def _hear(kind: int, came: list[int]) -> None:
    handler = signal.getsignal(kind)

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        if callable(handler):
            handler(number, frame)

    signal.signal(kind, handle)


def _signal(number: float) -> None:
    from stepdistill.trainers.loop import Loop

    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    heard: list[Callable[[], None]] = []

    def begin(original: Any, loop: Any, trainer: Any, *args: Any, **keys: Any) -> None:
        _wrap(trainer, "step", step)
        original(loop, trainer, *args, **keys)

    def step(original: Any, now: int, *args: Any) -> Any:
        if not heard:  # now the loop has its own handlers
            heard.append(_listen())
        if last and now == number:
            heard[0]()
        return original(now, *args)

    _wrap(Loop, "__init__", begin)


def _shard(number: float) -> None:
    from stepdistill.data.pairs import folder

    def write_bytes(original: Any, path: Path, data: bytes) -> None:
        if path.name == f"pairs-{int(number):06d}.safetensors":
            _listen()()
        original(path, data)

    _wrap(folder, "write_bytes", write_bytes)


def _refuse(number: float) -> None:
    from stepdistill.run import checkpoint

    def save_file(original: Any, tensors: Any, path: Path) -> None:
        original(tensors, path)
        if path.parent.name.startswith(f".step-{int(number):07d}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _wrap(checkpoint, "save_file", save_file)


def _size(number: float) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), int(number)))


def _fill(number: float) -> None:
    from stepdistill.run.log import Log

    def row(original: Any, own: Log, step: int, values: Any) -> None:
        if step == number:
            with (own.path.parent / "filler").open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
        original(own, step, values)

    _wrap_method(Log, "row", row)


FAULTS: dict[str, Callable[[float], None]] = {
    "teacher": _teacher,
    "image": _image,
    "gradient": lambda n: _of_steps(lambda step: step == n, _nan_gradient, "student"),
    "gradients": lambda n: _of_steps(lambda step: step >= n, _nan_gradient, "student"),
    "critic": lambda n: _of_steps(lambda step: step >= n, _explode, "critic"),
    "slow": _slow,
    "signal": _signal,
    "shard": _shard,
    "refuse": _refuse,
    "size": _size,
    "fill": _fill,
}
