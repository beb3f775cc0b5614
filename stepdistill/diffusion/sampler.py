"""One sampler for training rollouts, evaluation and exported pipelines; and single solver steps.

Every step predicts, then moves to x' = alpha' x + sigma' n. Only n differs: the predicted noise
(Euler's method on the probability flow, the same as DDIM), fresh noise (consistency, DMD), or
the initial noise (straight flows). Heun's method predicts a second time where such a step leads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser, Prediction
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.process import Process, expand
from stepdistill.diffusion.timesteps import Grid

NoiseSource = Literal["predicted", "fresh", "initial", "heun"]


class Sampled(Protocol):
    """What can be sampled: a :class:`Denoiser`, or :class:`Experts` by level."""

    process: Process

    def at(self, level: float) -> Denoiser:
        """The denoiser that owns a time."""


def full(like: Tensor, level: float) -> Tensor:
    """The time ``level`` for every sample of ``like``: [B], fp32."""
    return torch.full((len(like),), level, device=like.device, dtype=torch.float32)


def first_state(process: Process, z: Tensor, level: float) -> Tensor:
    """The state sigma z of pure noise z [B, ...] at the time ``level``: where sampling begins."""
    return expand(process.coefs(full(z, level)).sigma, z) * z


def move(pred: Prediction, process: Process, level: Tensor, noise: Tensor | None = None) -> Tensor:
    """The state alpha' x + sigma' n at times ``level`` [B]; n is the predicted noise if not given.

    With the predicted noise this is one DDIM step, exact for constant predictions.
    """
    c = process.coefs(level).expand(pred.x_t)
    return c.alpha * pred.x + c.sigma * (pred.z if noise is None else noise)


def sample(
    den: Sampled,
    z: Tensor,
    grid: Grid,
    cond: Cond,
    *,
    noise: NoiseSource = "predicted",
    fresh: Callable[[int], Tensor] | None = None,
    guidance: float = 1.0,
    clip: float | None = None,
    stop: int | None = None,
) -> Tensor:
    """Walk the grid from noise; return the state at its end, or at ``grid[stop]``.

    Args:
        den: what predicts.
        z: standard normal noise [B, C, *S].
        grid: decreasing times, from the noisiest to 0; for ``noise="heun"`` each inner one twice.
        noise: where each step's noise comes from; heun: predicted, in steps of the second order.
        fresh: for ``noise="fresh"``, the noise [B, C, *S] that step i (from 1) ends with.
        guidance: classifier-free guidance scale; 1 is none.
        clip: clamp clean estimates to [-clip, clip], for pixels.
        stop: leave after this many steps.

    Raises:
        ValueError: fresh noise was asked for without its source, or Heun's steps by a grid of
            times that are not there twice.
    """
    if noise == "heun" and grid[1:-1:2] != grid[2:-1:2]:
        raise ValueError("sample: noise='heun' needs each inner time of the grid twice, see twice")
    if noise == "fresh" and fresh is None and len(grid) > 2:
        raise ValueError("sample: noise='fresh' needs fresh=, the source of each step's noise")
    process = den.process
    x_t, before = first_state(process, z, grid[0]), None
    for i in range(len(grid) - 1 if stop is None else stop):
        owner = den.at(grid[i])
        told = cond.ending(full(z, grid[i + 1])) if owner.ends else cond
        pred = guided(owner, x_t, full(z, grid[i]), told, guidance)
        if clip is not None:
            pred.clip(clip)
        if grid[i + 1] == 0:
            return pred.x
        if noise == "heun" and before is not None:
            x_t, before = averaged(before, pred), None
            continue
        before = pred
        n = z if noise == "initial" else None
        if noise == "fresh" and fresh is not None:
            n = fresh(i + 1)
        x_t = move(pred, process, full(z, grid[i + 1]), n)
    return x_t


def averaged(first: Prediction, second: Prediction) -> Tensor:
    """The state of ``second``, which the step from ``first`` has led to, by the mean of both slopes
    in rectified flow's coordinates."""
    sizes = [c.alpha + c.sigma for c in (first.c, second.c)]
    width = second.c.sigma / sizes[1] - first.c.sigma / sizes[0]
    return sizes[1] * (first.x_t / sizes[0] + width / 2 * (first.drift + second.drift))


def twice(grid: Grid) -> Grid:
    """The times of Heun's walk by a grid: each inner one twice."""
    inner = (time for time in grid[1:-1] for _ in range(2))
    return (grid[0], *inner, grid[-1])


def heun_step(
    den: Denoiser, x_t: Tensor, t: Tensor, r: Tensor, cond: Cond, scale: float | Tensor = 1.0
) -> Tensor:
    """One second-order step from times t to r [B], in the coordinates where Euler is DDIM.

    Variance-exploding coordinates (x_t / alpha against n) for EDM and VP, rectified-flow ones
    (x_t / (alpha + sigma) against sigma / (alpha + sigma)) for the rest. A sample whose r is 0
    ends with the first-order step.
    """
    process = den.process
    exploding = process.name in ("edm", "vp")
    a, b = (process.coefs(v).expand(x_t) for v in (t, r))
    size_a, size_b = (c.alpha if exploding else c.alpha + c.sigma for c in (a, b))
    first = guided(den, x_t, t, cond, scale)
    euler = move(first, process, r)
    floor = torch.full_like(r, max(process.t_min, 1e-4))
    second = guided(den, euler, torch.maximum(r, floor), cond, scale)
    slopes = [p.z if exploding else p.z - p.x for p in (first, second)]
    width = b.sigma / size_b - a.sigma / size_a
    heun = size_b * (x_t / size_a + width * (slopes[0] + slopes[1]) / 2)
    return torch.where(expand(r > 0, x_t), heun, euler)
