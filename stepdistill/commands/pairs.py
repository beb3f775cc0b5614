"""pairs: make a teacher's pairs of noise and image, ahead of a run on them or within it."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from pathlib import Path

import torch

from stepdistill.commands.check_fit import check_fit
from stepdistill.commands.job import job
from stepdistill.commands.read import read_config
from stepdistill.commands.watch import Watch
from stepdistill.data.order import share
from stepdistill.data.pairs.folder import open_folder
from stepdistill.data.pairs.make import make_pairs, read_manifest
from stepdistill.data.pairs.plan import MergedPlan, PairPlan, pieces
from stepdistill.data.pairs.shards import lacking
from stepdistill.data.pairs.store import PairStore, Sent, described, fetch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run.errors import UserError
from stepdistill.run.ranks import Processes
from stepdistill.run.together import together
from stepdistill.trainers.pair_walk import (
    OnlinePairs,
    PairWalk,
    check_mirror,
    images_of,
    plan_of,
    settings,
)
from stepdistill.trainers.settings import TrainConfig

TIMED_STEPS = 2


def pairs(
    name: str, overrides: Sequence[str] = (), *, part: tuple[int, int] = (0, 1)
) -> Path | str:
    """Make the store of a config and return its folder; shards that are there are kept.

    Args:
        name: a config file, or the name of an installed one.
        overrides: ``key.sub=value``.
        part: (k, n): only every n-th shard, from the k-th on, for machines that share no folder.

    Raises:
        UserError: bad input, or a config that uses no pairs.
    """
    config = read_pairs_config(name, overrides)
    if settings(config).online:
        raise UserError(
            f"{name}: pairs.online=true makes each step's pairs in its run, and no store; set it "
            "to null to make one"
        )
    with job(config) as (processes, teacher):
        return Source(config, teacher, processes, Watch(config, main=processes.main)).make(part)


def read_pairs_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """A config that has pairs.

    Raises:
        UserError: it is bad, or uses none.
    """
    _, config = read_config(name, overrides)
    if config.pair_store is None:
        where = "reflow does" + (", or set regression" if hasattr(config, "regression") else "")
        raise UserError(f"{name}: the method {config.method} uses no pairs; {where}")
    return config


def place_of(config: TrainConfig) -> str:
    """Where a config's store lies."""
    return settings(config).path or str(config.run / "pairs")


