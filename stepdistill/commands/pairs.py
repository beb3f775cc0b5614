"""pairs: make a teacher's pairs of noise and image, ahead of a run on them or within it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.commands.job import job
from stepdistill.commands.read import read_config
from stepdistill.commands.watch import Watch
from stepdistill.data.pairs import PairPlan, make_pairs
from stepdistill.diffusion.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.sampler import sample
from stepdistill.diffusion.timesteps import uniform_grid
from stepdistill.run.errors import UserError
from stepdistill.run.ranks import Processes
from stepdistill.run.together import together
from stepdistill.trainers.settings import PairsConfig, TrainConfig


def pairs(name: str, overrides: Sequence[str] = ()) -> Path:
    """Make the store of a config and return its folder; shards that are there are kept.

    Raises:
        UserError: bad input, or a config that uses no pairs.
    """
    _, config = read_config(name, overrides)
    if config.pair_store is None:
        where = "reflow does" + (", or set regression" if hasattr(config, "regression") else "")
        raise UserError(f"{name}: the method {config.method} uses no pairs; {where}")
    with job(config) as (processes, teacher):
        return make(config, teacher, processes, Watch(config, main=processes.main))


def settings(config: TrainConfig) -> PairsConfig:
    """The pairs of a config that has some."""
    assert config.pair_store is not None
    return config.pair_store


def plan_of(config: TrainConfig, teacher: Denoiser) -> PairPlan:
    """What a config's pairs are."""
    pairs = settings(config)
    return PairPlan(
        teacher=weights_hash(teacher),
        precision=config.precision,
        steps=pairs.steps,
        guidance=config.guidance,
        num=pairs.num,
        seed=pairs.seed,
        shape=teacher.sample_shape,
        classes=len(teacher.classes),
        shard=pairs.shard,
    )


def make(config: TrainConfig, teacher: Denoiser, processes: Processes, watch: Watch) -> Path:
    """Make the shards that are missing, shared among the processes; returns the folder."""
    plan, root = plan_of(config, teacher), settings(config).path or config.run / "pairs"
    grid = uniform_grid(teacher.process, plan.steps)
    began = time.monotonic()
    done = 0

    def draw(z: Tensor, cond: Cond) -> Tensor:
        with torch.no_grad(), processes.autocast():
            cond = cond.map(lambda v: v.to(processes.device))
            z = z.to(processes.device)
            return sample(teacher, z, grid, cond, guidance=plan.guidance)

    def told(count: int) -> None:
        nonlocal done
        done += count * processes.world
        watch.pairs(min(done, plan.num), plan.num, time.monotonic() - began)

    with together(processes.mean):
        make_pairs(
            root,
            plan,
            draw,
            batch_size=settings(config).batch_size,
            told=told,
            rank=processes.rank,
            world=processes.world,
        )
    return root


def weights_hash(den: Denoiser) -> str:
    """Short hash of a network's weights."""
    total = hashlib.sha256()
    for name, value in sorted(den.weights().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
