"""Few-step students on diffusers' own schedulers, which pipelines of any kind know.

Flows take ``FlowMatchEulerDiscreteScheduler``, of fresh noise where the student's steps are (spec
1.12); variance-preserving students ``LCMScheduler`` for fresh noise and, for predicted noise,
``DDIMScheduler``, or ``DPMSolverMultistepScheduler`` of order one, which is the same and takes
steps that are not even. Elsewhere the :class:`LiteralGridScheduler` walks alone.

Four of diffusers' schedulers for few steps are not written here. ``FlowMatchLCMScheduler`` does
what ``FlowMatchEulerDiscreteScheduler`` does of fresh noise. ``SCMScheduler`` walks in TrigFlow's
angles, states and outputs; students that learn by the angle (``scm``, ``sana_sprint``, ``rcm``,
``tbcm``) keep their teacher's own. ``TCDScheduler`` ends at the first entry of its table, not at
the clean image. ``CMStochasticIterativeScheduler`` tells a network 1000 times what EDM's are told,
and has scalings and noise of its own, by the distance to the least level. That the literal grid
could take their steps, but for TCD's last, is held by tests/test_stock_schedulers.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)

from stepdistill.diffusion.heads import Head
from stepdistill.diffusion.process import RF, VP, Process
from stepdistill.diffusion.saved import stock_config

SHARP = 1e4  # LCMScheduler's timestep_scaling: with it none of the state is left in its estimate
WHOLE = 1e-3  # by how much a table's index may miss a whole number
Walks = dict[str, list[float]]


def stock_scheduler(
    process: Process,
    head: Head,
    noise: str,
    grids: Mapping[int, Sequence[float]],
    clip: float | None = None,
) -> tuple[Any, Walks]:
    """A diffusers scheduler that takes a student's steps, and what it is told for each grid.

    Args:
        process: of the student.
        head: what its network predicts.
        noise: that its steps end with: predicted, fresh or initial.
        grids: for each number of steps n, its n + 1 times from the noisiest to 0.
        clip: bound of the clean estimates; None for none.

    Returns:
        The scheduler, and for each number of steps, as text, the ``sigmas`` (of flows) or
        ``timesteps`` of its grid.

    Raises:
        ValueError: diffusers has no such scheduler; the text says of what.
    """
    config = stock_config(process, head)
    if config is None or not isinstance(process, RF | VP):
        raise ValueError(f"none knows {head.name} of the process {process.name}")
    if noise == "initial":
        raise ValueError("none mixes the noise that the walk began with")
    if noise == "heun":
        raise ValueError("none takes Heun's steps by a grid that is given")
    if isinstance(process, RF):
        return _flow(noise, grids, clip)
    return _variance_preserving(process, config, noise, grids, clip)


def _flow(
    noise: str, grids: Mapping[int, Sequence[float]], clip: float | None
) -> tuple[Any, Walks]:
    """The grid's times are the sigmas."""
    if clip is not None and max(grids) > 1:
        raise ValueError(f"none of flows clips clean estimates (clip: {clip:g})")
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=noise == "fresh")
    return scheduler, {str(n): [float(t) for t in grid[:-1]] for n, grid in grids.items()}


def _variance_preserving(
    process: VP,
    config: dict[str, Any],
    noise: str,
    grids: Mapping[int, Sequence[float]],
    clip: float | None,
) -> tuple[Any, Walks]:
    """The grid's times are places of the table."""
    known = {key: value for key, value in config.items() if key != "_class_name"}
    bound = {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    walks = {str(n): _places(process, grid) for n, grid in grids.items()}
    if noise == "fresh":
        return LCMScheduler(**known, **bound, timestep_scaling=SHARP), walks
    scheduler = DDIMScheduler(**known, **bound, timestep_spacing="trailing")
    if all(_places_of(scheduler, int(n)) == places for n, places in walks.items()):
        return scheduler, walks
    if clip is not None and max(grids) > 1:
        raise ValueError(f"none clips (clip: {clip:g}) in steps that are not even from the noise")
    return DPMSolverMultistepScheduler(**known, solver_order=1, final_sigmas_type="zero"), walks


def _places_of(scheduler: DDIMScheduler, steps: int) -> list[float]:
    """The table's entries that a scheduler takes by itself."""
    scheduler.set_timesteps(steps)
    found: list[float] = scheduler.timesteps.tolist()
    return found


def _places(process: VP, grid: Sequence[float]) -> list[float]:
    """The table's entries of a grid, without its clean end.

    Raises:
        ValueError: a time between two entries.
    """
    found = process.network_time(torch.tensor(grid[:-1], dtype=torch.float64))
    if bool(((found - found.round()).abs() > WHOLE).any()):
        times = ", ".join(f"{t:g}" for t in grid[:-1])
        raise ValueError(f"none takes times between the entries of its table ({times})")
    return [int(place) for place in found.round().tolist()]
