"""Rows of log.jsonl, TensorBoard curves and the live progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.run.files import named, write_text


class Meter:
    """Means of logged scalars, summed on the device and read only when a row is written.

    Values that are not finite, those of skipped updates, are left out of a mean; one without any
    finite value is not a number.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def add(self, logs: dict[str, Tensor]) -> None:
        """Add one step's scalars."""
        if not logs:
            return
        values = torch.stack([value.float() for value in logs.values()])
        counts = torch.isfinite(values)
        values, names = torch.where(counts, values, 0.0), tuple(logs)
        if names in self.sums:
            sums, before = self.sums[names]
            self.sums[names] = sums + values, before + counts
        else:
            self.sums[names] = values, counts.float()

    def means(self) -> tuple[list[str], Tensor]:
        """Names and means in one tensor; starts over."""
        names = list(dict.fromkeys(name for group in self.sums for name in group))
        if not names:
            return [], torch.zeros(0)
        place = {name: i for i, name in enumerate(names)}
        total = torch.zeros(2, len(names), device=next(iter(self.sums.values()))[0].device)
        for group, parts in self.sums.items():
            at = torch.tensor([place[name] for name in group], device=total.device)
            total.index_add_(1, at, torch.stack(parts))
        self.sums = {}
        return names, total[0] / total[1]


def peak_memory_bytes() -> int:
    """Most memory held so far: the device's on CUDA, else the process's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_rows(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's log.jsonl; none if it has no log."""
    path = run / "log.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Log:
    """Writes RUN/log.jsonl and RUN/tensorboard.

    Args:
        run: the run's folder.
        step: rows of later steps, left by a run that was cut off, are removed.
        tensorboard: also write TensorBoard files.
    """

    def __init__(self, run: Path, *, step: int = 0, tensorboard: bool = True) -> None:
        self.path = run / "log.jsonl"
        self.seconds = self._cut(step)
        self._handle = self.path.open("ab", buffering=0)
        self._start = time.monotonic() - self.seconds
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = step + 1 if step else None
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=purge)

    def _cut(self, step: int) -> float:
        """Drop rows after ``step`` and torn ones; the seconds that the rest took."""
        if not self.path.is_file():
            return 0.0
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["step"] <= step:
                rows.append(row)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        return float(rows[-1]["seconds"]) if rows else 0.0

    def clock(self) -> float:
        """Seconds of training so far, earlier parts of a resumed run included."""
        return time.monotonic() - self._start

    def row(self, step: int, values: dict[str, Any]) -> None:
        """Write one row; nested numbers also go to TensorBoard. One that is not finite is null.

        Raises:
            OSError: the disk does not take it; the log keeps its whole rows.
        """
        row = {"step": step, "seconds": round(self.clock(), 3), **_strict(values)}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        end = os.fstat(self._handle.fileno()).st_size
        with named(self.path):
            try:
                while line:
                    line = line[self._handle.write(line) :]
            except OSError:
                self._handle.truncate(end)
                raise
        if self._board is not None:
            with named(self.path.with_name("tensorboard")):
                for name, value in _flat(values):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush everything to the disk.

        Raises:
            OSError: the disk does not take it.
        """
        with named(self.path):
            os.fsync(self._handle.fileno())
            self._handle.close()
        if self._board is not None:
            with named(self.path.with_name("tensorboard")):
                self._board.close()


def _strict(value: Any) -> Any:
    """Nested values as JSON has them: NaN and infinity become None."""
    if isinstance(value, dict):
        return {name: _strict(nested) for name, nested in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    out = []
    for name, value in values.items():
        if isinstance(value, dict):
            out += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out.append((prefix + name, float(value)))
    return out
