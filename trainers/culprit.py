"""Where numbers that are not finite come from, asked after the fact and outside of the step."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.guidance import guided
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.beginning import role_of


@torch.no_grad()
def culprit(trainer: Trainer, step: int, batch: Batch) -> str | None:
    """The first thing of a step that is not finite, with the mend; None if all of it is.

    Looks at the batch, at the weights, and at one pass of the teacher and of each player at times
    over the whole range.
    """
    for name, value in (("image", batch.x), ("noise", batch.z)):
        if value is not None and (bad := _first(value)) is not None:
            place = int(batch.index[bad])
            return f"the {name} of sample {place} of the batch is not finite: look at the data"
    for player in trainer.players.values():
        if not all(bool(param.isfinite().all()) for param in player.params):
            return f"weights of the {player.name} are not finite: go on from an earlier checkpoint"
    if any(player.denoiser is trainer.teacher for player in trainer.players.values()):
        return None  # it trains from scratch
    z = trainer.z(batch, Rng(trainer.config.seed).at(step))
    x = torch.zeros_like(z) if batch.x is None else batch.x
    t = torch.linspace(0.02, 1.0, len(z), device=z.device) * trainer.top
    with trainer.autocast():
        x_t = trainer.process.noise(x, z, t)
        real = guided(trainer.teacher, x_t, t, batch.cond, trainer.config.guidance).x
        if _first(real) is not None:
            name = trainer.config.teacher
            return f"the output of the teacher {name} is not finite: look at it, or at precision"
        for name, player in trainer.players.items():
            if _first(player.denoiser(x_t, t, batch.cond).x) is not None:
                key = "critic" if role_of(name) == "critic" else "optim"
                return (
                    f"the output of the {name} is not finite: it diverged; go on from an earlier "
                    f"checkpoint, in a new run with a smaller {key}.lr"
                )
    return None


def _first(value: Tensor) -> int | None:
    """Place of the first sample of a batch that is not finite."""
    bad = (~value.isfinite().flatten(1).all(dim=1)).nonzero()
    return int(bad[0, 0]) if len(bad) else None
