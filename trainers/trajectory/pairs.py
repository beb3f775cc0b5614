"""Pairs of times (t, r), r < t, at which a student's estimates are compared.

A new kind is a subclass with ``draw`` and ``chain``; a config names it by
``pairs: {kind: FILE.py:CLASS}``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from stepdistill.diffusion.process import Process
from stepdistill.diffusion.timesteps import Density, LogitNormal, Uniform, nearest, uniform_grid
from stepdistill.losses.consistency import ect_partner, level_partner
from stepdistill.run.plug import Plug
from stepdistill.run.rng import Rng

Times = tuple[float, ...]
END = 1e-3  # of the noisiest time: where a chain of shrinking steps is taken to 0


@dataclass(frozen=True)
class Span:
    """What a run trains on, as pairs need it.

    Args:
        process: of teacher and student.
        start: where grids begin, as progress towards pure noise.
        steps: of the run.
        drawn: times [B] of a density from uniforms [B].
        device: of the times.
    """

    process: Process
    start: float
    steps: int
    drawn: Callable[[Density, Tensor], Tensor]
    device: torch.device
    _grids: dict[int, Tensor] = field(default_factory=dict)

    def grid(self, intervals: int) -> Tensor:
        """Decreasing times [intervals + 1] of equal progress, the last of them 0."""
        if intervals not in self._grids:
            times = uniform_grid(self.process, intervals, self.start)
            self._grids[intervals] = torch.tensor(times, device=self.device)
        return self._grids[intervals]


class Pairs(Plug):
    """Which times are compared."""

    @abstractmethod
    def draw(self, rng: Rng, index: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """The pair (t, r) of every sample [B], at the step of ``rng``.

        Args:
            rng: the step's random numbers.
            index: places in the global batch [B].
            span: what the run trains on.
        """

    @abstractmethod
    def chain(self, t: float, span: Span) -> Times:
        """Times from t to 0, each the partner of the one before, at the end of the run."""

    def grid(self, span: Span) -> Tensor | None:
        """The times that are compared at the end of the run; None where it is any."""
        return None

    @property
    def staged(self) -> bool:
        """Whether stages are parts of the run, so that it cannot go on to other ``steps``."""
        return False


class Ect(Pairs):
    """Pairs r = t (1 - q^-(stage + 1)), whose gap shrinks from stage to stage (ECT).

    By default of the process's own time, which for flows is not that of the paper's noise levels;
    with ``k`` of these.
    """

    q: float = Field(2.0, gt=1, description="base of the gap")
    stages: int = Field(8, ge=1, description="stages of equal length over the run")
    first: int = Field(0, ge=0, description="number of the first stage")
    t: Density = Field(default_factory=Uniform, description="density of t")
    k: float | None = Field(
        None,
        ge=0,
        description="pairs of noise levels n = sigma / alpha, whose gaps are 1 + k sigmoid(-n) "
        "times as wide (published: 8); null: of times",
    )

    @property
    def staged(self) -> bool:
        """See :attr:`Pairs.staged`."""
        return self.stages > 1

    def draw(self, rng: Rng, index: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """See :meth:`Pairs.draw`."""
        t = span.drawn(self.t, rng.uniform("t", index))
        return t, self.partner(t, rng.step * self.stages // span.steps, span)

    def partner(self, t: Tensor, stage: int, span: Span) -> Tensor:
        """The time r of every t, in a stage of the run."""
        if self.k is None:
            return ect_partner(t, self.first + stage, self.q)
        return level_partner(t, self.first + stage, self.q, self.k, span.process)

    def chain(self, t: float, span: Span) -> Times:
        """See :meth:`Pairs.chain`."""
        times, end = [t], END * float(span.grid(1)[0])
        while times[-1] > end:
            times.append(float(self.partner(torch.tensor(times[-1]), self.stages - 1, span)))
        return (*times, 0.0) if times[-1] else tuple(times)


class Grid(Pairs):
    """Neighbours on a grid of ``steps`` intervals, ``skip`` of them apart (CM; LCM)."""

    steps: int = Field(32, ge=1, description="intervals of the teacher's grid")
    skip: int = Field(1, ge=1, description="intervals between t and r")

    @field_validator("skip")
    @classmethod
    def _within(cls, skip: int, info: ValidationInfo) -> int:
        if skip > info.data.get("steps", skip):
            raise PydanticCustomError("order", f"must not be above steps={info.data['steps']}")
        return skip

    def draw(self, rng: Rng, index: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """See :meth:`Pairs.draw`."""
        grid, place = span.grid(self.steps), rng.integers("t", index, self.steps)
        return grid[place], grid[(place + self.skip).clamp_max(self.steps)]

    def chain(self, t: float, span: Span) -> Times:
        """See :meth:`Pairs.chain`."""
        return _from(t, self.grid(span), self.skip)

    def grid(self, span: Span) -> Tensor:
        """See :meth:`Pairs.grid`."""
        return span.grid(self.steps)


class Doubling(Pairs):
    """Neighbours on a grid whose intervals double from stage to stage, by a density (iCT).

    The density's own share of an interval is the interval's. Stages are equally long: with 10 and
    1280 intervals there are eight (improved consistency training, Song and Dhariwal 2023, whose
    grid of k intervals has k + 1 points).
    """

    first: int = Field(10, ge=1, description="intervals of the first stage")
    last: int = Field(1280, ge=1, validate_default=True, description="intervals of the last")
    t: Density = Field(
        default_factory=lambda: LogitNormal(mean=-1.1, std=2.0),
        description="density of times, of which each interval gets its share",
    )

    @field_validator("last")
    @classmethod
    def _above(cls, last: int, info: ValidationInfo) -> int:
        if last < info.data.get("first", 1):
            raise PydanticCustomError("order", f"must not be below first={info.data['first']}")
        return last

    @property
    def staged(self) -> bool:
        """See :attr:`Pairs.staged`."""
        return self.last > self.first

    def intervals(self, step: int, steps: int) -> int:
        """Intervals of the grid at a step of a run of so many."""
        stages = math.ceil(math.log2(self.last / self.first)) + 1
        return int(min(self.first * 2 ** (step * stages // steps), self.last))

    def draw(self, rng: Rng, index: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """See :meth:`Pairs.draw`."""
        grid = span.grid(self.intervals(rng.step, span.steps))
        t = span.drawn(self.t, rng.uniform("t", index))
        below = torch.searchsorted(-grid, -t).clamp(1, len(grid) - 1)  # of the interval's ends
        return grid[below - 1], grid[below]

    def chain(self, t: float, span: Span) -> Times:
        """See :meth:`Pairs.chain`."""
        return _from(t, self.grid(span), 1)

    def grid(self, span: Span) -> Tensor:
        """See :meth:`Pairs.grid`."""
        return span.grid(self.intervals(span.steps - 1, span.steps))


def _from(t: float, grid: Tensor, skip: int) -> Times:
    """The times of a grid from the one nearest to t on, ``skip`` intervals apart, to 0."""
    times = tuple(grid.tolist())
    return (*times[nearest(times, t) : -1 : skip], 0.0)
