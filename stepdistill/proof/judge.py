"""All that theory says of a trial's student, held against it."""

from __future__ import annotations

import torch

from stepdistill.adapters.cond import Cond
from stepdistill.proof import measure
from stepdistill.proof.laws import judge_law
from stepdistill.proof.maps import judge_map
from stepdistill.proof.rows import POINTS, SMALL, Judge
from stepdistill.proof.trial import Trial


@torch.no_grad()
def judge(trial: Trial) -> Judge:
    """Add the rows that the kind of a trial's fixed point asks for."""
    made = Judge(trial)
    kinds = {"map": judge_map, "law": judge_law, "field": judge_field}
    kinds[trial.point.kind](made)
    return made


def judge_field(made: Judge) -> None:
    """The network's loss against the exact denoiser's, over the data's states at even times."""
    trial = made.trial
    teacher, process = trial.teacher, trial.trainer.process
    even = measure.even_normals(POINTS, 2 * teacher.mixture.dim + 2, seed=3)
    dim = teacher.mixture.dim
    x, component = teacher.mixture.sample(even[:, :dim], torch.special.ndtr(even[:, -1]))
    z = even[:, dim : 2 * dim].float()
    t = torch.special.ndtr(even[:, -2]).float() * process.t_max
    label = None
    if teacher.oracle.classes:
        places = {one: k for k, one in enumerate(teacher.mixture.classes)}
        label = torch.tensor([places[one] for one in teacher.mixture.labels])[component]
    cond = Cond(label)
    x_t = process.noise(x.float(), z, t)
    exact, own = (
        teacher.oracle(x_t, t, cond).velocity,
        trial.trainer.best().at(1.0)(x_t, t, cond).velocity,
    )
    c = process.coefs(t).expand(x_t)
    target = c.d_alpha * x.float() + c.d_sigma * z
    floor, loss = ((one - target).square().mean() for one in (exact, own))
    made.add("loss", float(loss), SMALL * float(floor), expected=float(floor))
