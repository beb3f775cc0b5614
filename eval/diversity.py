"""How different samples are from each other, measured in pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.run.errors import UserError


def mean_pairwise_distance(images: Tensor, *, chunk: int = 1024) -> float:
    """Mean Euclidean distance over all N (N - 1) / 2 pairs of images [N, C, H, W] in [-1, 1].

    Raises:
        UserError: fewer than two images.
    """
    count = len(images)
    if count < 2:
        raise UserError(f"diversity needs at least 2 images, not {count}")
    parts = images.flatten(1).double().split(chunk)
    total = 0.0
    for row, part in enumerate(parts):
        total += float(torch.nn.functional.pdist(part).sum())
        total += sum(float(torch.cdist(part, other).sum()) for other in parts[row + 1 :])
    return total / (count * (count - 1) / 2)
