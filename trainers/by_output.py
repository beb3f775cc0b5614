"""Differences of what a network says, in units of its raw output.

A clean estimate from predicted noise moves by sigma / alpha where the output moves by one: twenty
times and more at the noisiest times, which would drown all others in a loss of clean estimates.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.process import expand
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.settings import TrainConfig

Reading = Callable[[Tensor, Tensor], Tensor]
"""What is read of a prediction, linear in its clean and noise parts."""


class ByOutputConfig(TrainConfig):
    """Settings of trainers that may compare by the raw output."""

    by_output: bool | None = Field(
        None,
        description="compare in units of the network's output what is a larger multiple of it, as "
        "clean estimates from predicted noise are, by sigma / alpha; null: if noise is predicted",
    )


class ByOutput(Trainer):
    """What compares by the output, for trainers whose config is a :class:`ByOutputConfig`."""

    config: ByOutputConfig

    def evened(self, delta: Tensor, t: Tensor, read: Reading) -> Tensor:
        """A difference in units of the output where it is a larger multiple of that.

        Args:
            delta: of two readings of states at times t [B]: [B, ...].
            t: their times [B].
            read: the reading, of parts [B].
        """
        head, own = self.teacher.head, self.config.by_output
        if not (head.name == "eps" if own is None else own):
            return delta
        moved = head.motion(self.process.coefs(t), self.process.sigma_data)
        times = read(*moved).abs().clamp_min(1)
        return delta / expand(times, delta)
