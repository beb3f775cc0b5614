"""The 1,797 handwritten digits of scikit-learn, 8x8 grey, ten classes."""

from __future__ import annotations

import torch

from stepdistill.data.sets import MemorySet


def open_digits(size: int | None = None, channels: int | None = None) -> MemorySet:
    """The digits with grey values 0..16 brought to [-1, 1] by x/8 - 1."""
    from sklearn.datasets import load_digits  # slow to import

    bunch = load_digits()
    return MemorySet(
        "digits",
        torch.from_numpy(bunch.images).byte(),
        torch.from_numpy(bunch.target),
        [str(digit) for digit in range(10)],
        white=16,
        size=size,
        channels=channels,
    )
