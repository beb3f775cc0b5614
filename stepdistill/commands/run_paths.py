"""Paths of a finished flow in a run's page: the teacher's, and the student's of the same noise."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from stepdistill.adapters.cond import Cond
from stepdistill.commands.export import finished
from stepdistill.commands.report import Grid
from stepdistill.commands.watch import pictures
from stepdistill.eval.images import tiled, to_pil
from stepdistill.eval.straightness import STEPS, flow_path, straightness

NOISES, SHOWN, STATES = 64, 3, 9


def paths(run: Path) -> list[Grid]:
    """A picture of the paths of a finished run whose student is a flow; none of another's.

    Raises:
        UserError: a run that is not finished, or whose teacher is not there any more.
    """
    trainer = finished(run)
    if not trainer.flows:
        return []
    teacher, guidance = trainer.teacher, trainer.config.guidance
    shape, count = teacher.sample_shape, len(teacher.classes)
    z = torch.randn(NOISES, *shape, generator=torch.Generator().manual_seed(0))
    cond = Cond(torch.arange(NOISES) % count if count else None)
    rows, told = [], []
    for name, den, scale in (("teacher", teacher, guidance), ("student", trainer.best(), 1.0)):
        path, times = flow_path(den, z, trainer.top, cond, guidance=scale)
        told.append(f"{straightness(path, times):.4f} ({name})")
        rows.append(torch.stack(path[:: STEPS // (STATES - 1)], dim=1)[:SHOWN])
    states = torch.stack(rows, dim=1).reshape(-1, *shape)  # by noise, then whose, then time
    images = pictures(trainer, states)
    buffer = io.BytesIO()
    to_pil(tiled(images, STATES)).save(buffer, "PNG")
    caption = f"straightness {' and '.join(told)}, over {NOISES} noises; 0 for lines"
    return [Grid("from noise to image", caption, buffer.getvalue())]
