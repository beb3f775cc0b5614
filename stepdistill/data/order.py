"""Which images a step uses: a pure function of the step, so a resumed run needs nothing saved."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from stepdistill.run.errors import UserError

_STREAM = 1  # sets these words apart from any other use of the same seed


def batch_positions(step: int, batch_size: int, n: int, seed: int) -> npt.NDArray[np.int64]:
    """Data indices [batch_size] of one global batch.

    Every epoch is a fresh permutation; what is left of an epoch opens the next batch, so no image
    is dropped and after k n places each image was used k times.

    Args:
        step: from 0.
        batch_size: images in the global batch of all processes.
        n: images in the set.
        seed: the run's seed.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, slots = np.divmod(places, n)
    out = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = _permutation(n, seed, int(epoch))[slots[here]]
    return out


def share(batch_size: int, rank: int, world: int) -> slice:
    """The slice of the global batch that process ``rank`` of ``world`` works on.

    Raises:
        UserError: the batch does not divide evenly.
    """
    if batch_size % world:
        raise UserError(
            f"batch_size={batch_size} does not divide among {world} processes; "
            f"take a multiple of {world}, such as {-(-batch_size // world) * world}"
        )
    part = batch_size // world
    return slice(rank * part, (rank + 1) * part)


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation by sorting raw Philox words, whose stream numpy keeps for every version."""
    words = np.random.Philox(key=seed % 2**64, counter=[0, 0, epoch, _STREAM]).random_raw(n)
    order = np.argsort(words, kind="stable").astype(np.int64, copy=False)
    order.setflags(write=False)
    return order
