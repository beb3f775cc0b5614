"""Commands in child processes that start at once: forks of one that has imported everything.

The children run on one thread, so that equal work gives equal bits.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import TypeVar
from unittest import mock

from tests import bugs, faults, kills, strangers
from tests.bugs import BUG
from tests.faults import FAULT
from tests.kills import KILL
from tests.strangers import STRANGERS

T = TypeVar("T")
PRELOAD = (
    "stepdistill.cli",
    "stepdistill.commands.train",
    "stepdistill.commands.export",
    "stepdistill.commands.evaluate",
    "stepdistill.commands.sample",
    "stepdistill.commands.prove",
    "stepdistill.adapters.dit",
    "stepdistill.adapters.unet",
    "sklearn.datasets",
    "typer.main",
    "diffusers.models.transformers.dit_transformer_2d",
    "diffusers.models.unets.unet_2d",
    "diffusers.pipelines.pipeline_utils",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(list(PRELOAD))
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class Child:
    """``stepdistill ARGS`` in a process of its own.

    Args:
        args: of the command line.
        folder: where it runs and leaves its output; made if missing.
        env: added to its environment.
    """

    def __init__(
        self, args: Sequence[str], folder: Path, env: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f".{time.monotonic_ns()}"
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        call = (list(args), folder, self._out, self._err, dict(env or {}))
        self.process = CONTEXT.Process(target=_command, args=call)
        with mock.patch.dict(os.environ, ALONE):
            forkserver.ensure_running()
        self.process.start()

    def wait(self, seconds: float = 600) -> Done:
        """Its end; the test fails if that does not come."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.signal(signal.SIGKILL)
            self.process.join()
            raise AssertionError(f"still running after {seconds} s: {self._err.read_text()}")
        return Done(self.process.exitcode, self._out.read_text(), self._err.read_text())

    def signal(self, number: int) -> None:
        """Send a signal; none where the process has ended."""
        if self.process.is_alive():
            assert self.process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def when(self, ready: Callable[[], bool], seconds: float = 600) -> None:
        """Return as soon as something is so; the test fails if the child ends without it."""
        end, running = time.monotonic() + seconds, True
        while not ready():
            assert running, f"never came to it: {self._err.read_text()}"
            running = self.process.is_alive() and time.monotonic() < end
            time.sleep(0.002)


def _command(args: list[str], folder: Path, out: Path, err: Path, env: dict[str, str]) -> None:
    gc.freeze()  # what was imported before the fork is neither looked through nor copied
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    os.environ.update(env)
    os.chdir(folder)
    for path, stream in ((out, 1), (err, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, stream)
        os.close(handle)
    sys.argv = ["stepdistill", *args]
    if KILL in os.environ:
        kills.install(os.environ[KILL])
    if FAULT in os.environ:
        faults.install(os.environ[FAULT])
    if BUG in os.environ:
        bugs.plant(os.environ[BUG])
    if STRANGERS in os.environ:
        strangers.install(os.environ[STRANGERS])

    from stepdistill.cli import main

    sys.exit(main())


def stepdistill(*args: str, folder: Path, env: Mapping[str, str] | None = None) -> Done:
    """Run a command to its end."""
    return Child(args, folder, env).wait()


class ByMethod(dict[str, T]):
    """What a method's tests share, such as a finished run; made when it is first asked for.

    Args:
        make: makes it for a method of that name.
    """

    def __init__(self, make: Callable[[str], T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, method: str) -> T:
        """Make it."""
        self[method] = self._make(method)
        return self[method]


def ranks(
    args: Sequence[str],
    folder: Path,
    world: int = 2,
    kill: Mapping[int, str] | None = None,
    fault: str | None = None,
) -> list[Child]:
    """The same command in ``world`` processes of one job on the CPU, as torchrun starts them.

    ``kill`` names, by rank, the boundary at which a process kills itself (see tests.kills), and
    ``fault`` what breaks in all of them (see tests.faults).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    size = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    job |= {FAULT: fault} if fault else {}
    own = [{KILL: kill[rank]} if kill and rank in kill else {} for rank in range(world)]
    return [
        Child(
            args, folder, {**job, **size, **own[rank], "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(world)
    ]


def rows(run: Path) -> list[dict]:
    """The whole rows of a run's log.jsonl."""
    log = run / "log.jsonl"
    text = log.read_text() if log.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(run: Path) -> list[dict[str, float]]:
    """The losses of a run, row by row."""
    return [row["losses"] for row in rows(run) if "losses" in row]


def weights(run: Path) -> dict[str, bytes]:
    """The files of a finished student, by name."""
    files = sorted(run.glob("student*/*.safetensors"))
    assert files, f"{run} is not finished"
    return {str(path.relative_to(run)): path.read_bytes() for path in files}
