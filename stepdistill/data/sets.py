"""What a set of images is, and the sets that are held in memory.

Shapes: n images asked for, C channels, H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


class ImageSet(ABC):
    """Labelled images of one shape, read by index.

    Attributes:
        name: short name of the source.
        shape: (C, H, W).
        classes: class names by label; empty when the set has no labels.
        in_memory: whether `load` only copies memory.
    """

    name: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    in_memory: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [n, C, H, W] fp32 in [-1, 1] and labels [n] int64 (0 where there are none)."""

    def first(self, num: int) -> tuple[Tensor, Tensor]:
        """:meth:`load` of the first ``num`` images, from the start again if they are fewer."""
        return self.load([place % len(self) for place in range(num)])


class MemorySet(ImageSet):
    """Images held in memory as they were stored, brought to [-1, 1] when read.

    Args:
        name: short name of the source.
        pixels: [N, H, W] grey values in [0, white].
        labels: [N] int64.
        classes: class names by label.
        white: the value of a white pixel.
        size: side to resample to (area means when smaller, bilinear when larger).
        channels: 1, or 3 for the grey value repeated.
    """

    in_memory = True

    def __init__(
        self,
        name: str,
        pixels: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        *,
        white: float,
        size: int | None = None,
        channels: int | None = None,
    ) -> None:
        self.name, self.classes = name, tuple(classes)
        self._pixels = pixels[:, None] if size is None else resample(pixels[:, None], size)
        self._labels, self._white = labels.long(), white
        height, width = self._pixels.shape[2:]
        self.shape = (channels or 1, height, width)

    def __len__(self) -> int:
        return len(self._labels)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [n, C, H, W] in [-1, 1] and labels [n]."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        images = self._pixels[index].float().mul_(2 / self._white).sub_(1)
        return images.expand(-1, self.shape[0], -1, -1).contiguous(), self._labels[index]


def resample(images: Tensor, size: int) -> Tensor:
    """Images [N, C, H, W] at side ``size``, fp32: area means going down, bilinear going up."""
    if tuple(images.shape[2:]) == (size, size):
        return images
    parts = []
    for part in images.split(4096):
        if size <= min(part.shape[2:]):
            parts.append(functional.interpolate(part.float(), (size, size), mode="area"))
        else:
            parts.append(functional.interpolate(part.float(), (size, size), mode="bilinear"))
    return torch.cat(parts)
