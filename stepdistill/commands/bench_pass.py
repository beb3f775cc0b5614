"""One network pass of a declared kind, bare: what a step is measured against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.derivative import drift, slope
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Pass, Trainer


def bare(trainer: Trainer, item: Pass, batch: Batch) -> Callable[[], None]:
    """One network pass and nothing else."""
    teacher = trainer.teacher.at(0.5 * trainer.process.t_max)  # an expert, of several
    if item.role == "teacher":
        den = teacher
    elif item.role == "average":
        den = trainer.students()[-1].best
    else:
        den = trainer.denoiser(item.role)
    z = trainer.z(batch, Rng(trainer.config.seed))
    t = torch.full((len(z),), 0.5 * trainer.process.t_max, device=z.device)
    cond = batch.cond
    if item.batch != 1:
        rows = torch.arange(round(len(z) * item.batch), device=z.device) % len(z)
        z, t, cond = z[rows], t[rows], cond.rows(rows)
    params = den.own()

    def call(x: Tensor) -> list[Tensor]:
        """What the pass puts out, in its part of the network."""
        with trainer.autocast():
            if item.part == "features":
                return den.features(x, t, cond, item.taps)
            tail: Any = "frozen" if item.part == "tail" else "whole"
            with den.tapped(item.taps, tail) as kept:
                h = den.raw(x, t, cond)
        return [kept[name] for name in item.taps] if item.part == "tail" else [h]

    def forward() -> None:
        with torch.no_grad():
            if item.slope:
                slope(den, z, t, cond, drift, d_x=z, d_t=torch.ones_like(t))
            else:
                call(z)

    def train() -> None:
        for param in params:
            param.requires_grad_(True)
        out = call(z)
        torch.autograd.backward(out, [h.detach() for h in out])
        for param in params:
            param.requires_grad_(False)
            param.grad = None

    def through() -> None:
        leaf = z.detach().requires_grad_()
        out = call(leaf)
        torch.autograd.grad(out, leaf, [h.detach() for h in out])

    return {"forward": forward, "train": train, "input": through}[item.kind]
