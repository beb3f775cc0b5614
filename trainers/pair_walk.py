"""Pairs as a teacher's walk makes them: down from noise, or up from real images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.data.images import ImageSet, open_data
from stepdistill.data.pairs.plan import PairPlan, Pairs
from stepdistill.data.pairs.shards import as_kept
from stepdistill.data.pairs.store import Sent, sent
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.sampler import first_state, full, sample
from stepdistill.diffusion.timesteps import grid_between, regular_start, uniform_grid
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.settings import PairsConfig, TrainConfig, without_substeps
from stepdistill.trainers.solvers import Asked, Dpm, Euler, Walk

FIRST_NOISE = 1e-3  # of flow time: where an image is taken up, since networks know no cleaner one
LOOKED_AT = 64  # images of a set whose content its fingerprint knows
MIRRORED_PAIRS = 256
MIRROR_TOLERANCE = 0.05  # of the images' standard deviation


def settings(config: TrainConfig) -> PairsConfig:
    """The pairs of a config that has some."""
    assert config.pair_store is not None
    return config.pair_store


def plan_of(
    config: TrainConfig,
    teacher: Denoiser,
    images: ImageSet | None = None,
    *,
    name: str | None = None,
) -> PairPlan:
    """What a config's pairs are.

    Args:
        images: those that are inverted.
        name: what the plan calls the teacher; None: the hash of its weights.
    """
    pairs, solver = settings(config), None
    if pairs.walk is not None and not is_euler(pairs.walk):
        solver = json.dumps(without_substeps(pairs.walk), sort_keys=True)
    return PairPlan(
        teacher=name or weights_hash(teacher),
        precision=config.precision,
        steps=pairs.steps,
        guidance=config.guidance,
        num=pairs.num,
        seed=pairs.seed,
        shape=teacher.sample_shape,
        classes=len(teacher.classes),
        shard=pairs.shard,
        solver=solver,
        images=None if images is None else fingerprint(images),
        store=None if pairs.store == "fp32" else pairs.store,
        kept=kept_beside(config, teacher),
        prompts=None if teacher.prompts is None else teacher.prompts.digest(),
    )


def kept_beside(config: TrainConfig, teacher: Denoiser) -> tuple[float, ...] | None:
    """Progress, falling, of the walk's states that a config wants beside each image.

    Raises:
        UserError: they are no states of the walk, or cannot be kept as pixels.
    """
    pairs, count = settings(config), config.kept_steps
    if count is None:
        return None
    if pairs.steps % count:
        raise UserError(
            f"pairs.steps={pairs.steps} is no multiple of student_steps={count}, so that the walk "
            "does not pass by the student's times; set pairs.steps="
            f"{count * max(1, round(pairs.steps / count))}"
        )
    if pairs.store == "uint8":
        raise UserError(
            "pairs.store=uint8: states between noise and image are no pixels; take fp16 or bf16"
        )
    if pairs.invert:
        raise UserError("pairs.invert: states are kept of walks down from noise; set it to false")
    start = regular_start(teacher.process, teacher.head.name)
    start = start if config.start is None else config.start
    return tuple(start * (1 - place / count) for place in range(1, count))


def images_of(config: TrainConfig) -> ImageSet | None:
    """The real images whose noise a config asks for; None where noise is drawn.

    Raises:
        UserError: there are fewer of them than pairs.
    """
    pairs = settings(config)
    if not pairs.invert:
        return None
    images = open_data(config.data)
    if pairs.num > len(images):
        raise UserError(
            f"pairs.num={pairs.num}: data.source={images.name} has {len(images)} images to "
            f"invert, each once; set pairs.num={len(images)}"
        )
    return images


class PairWalk:
    """What makes a config's pairs, from their indices.

    Args:
        config: has pairs.
        teacher: walks.
        plan: of the pairs.
        images: those that are inverted.
        autocast: the precision of the teacher's passes.

    Raises:
        UserError: the solver draws noise, or cannot walk where it is asked to.
    """

    def __init__(
        self,
        config: TrainConfig,
        teacher: Denoiser,
        plan: PairPlan,
        images: ImageSet | None = None,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        solver = settings(config).walk
        self.teacher, self.plan, self.images, self.autocast = teacher, plan, images, autocast
        self.solver: Walk = Euler() if solver is None else solver
        kind = self.solver.kind
        if self.solver.random:
            raise UserError(
                f"pairs.solver={kind}: draws noise, and a noise has one image in pairs; take "
                "euler, heun or dpm"
            )
        if images is not None and isinstance(self.solver, Dpm):
            raise UserError(
                "pairs.solver=dpm: extrapolates clean estimates, which does not lead up to pure "
                "noise; take euler or heun with pairs.invert"
            )
        if teacher.ends and plan.kept:
            raise UserError(
                "states=walk: this teacher is told where its steps end, and of its walk no states "
                "are kept; set states=null"
            )
        if teacher.ends and (images is not None or not is_euler(solver)):
            raise UserError(
                f"pairs.solver={kind}: this teacher is told where its steps end; it walks by "
                "euler alone, and down"
            )

    def __call__(self, index: Tensor) -> Pairs:
        """The pairs of indices [B], on the CPU."""
        e = self.plan.noise(index)
        if self.images is None:
            label = self.plan.labels(index)
            draw = self.states if self.plan.kept else self.image
            return Pairs(e, draw(e, self.cond(label)), label)
        x, label = self.images.load(index.tolist())
        return Pairs(self.noise(x, e, self.cond(label)), x, label)

    def cond(self, label: Tensor) -> Cond:
        """The condition of labels [B]; none for a teacher without classes."""
        return Cond(label.to(self.teacher.device) if self.plan.classes else None)

    def image(self, z: Tensor, cond: Cond, steps: int | None = None) -> Tensor:
        """Images of noise [B, *S], on the CPU; by so many steps, or the plan's."""
        grid = uniform_grid(self.teacher.process, steps or self.plan.steps)
        with torch.no_grad(), self.autocast():
            z = z.to(self.teacher.device)
            if is_euler(self.solver):
                return sample(self.teacher, z, grid, cond, guidance=self.plan.guidance).cpu()
            return self._along(first_state(self.teacher.process, z, grid[0]), grid, cond).cpu()

    def states(self, z: Tensor, cond: Cond) -> Tensor:
        """Images of noise [B, *S] and the states that the plan keeps beside, on the CPU."""
        process, kept = self.teacher.process, self.plan.kept or ()
        inner = process.warp(torch.tensor(kept, dtype=torch.float64)).tolist()
        stops, part = (process.t_max, *inner, 0.0), self.plan.steps // (1 + len(kept))
        found = []
        with torch.no_grad(), self.autocast():
            state = first_state(process, z.to(self.teacher.device), stops[0])
            for high, low in pairwise(stops):
                state = self._along(state, grid_between(high, low, part, process), cond)
                found.append(state)
        return torch.stack([found[-1], *found[:-1]], dim=1).cpu()

    def noise(self, x: Tensor, e: Tensor, cond: Cond, steps: int | None = None) -> Tensor:
        """Noise of images [B, *S], on the CPU: the end of the flow from a trace of e."""
        process = self.teacher.process
        low = float(process.time_of_flow(torch.tensor(FIRST_NOISE, dtype=torch.float64)))
        grid = grid_between(process.t_max, low, steps or self.plan.steps, process)[::-1]
        with torch.no_grad(), self.autocast():
            x, e = x.to(self.teacher.device), e.to(self.teacher.device)
            state = self._along(process.noise(x, e, full(x, low)), grid, cond)
            return (state / expand(process.coefs(full(x, grid[-1])).sigma, x)).cpu()

    def _along(self, state: Tensor, grid: tuple[float, ...], cond: Cond) -> Tensor:
        asked = Asked(self.teacher, cond, self.plan.guidance)
        return self.solver.along(asked, state, [full(state, level) for level in grid], None)


