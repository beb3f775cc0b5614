"""Blocks that all processes of a job leave well, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stepdistill.run.errors import UserError


@contextmanager
def together(mean: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A block at whose end every process learns whether all came through; also a barrier.

    The one that failed goes on with its own error. The others would wait for it for ever, so they
    end too.

    Args:
        mean: of a tensor over processes.

    Raises:
        UserError: another process failed.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        share = float(mean(torch.tensor(float(failed))))
    if share > 0:
        raise UserError("another process of the job could not go on; its own line tells why")
