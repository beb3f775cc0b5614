"""Trainings side by side, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Fleet:
    """Child processes, as many at a time as there are cores, or one where there is a GPU.

    One thread each is the fastest use of few cores for networks as small as the shipped ones.

    Args:
        count: how many there will be; fewer than cores get more threads each.
    """

    def __init__(self, count: int) -> None:
        self.cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
        threads = str(max(1, self.cores // max(1, count)))
        self.env = {**os.environ, "OMP_NUM_THREADS": threads, "TTY_COMPATIBLE": "0"}
        self.children: list[subprocess.Popen[bytes]] = []
        self.over = False

    def each(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """``work`` of every item, in threads; children that are left at an interrupt are ended."""
        with ThreadPoolExecutor(self.cores) as pool:
            try:
                return list(pool.map(work, items))
            except BaseException:
                self.over = True
                pool.shutdown(wait=False, cancel_futures=True)
                for child in self.children:
                    child.terminate()
                raise

    def run(self, *arguments: str) -> int:
        """Run ``python -m`` with these arguments, its output left out; returns its exit code."""
        if self.over:  # an interrupt came first
            return 1
        child = subprocess.Popen(
            [sys.executable, "-m", *arguments], env=self.env, stdout=subprocess.DEVNULL
        )
        self.children.append(child)
        return child.wait()

    def train(self, config: str, run: Path, *keys: str) -> int:
        """Train a config into a folder, or go on with what is there; returns the exit code."""
        own = (f"run={run}", "resume=auto", "log.tensorboard=false")
        return self.run("stepdistill", "train", config, *own, *keys)
