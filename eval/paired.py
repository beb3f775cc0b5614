"""How near pictures are to those that they stand for, one by one.

Shapes: N pictures, C channels, H W pixels; values in [-1, 1].
"""

from __future__ import annotations

from torch import Tensor

from stepdistill.eval.features import FeatureExtractor, extract

LEAST_ERROR = 1e-10  # mean square below which two pictures count as one: 100 dB


def psnr(made: Tensor, real: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [N] in decibels, of pixels in [0, 1], to 100 at most."""
    error = ((made - real) / 2).square().flatten(1).mean(dim=1)
    return -10 * error.clamp_min(LEAST_ERROR).log10()


def feature_distance(extractor: FeatureExtractor, made: Tensor, real: Tensor) -> Tensor:
    """Distances [N] of the pictures' features, each over the mean norm of the real ones'.

    Like LPIPS it compares what a network sees, of one layer and without learned weights: features
    are those of the extractor, which names them.
    """
    found, goal = extract(extractor, made), extract(extractor, real)
    apart: Tensor = (found - goal).norm(dim=1)
    size: Tensor = goal.norm(dim=1).mean().clamp_min(1e-12)
    return apart / size
