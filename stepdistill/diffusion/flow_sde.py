"""Steps of rectified flow with noise that leave its marginals as they are, and their means.

All in rectified flow's coordinates y = x_t / (alpha + sigma), s = sigma / (alpha + sigma), to
which every process can be taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from stepdistill.diffusion.process import Process
from stepdistill.diffusion.timesteps import Grid

ONE = 1 - 1e-6


@dataclass(frozen=True)
class Step:
    """The step y' ~ N(keep y + gain v, spread^2) from s to r, with v the velocity.

    Args:
        s: time of rectified flow at its beginning.
        r: and at its end.
        rate: strength of the noise, in units of sqrt(time); 0 is the flow itself.
    """

    s: float
    r: float
    rate: float = 0.0

    @property
    def width(self) -> float:
        """r - s, which is negative."""
        return self.r - self.s

    @property
    def keep(self) -> float:
        """Factor of the state."""
        return 1 + self.rate**2 * self.width / (2 * self.s)

    @property
    def gain(self) -> float:
        """Factor of the velocity, and of a difference of two velocities."""
        return (1 + self.rate**2 * (1 - self.s) / (2 * self.s)) * self.width

    @property
    def spread(self) -> float:
        """Standard deviation of the noise."""
        return self.rate * math.sqrt(-self.width)


def flow_step(s: float, r: float, eta: float) -> Step:
    """The step of the flow's SDE, whose noise has the rate eta sqrt(s / (1 - s)).

    At s = 1, where that has no bound, 1 - r stands in the place of 1 - s.

    Source: Flow-GRPO (Liu et al. 2025), as Flow-OPD and DiffusionOPD sample.
    """
    below = 1 - (r if s > ONE else s)
    return Step(s, r, eta * math.sqrt(s / below))


def flow_times(process: Process, grid: Grid) -> tuple[float, ...]:
    """sigma / (alpha + sigma) at the times of a grid."""
    at = process.coefs(torch.tensor(grid, dtype=torch.float64))
    times: list[float] = (at.sigma / (at.alpha + at.sigma)).tolist()
    return tuple(times)
