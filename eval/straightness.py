"""How straight a flow's paths are, from noise to image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.process import Process
from stepdistill.diffusion.sampler import Sampled, first_state, full, move
from stepdistill.diffusion.timesteps import Grid

STEPS = 32


@torch.no_grad()
def flow_path(
    den: Sampled, z: Tensor, top: float, cond: Cond, *, guidance: float = 1.0, steps: int = STEPS
) -> tuple[list[Tensor], Tensor]:
    """States of an Euler walk in steps that are even in rectified flow's time, in its coordinates.

    There lines are straight whatever the process.

    Args:
        den: what predicts.
        z: standard normal noise [B, C, *S].
        top: the time at which the walk begins.
        cond: the conditions.
        guidance: classifier-free guidance scale; 1 is none.
        steps: of the walk.

    Returns:
        ``steps`` + 1 states [B, C, *S], from noise to image, and their flow times [steps + 1].
    """
    process = den.process
    times = even_times(process, top, steps)
    path = [first_state(process, z, top)]
    for t, r in zip(times, times[1:], strict=False):
        pred = guided(den.at(t), path[-1], full(z, t), cond, guidance)
        path.append(move(pred, process, full(z, r)))
    sizes = [process.coefs(full(z, t)).expand(z) for t in times]
    states = [x_t / (c.alpha + c.sigma) for x_t, c in zip(path, sizes, strict=True)]
    return states, process.flow_time(torch.tensor(times, dtype=torch.float64))


def even_times(process: Process, top: float, steps: int) -> Grid:
    """Times from ``top`` to 0 that are even in rectified flow's time, none below ``t_min``."""
    whole = process.flow_time(torch.tensor([top], dtype=torch.float64))
    s = whole * (1 - torch.arange(1, steps, dtype=torch.float64) / steps)
    return (top, *process.time_of_flow(s).tolist(), 0.0)


def straightness(path: Sequence[Tensor], times: Tensor) -> float:
    """Mean over time of the squared gap between the velocity and the whole path's, a coordinate.

    0 for straight paths; the path is taken to last one unit of time.

    Source: rectified flow (Liu et al. 2022), of an Euler walk.

    Args:
        path: states [N, ...] from noise to image.
        times: at which they are reached, falling.
    """
    shares = ((times[:-1] - times[1:]) / (times[0] - times[-1])).tolist()
    whole, total = path[0] - path[-1], 0.0
    for a, b, share in zip(path, path[1:], shares, strict=False):
        if share > 0:
            total += share * float(((a - b) / share - whole).square().mean())
    return total
