"""Differences of what a network says, in units of its raw output.

A clean estimate from predicted noise moves by sigma / alpha where the output moves by one: ten
times and more at the noisiest times, which would drown all others in a loss of clean estimates.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.process import expand
from stepdistill.run.errors import UserError
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.settings import TrainConfig

MULTIPLIED = ("eps", "x0")
"""Heads of which something linear in clean and noise parts is a large multiple somewhere."""
Reading = Callable[[Tensor, Tensor], Tensor]
"""What is read of a prediction, linear in its clean and noise parts."""


def of_clean(x: Tensor, z: Tensor) -> Tensor:
    """The reading that is the clean part."""
    return x


def of_drift(x: Tensor, z: Tensor) -> Tensor:
    """The reading that is the velocity in rectified flow's coordinates."""
    return z - x


class ByOutputConfig(TrainConfig):
    """Settings of trainers that may compare by the raw output."""

    by_output: bool | None = Field(
        None,
        description="compare in units of the network's output what is a larger multiple of it, as "
        "clean estimates from predicted noise are, by sigma / alpha; null: if noise is predicted. "
        "Losses that are divided by themselves hardly feel it, nor do those of a learned weight",
    )


class ByOutput(Trainer):
    """What compares by the output, for trainers whose config is a :class:`ByOutputConfig`."""

    config: ByOutputConfig

    def check_output(self) -> None:
        """To be called by ``setup``.

        Raises:
            UserError: nothing is a large multiple of the output.
        """
        name = self.teacher.head.name
        if self.config.by_output and name not in MULTIPLIED:
            raise UserError(
                f"by_output: is of predicted noise or images, and the teacher predicts {name}; "
                "leave it out"
            )

    @property
    def evens(self) -> bool:
        """Whether anything is compared so."""
        own = self.config.by_output
        return self.teacher.head.name == "eps" if own is None else own

    def evened(self, delta: Tensor, t: Tensor, read: Reading) -> Tensor:
        """A difference in units of the output where it is a larger multiple of that.

        Args:
            delta: of two readings of states at times t [B]: [B, ...].
            t: their times [B].
            read: the reading, of parts [B].
        """
        if not self.evens:
            return delta
        moved = self.teacher.head.motion(self.process.coefs(t), self.process.sigma_data)
        times = read(*moved).abs().clamp_min(1)
        return delta / expand(times, delta)

    def eased(self, value: Tensor, t: Tensor, read: Reading) -> Tensor:
        """A reading [B, ...] as it is, whose gradient is in these units."""
        if not self.evens:
            return value
        held = value.detach()
        return held + self.evened(value - held, t, read)
