"""What a trainer is given at a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stepdistill.adapters.cond import Cond


@dataclass(frozen=True)
class Batch:
    """This process's slice of the global batch of one step.

    Args:
        index: places of the samples in the global batch [B], int64; keys of their randomness.
        cond: their conditions.
        x: clean images [B, C, H, W] in [-1, 1]; None for methods that need no data.
        z: the noise that belongs to each image [B, C, H, W], for methods on pairs.
    """

    index: Tensor
    cond: Cond
    x: Tensor | None = None
    z: Tensor | None = None

    def rows(self, index: slice) -> Batch:
        """Some of the samples."""
        x, z = (None if part is None else part[index] for part in (self.x, self.z))
        return Batch(self.index[index], self.cond.rows(index), x, z)

    def __len__(self) -> int:
        return len(self.index)
