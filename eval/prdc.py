"""Precision and recall by nearest-neighbour balls (Kynkaanniemi 2019).

Each set's manifold is the union of balls around its features, each as wide as the distance to that
feature's k-th neighbour. Precision is the share of samples inside the reference's manifold, recall
the share of the reference inside the samples'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.run.errors import UserError


@dataclass(frozen=True)
class PrecisionRecall:
    """Both in [0, 1]."""

    precision: float
    recall: float


def precision_recall(samples: Tensor, reference: Tensor, *, k: int = 3) -> PrecisionRecall:
    """Precision and recall of features [N, D] against reference features [M, D].

    Raises:
        UserError: not more than ``k`` images on a side.
    """
    fewest = min(len(samples), len(reference))
    if fewest <= k:
        raise UserError(f"precision and recall with k={k} need more than {k} images, not {fewest}")
    x, y = samples.double(), reference.double()
    return PrecisionRecall(_covered(x, y, k), _covered(y, x, k))


def _covered(points: Tensor, centres: Tensor, k: int, chunk: int = 1024) -> float:
    """Share of points [N, D] that lie in the ball of at least one of the centres [M, D]."""
    radii = torch.cat(
        [
            torch.cdist(part, centres).kthvalue(k + 1, dim=1).values  # the nearest is itself
            for part in centres.split(chunk)
        ]
    )
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(chunk)]
    return float(torch.cat(inside).double().mean())
