"""Batches in the order of `stepdistill.data.order`, read ahead and sent to the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from stepdistill.data.order import batch_positions, share
from stepdistill.data.sets import ImageSet
from stepdistill.run.errors import UserError

_Loaded = tuple[Tensor, Tensor]


class Loader:
    """Endless batches ``(step, x, label)`` of one process's share of the global batch.

    ``x`` is [b, C, H, W] fp32 in [-1, 1] and ``label`` [b] int64, both on ``device``, with
    b = batch_size / world. Sets in memory are read in place; others ``workers`` batches ahead.
    Use it as a context manager, or call `close`.

    Args:
        data: the images.
        batch_size: images in the global batch.
        seed: decides the order.
        start: the first step, so that a resumed run continues where it was.
        rank: this process.
        world: number of processes.
        workers: batches read ahead; 0 reads when asked.
        device: where batches are wanted.

    Raises:
        UserError: the batch does not divide among the processes; or, while iterating, a batch that
            cannot be read.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        seed: int,
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        self.data, self.batch_size, self.seed, self.step = data, batch_size, seed, start
        self.device = torch.device(device)
        self._pinned = self.device.type == "cuda"
        self._share = share(batch_size, rank, world)
        self._ahead = 0 if data.in_memory else workers
        self._pool = ThreadPoolExecutor(self._ahead, "loader") if self._ahead else None
        self._queue: deque[Future[_Loaded]] = deque()

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[int, Tensor, Tensor]:
        step = self.step
        x, label = self._read(step) if self._pool is None else self._next_read(self._pool)
        self.step += 1
        pinned = self._pinned
        return (
            step,
            x.to(self.device, non_blocking=pinned),
            label.to(self.device, non_blocking=pinned),
        )

    def close(self) -> None:
        """Drop what was read ahead and end the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._queue.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _next_read(self, pool: ThreadPoolExecutor) -> _Loaded:
        while len(self._queue) <= self._ahead:
            self._queue.append(pool.submit(self._read, self.step + len(self._queue)))
        loaded = self._queue[0].result()  # an error stays at the head: the step is not passed over
        self._queue.popleft()
        return loaded

    def _read(self, step: int) -> _Loaded:
        positions = batch_positions(step, self.batch_size, len(self.data), self.seed)
        try:
            x, label = self.data.load(positions[self._share].tolist())
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"data {self.data.name}: step {step} cannot be read: {error}"
            ) from error
        if self._pinned:
            return x.pin_memory(), label.pin_memory()
        return x, label