class Source:
    """Where a run's pairs come from: a store, made where it is missing, or walks as they go.

    Args:
        config: has pairs.
        teacher: makes them.
        processes: the job's, which share the work.
        watch: is told of it.

    Raises:
        UserError: images do not fit the teacher, or it cannot walk as it is asked to.
    """

    def __init__(
        self, config: TrainConfig, teacher: Denoiser, processes: Processes, watch: Watch
    ) -> None:
        self.config, self.teacher = config, teacher
        self.processes, self.watch, self.own = processes, watch, settings(config)
        images = images_of(config)
        if images is not None:
            check_fit(images, teacher)
        self.plan = plan_of(config, teacher, images)
        self.walk = PairWalk(config, teacher, self.plan, images, autocast=processes.autocast)
        self.folder = open_folder(place_of(config))

    def batches(self, start: int) -> Generator[Sent, None, None]:
        """Noise, images and labels of this process's share of each step's batch, from a step on."""
        c, p = self.config, self.processes
        part, flip = share(c.batch_size, p.rank, p.world), bool(self.own.flip)
        pairs: PairStore | OnlinePairs
        if self.own.online:
            with together(p.mean):
                self._check_flip()
            pairs = OnlinePairs(self.walk, flip=flip)
        else:
            self.make()
            kept = read_manifest(self.folder) or self.plan
            with together(p.mean):
                near = fetch(self.folder, kept, Path(c.run) / "pairs", (p.rank, p.world))
            pairs = PairStore(near, kept, flip=flip, shares=self.own.shares)
        return pairs.batches(range(start, c.steps), c.batch_size, c.seed, part, p.device)

    def make(self, part: tuple[int, int] = (0, 1)) -> Path | str:
        """Make the shards that are missing, together with whoever else does; returns the folder.

        A merged store is taken as it is.

        Raises:
            UserError: it cannot be made, or a merged store is of other pairs.
        """
        place = self.own.path or self.config.run / "pairs"
        with together(self.processes.mean):
            self._check_flip()
            kept = read_manifest(self.folder)
            if isinstance(kept, MergedPlan):
                self._take(kept)
                return place
            self._estimate(part)
            rate = _Rate(self.watch, self.plan, part)
            make_pairs(
                self.folder,
                self.plan,
                self.walk,
                batch_size=self.own.batch_size,
                told=rate.told,
                part=part,
            )
        return place

    def _check_flip(self) -> None:
        if self.own.flip:
            check_mirror(self.walk, self.own.batch_size)

    def _take(self, kept: MergedPlan) -> None:
        differs = self.plan.alike(kept.parts[0])
        if differs == "kept":
            raise UserError(
                f"{self.folder.place}: its pairs have other states of the walk beside them than "
                "this config's states and student_steps ask for; set another pairs.path"
            )
        if differs is not None:
            raise UserError(
                f"{self.folder.place}: its pairs have {differs}={getattr(kept.parts[0], differs)}, "
                f"and this config {getattr(self.plan, differs)}; set it so, or another pairs.path"
            )
        self.watch.say(f"pairs: {self.folder.place} holds {described(kept)}, taken as they are")

    def _estimate(self, part: tuple[int, int]) -> None:
        """Say what is to be made, and how large and long that will be.

        Raises:
            UserError: there is no room for it.
        """
        left = lacking(self.folder, list(pieces(self.plan))[part[0] :: part[1]])
        num = sum(len(self.plan.indices(piece.shard)) for piece in left)
        if not num or not self.processes.main:
            return
        size = self.plan.size() * num // self.plan.num
        free = self.folder.free()
        other = "" if self.plan.kept else " or uint8"
        if free is not None and size > free:
            raise UserError(
                f"{self.folder.place}: {num:,} pairs take {_bytes(size)}, and {_bytes(free)} are "
                f"free; give pairs.path another place, or set pairs.store=fp16{other}"
            )
        rate = self._timed() * self.processes.world
        ways = f"{self.plan.steps} {self.walk.solver.kind} steps"
        self.watch.say(
            f"pairs: {num:,} of {self.plan.num:,} to make, {_bytes(size)} in {self.folder.place}; "
            f"about {_duration(num / rate)} at {rate:.0f}/s ({ways})"
        )

    def _timed(self) -> float:
        """Pairs a second, from one batch on a few steps."""
        index = torch.arange(min(self.own.batch_size, self.plan.num))
        z, cond = self.plan.noise(index), self.walk.cond(self.plan.labels(index))
        self.walk.image(z, cond, 1)  # the first pass of all is slower
        began = time.perf_counter()
        self.walk.image(z, cond, TIMED_STEPS)
        seconds = time.perf_counter() - began
        return len(index) * TIMED_STEPS / max(seconds, 1e-9) / self.plan.steps


class _Rate:
    """How many pairs are there and how fast they come, from all workers that this one sees."""

    def __init__(self, watch: Watch, plan: PairPlan, part: tuple[int, int]) -> None:
        self.watch, self.began = watch, time.monotonic()
        mine = list(pieces(plan))[part[0] :: part[1]]
        self.num = sum(len(plan.indices(piece.shard)) for piece in mine)
        self.before = self.last = -1

    def told(self, there: int, made: int) -> None:
        """See :func:`stepdistill.data.pairs.make.make_pairs`."""
        if self.before < 0:
            self.before = self.last = there
        if there == self.last:
            return
        self.last = there
        seconds = time.monotonic() - self.began
        self.watch.pairs(there, self.num, max(there - self.before, made) / max(seconds, 1e-9))


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