def check_mirror(walk: PairWalk, batch_size: int) -> None:
    """Walk from noise and from the same noise mirrored, [C, H, W] along W.

    Raises:
        UserError: the images are not each other's mirror images.
    """
    if len(walk.plan.shape) != 3:
        raise UserError(
            f"pairs.flip: samples of the shape {list(walk.plan.shape)} are no images [C, H, W]; "
            "set pairs.flip=false"
        )
    images, gap = [], []
    for index in torch.arange(MIRRORED_PAIRS).split(batch_size):
        z, cond = walk.plan.noise(index), walk.cond(walk.plan.labels(index))
        images.append(walk.image(z, cond))
        gap.append(walk.image(z.flip(-1), cond).flip(-1) - images[-1])
    spread = float(torch.cat(images).std())
    error = float(torch.cat(gap).square().mean().sqrt()) / max(spread, 1e-12)
    if not error <= MIRROR_TOLERANCE:
        raise UserError(
            f"pairs.flip: of mirrored noise this teacher makes other images than mirrored ones "
            f"(they differ by {error:.2g} of the images' standard deviation, and "
            f"{MIRROR_TOLERANCE:g} is allowed); set pairs.flip=false"
        )


class OnlinePairs:
    """Pairs that are made when a step needs them, in order: no pair comes a second time.

    Images that are inverted come again after all of them. With ``flip`` every other pair, by its
    own coin, is mirrored.
    """

    def __init__(self, walk: PairWalk, *, flip: bool = False) -> None:
        self.walk, self.flip = walk, flip

    def batches(
        self, steps: range, batch_size: int, seed: int, share: slice, device: torch.device
    ) -> Generator[Sent, None, None]:
        """Noise, images and labels of this process's share of each step's global batch."""
        plan = self.walk.plan
        for step in steps:
            index = torch.arange(step * batch_size, (step + 1) * batch_size)[share]
            made = as_kept(self.walk(index % plan.num if plan.images else index), plan)
            finite = torch.isfinite(made.x).flatten(1).all(dim=1)
            if not finite.all():
                raise UserError(f"pairs: image {int(index[~finite][0])} is not finite; stopped")
            if self.flip:
                coin = Rng(plan.seed).integers("pair-mirror", index, 2).bool()
                made.z[coin], made.x[coin] = made.z[coin].flip(-1), made.x[coin].flip(-1)
            yield sent(made, device)


def is_euler(solver: Walk | None) -> bool:
    """Whether a config's solver is Euler's."""
    return solver is None or type(solver) is Euler


def fingerprint(images: ImageSet) -> str:
    """Short hash of a set of images: number, classes, shape, and the content of some."""
    total = hashlib.sha256(json.dumps([len(images), images.shape, images.classes]).encode())
    looked = torch.linspace(0, len(images) - 1, min(LOOKED_AT, len(images))).long()
    for value in images.load(looked.tolist()):
        total.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def weights_hash(den: Denoiser) -> str:
    """Short hash of a network's weights."""
    total = hashlib.sha256()
    for name, value in sorted(den.weights().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
