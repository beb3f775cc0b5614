"""The probability-flow map of an oracle from one time to another, in closed form where it has one.

Gaussians stretch along their axes (rho^2 = alpha^2 s^2 + sigma^2 is the variance along one), laws
on a line follow their quantiles, and everything else is integrated.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.oracles import line
from stepdistill.oracles.denoiser import Oracle
from stepdistill.oracles.integrate import integrate
from stepdistill.oracles.line import Line
from stepdistill.oracles.mixture import Mixture, double

LEAST_ANGLE = 1e-5  # below it a state flows to point masses by one step, exact to rounding

Form = Literal["gaussian", "quantile", "integral"]


def form(law: Mixture | None) -> Form:
    """How the flow of a law is known; None is a law without a closed form."""
    if law is None or (len(law) > 1 and law.dim > 1):
        return "integral"
    return "gaussian" if len(law) == 1 else "quantile"


@torch.no_grad()
def flow_map(
    oracle: Oracle,
    x_t: Tensor,
    t: Tensor | float,
    s: Tensor | float,
    cond: Cond | None = None,
    guidance: float = 1.0,
    *,
    closed: bool = True,
) -> Tensor:
    """Where the probability flow takes states from times t to times s, either way.

    Args:
        oracle: the teacher.
        x_t: states [B, *S].
        t: their times, one or [B].
        s: the times to go to, one or [B].
        cond: the classes.
        guidance: scale of classifier-free guidance; 1 is none.
        closed: use closed forms; without, all is integrated (the two check each other).

    Returns:
        The states at s [B, *S], fp64; integrated ones are good to about 1e-8.

    Raises:
        ValueError: a state on a point mass at time 0: it has no way back to noise.
    """
    y = double(x_t).flatten(1)
    c = [oracle.process.coefs(double(v).to(y.device).expand(len(y))) for v in (t, s)]
    start, stop = ((v.alpha, v.sigma) for v in c)
    label = None if cond is None else cond.label
    out = torch.empty_like(y)
    for one in [None] if label is None else label.unique().tolist():
        at = slice(None) if label is None else label == one
        law = oracle.law(one, guidance)
        here, there = ((a[at], b[at]) for a, b in (start, stop))
        if bool((here[1] == 0).any()) and not _smooth(oracle):
            raise ValueError("flow_map: point masses have no way back from time 0; start above it")
        if law is None or not closed or form(law) == "integral":
            kept = None if label is None else label[at]
            out[at] = _integral(oracle, y[at], here, there, kept, guidance)
        elif form(law) == "gaussian":
            out[at] = _gaussian(law, y[at], here, there)
        else:
            src, dst = (_noised_line(law, *end) for end in (here, there))
            out[at] = line.transport(src, dst, y[at][:, 0])[:, None]
    return out.reshape(x_t.shape)


def _smooth(oracle: Oracle) -> bool:
    """Whether no component is a point along any axis."""
    return bool((oracle.net.stds != 0).all())


def _gaussian(
    law: Mixture, y: Tensor, start: tuple[Tensor, Tensor], stop: tuple[Tensor, Tensor]
) -> Tensor:
    before, after = (
        ((a[:, None] * law.stds).square() + b[:, None].square()).sqrt() for a, b in (start, stop)
    )
    gap = y - start[0][:, None] * law.means
    axes = None if law.axes is None else law.axes[0]
    own = gap if axes is None else gap @ axes
    moved = after / before * own
    return stop[0][:, None] * law.means + (moved if axes is None else moved @ axes.T)


def _noised_line(law: Mixture, alpha: Tensor, sigma: Tensor) -> Line:
    """The laws of the states of one coordinate, each at its own time."""
    clean, a, b = law.line(), alpha[:, None], sigma[:, None]
    stds = ((a * clean.stds).square() + b.square()).sqrt()
    return Line(clean.log_weights, a * clean.means, stds)


def _integral(
    oracle: Oracle,
    y: Tensor,
    start: tuple[Tensor, Tensor],
    stop: tuple[Tensor, Tensor],
    label: Tensor | None,
    guidance: float,
) -> Tensor:
    """By the angle phi in cos(phi) x + c sin(phi) z, c near the data's size: regular at both ends.

    Both of an oracle's estimates are bounded there, at pure noise and at clean data.
    """
    law = oracle.law()
    assert law is not None
    size = math.sqrt(float(law.covariance().diagonal().mean())) or 1.0

    def estimates(state: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        a, b = angle.cos(), size * angle.sin()
        x, z = oracle.net.estimates(state, a, b, label)
        if guidance != 1:
            x0, z0 = oracle.net.estimates(state, a, b)
            x, z = x0 + guidance * (x - x0), z0 + guidance * (z - z0)
        return x, z

    def slope(state: Tensor, angle: Tensor) -> Tensor:
        x, z = estimates(state, angle)
        return size * angle.cos()[:, None] * z - angle.sin()[:, None] * x

    angles = [torch.atan2(b, size * a) for a, b in (start, stop)]
    radii = [torch.hypot(a, b / size)[:, None] for a, b in (start, stop)]
    end = angles[1]
    if not _smooth(oracle):
        end = torch.maximum(end, torch.full_like(end, LEAST_ANGLE).minimum(angles[0]))
    state = integrate(slope, y / radii[0], angles[0], end, scale=size)
    if not _smooth(oracle):
        x, z = estimates(state, end)
        last = angles[1][:, None]
        near = last.cos() * x + size * last.sin() * z
        state = torch.where((angles[1] < end)[:, None], near, state)
    return radii[1] * state
