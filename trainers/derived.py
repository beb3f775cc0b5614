"""The network passes of a derivative along the flow."""

from __future__ import annotations

from stepdistill.diffusion.derivative import CALLS, Way
from stepdistill.trainers.base import Pass


def derived(way: Way, count: float = 1) -> list[Pass]:
    """The student's passes of ``count`` derivatives a step."""
    forward = Pass("student", "forward", count, slope=way in ("jvp", "semi"))
    more = (CALLS[way] - 1) * count
    if not more:
        return [forward]
    if forward.slope:
        return [forward, Pass("student", "forward", more)]
    return [Pass("student", "forward", CALLS[way] * count)]
