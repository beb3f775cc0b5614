"""What a row says of a run's health: parts on the device, ratios of their means on the host.

The mean of a ratio over processes or steps is not the ratio of the whole batch. So a step logs
numerators and denominators, whose names begin with a dot, and a row forms the ratios after it has
taken the means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

SATURATED = 0.99


@torch.no_grad()
def sample_parts(x: Tensor) -> dict[str, Tensor]:
    """Mean, mean square and saturation of clean samples [B, ...], pixels in [-1, 1]."""
    x = x.detach()
    full = (x.abs() > SATURATED).float().mean()
    return {"saturation": full, ".x": x.mean(), ".xx": x.square().mean()}


@torch.no_grad()
def gap_parts(
    fake: Tensor, real: Tensor, target: Tensor, reference: Tensor, weight: Tensor | None = None
) -> dict[str, Tensor]:
    """Parts of the ratios that compare a fake score with the teacher and with its own aim.

    With u = D_F - D_T and e = D_F - x: mean u^2, <u, e> and e^2 under ``weight``, and plain means
    of u^2 and (reference - D_T)^2.

    Args:
        fake: the fake score's clean estimate D_F [B, ...].
        real: the teacher's D_T.
        target: an unbiased stand-in x for the clean sample, whose mean given x_t a perfect fake
            score would be.
        reference: the student's clean estimate.
        weight: of each entry, a function of the time alone; 1 if left out.
    """
    fake, real = fake.detach(), real.detach()
    u, e = fake - real, fake - target.detach()
    wu, we = (u, e) if weight is None else (weight * u, weight * e)
    gap = (u * u).mean()
    return {
        ".gap": gap,
        ".miss": (reference.detach() - real).square().mean(),
        ".own": gap if weight is None else (wu * u).mean(),
        ".cross": (wu * e).mean(),
        ".error": (we * e).mean(),
    }


def figures(means: Mapping[str, float]) -> dict[str, float]:
    """A row's losses: the means as they are, and the ratios in place of their parts.

    ``gap_norm`` is the root mean square of the gap in that of the student's distance to the
    teacher's estimate. ``lag`` is <u, e> / <u, u>: 0 for a converged fake score, since e is then
    orthogonal to every function of x_t, and 1 where the whole gap is stale. ``critic/excess`` is
    <u, e>^2 / (<u, u> <e, e>), the share of the fake score's squared error that a step along u
    would take away: at least so much of its loss lies above the floor. ``sample_mean`` and
    ``sample_std`` are over all entries of the samples. A ratio to nothing is 0.
    """
    shown = {name: value for name, value in means.items() if "/." not in name}
    for player in dict.fromkeys(name.split("/.")[0] for name in means if "/." in name):

        def part(name: str, player: str = player) -> float:
            return means[f"{player}/.{name}"]

        if f"{player}/.own" in means:
            shown[f"{player}/gap_norm"] = math.sqrt(_ratio(part("gap"), part("miss")))
            shown[f"{player}/lag"] = _ratio(part("cross"), part("own"))
            floor = part("own") * part("error")
            shown["critic/excess"] = _ratio(part("cross") ** 2, floor)
        if f"{player}/.x" in means:
            mean, square = part("x"), part("xx")
            shown[f"{player}/sample_mean"] = mean
            shown[f"{player}/sample_std"] = math.sqrt(max(0.0, square - mean * mean))
    return shown


def _ratio(part: float, whole: float) -> float:
    """A share; 0 of nothing, and not a number where either is none."""
    return part / whole if whole != 0 else part * 0.0
