"""A derivative along the flow in a step: its passes, and what it takes from the step's own."""

from __future__ import annotations

from torch import Tensor

from stepdistill.diffusion.derivative import BACKWARD, CALLS, Way
from stepdistill.trainers.base import Pass
from stepdistill.trainers.settings import TrainConfig


def known(value: Tensor, config: TrainConfig) -> Tensor | None:
    """A trained pass's view, for a difference to begin at; None where it is not in fp32."""
    return value.detach() if config.precision == "fp32" else None


def derived(way: Way, count: float = 1, *, config: TrainConfig | None = None) -> list[Pass]:
    """The student's passes of ``count`` derivatives a step.

    Args:
        way: of the derivatives.
        count: how many.
        config: of a run whose derivatives begin at what is :func:`known`; None where they do not.
    """
    spared = config is not None and config.precision == "fp32" and way in BACKWARD
    forward = Pass("student", "forward", count, slope=way in ("jvp", "semi"))
    more = (CALLS[way] - spared - 1) * count
    if not more:
        return [forward]
    if forward.slope:
        return [forward, Pass("student", "forward", more)]
    return [Pass("student", "forward", more + count)]
