"""The clean interpreters in which an export draws, forked from one that has imported diffusers.

It never imports stepdistill, and cannot: a fork is as much a stranger to it as a fresh interpreter,
and starts at once. That a fresh one does as well is for tests/test_cli.py and test_pipelines.py.
"""

from __future__ import annotations

import atexit
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STRANGERS = "STEPDISTILL_TEST_STRANGERS"
SERVER = """
import json, os, select, socket, sys, tempfile, traceback
sys.modules["stepdistill"] = None
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DModel
from diffusers.schedulers import scheduling_utils
from safetensors.torch import save_file

def work(order, err):
    os.dup2(err.fileno(), 2)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    for module in list(sys.modules.values()):  # it is read at import
        if "HF_MODULES_CACHE" in vars(module or os):
            module.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]
    sys.argv = ["-c", *order["args"]]
    exec(order["code"], {"__name__": "__main__"})

with socket.socket(socket.AF_UNIX) as door:
    door.bind(sys.argv[1])
    door.listen()
    while sys.stdin not in select.select([door, sys.stdin], [], [])[0]:  # which ends with the tests
        line = door.accept()[0]
        order = json.loads(line.makefile().readline())
        err = tempfile.TemporaryFile("w+")
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work(order, err)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        err.seek(0)
        line.sendall(json.dumps({"returncode": code, "stderr": err.read()}).encode())
        line.close()
"""


@cache
def strangers() -> dict[str, str]:
    """The variable that has a child's exports drawn by forks; starts what they are forked from."""
    folder = tempfile.TemporaryDirectory(prefix="strangers-")
    door = Path(folder.name, "door")
    command = [sys.executable, "-c", SERVER, str(door)]
    server = subprocess.Popen(command, cwd=folder.name, stdin=subprocess.PIPE)
    atexit.register(folder.cleanup)
    atexit.register(server.wait)
    atexit.register(server.kill)
    while not door.exists():
        assert server.poll() is None, "the strangers' interpreter did not start"
        time.sleep(0.01)
    return {STRANGERS: str(door)}


def install(door: str) -> None:
    """Have this process's exports drawn by forks; for good, so only in a child."""
    from stepdistill.pipelines import verify

    def run(
        command: Sequence[str], *, cwd: str, env: Mapping[str, str], **_: Any
    ) -> subprocess.CompletedProcess[str]:
        assert list(command[:2]) == [sys.executable, "-c"]
        order = {"code": command[2], "args": command[3:], "cwd": cwd, "env": dict(env)}
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(door)
            line.sendall(json.dumps(order).encode() + b"\n")
            done = json.loads(line.makefile().read())
        return subprocess.CompletedProcess(command, done["returncode"], "", done["stderr"])

    verify.subprocess = SimpleNamespace(run=run)
