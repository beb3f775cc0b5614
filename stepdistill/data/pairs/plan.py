"""What a store of pairs holds: everything that decides it, and what follows from that.

Noise and labels are functions of (seed, index), so any worker can make any shard.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from stepdistill.run.rng import Rng

Kept = Literal["uint8", "fp16", "bf16", "fp32"]
"""The type that images are kept in."""

BYTES = {"uint8": 1, "fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Pairs:
    """Some pairs.

    Args:
        z: noise [B, *shape], fp32.
        x: images [B, *shape], fp32; [B, 1 + K, *shape] with the states that a plan keeps beside.
        label: classes [B], int64; 0 where there are none.
    """

    z: Tensor
    x: Tensor
    label: Tensor


@dataclass(frozen=True)
class PairPlan:
    """Everything that decides the pairs.

    Args:
        teacher: hash of its weights.
        precision: of its passes.
        steps: its steps for a pair.
        guidance: its guidance scale.
        num: pairs in the store.
        seed: seed of their noise and labels.
        shape: of one sample.
        classes: number of classes; 0 for none.
        shard: pairs in a file.
        solver: of the steps, as JSON; None: Euler's.
        images: fingerprint of the real images whose noise is found by walking up; None: noise is
            drawn, and its image found by walking down.
        store: the type that images are kept in; None: fp32.
        kept: progress, falling, of the K states of the walk that are kept beside the image.
        prompts: hash of the prompts that the labels stand for; None: they are classes.
    """

    teacher: str
    precision: str
    steps: int
    guidance: float
    num: int
    seed: int
    shape: tuple[int, ...]
    classes: int
    shard: int
    solver: str | None = None
    images: str | None = None
    store: Kept | None = None
    kept: tuple[float, ...] | None = None
    prompts: str | None = None

    @property
    def held(self) -> tuple[int, ...]:
        """The shape of what is kept of a pair but its noise."""
        return self.shape if self.kept is None else (1 + len(self.kept), *self.shape)

    @staticmethod
    def read(facts: dict[str, Any]) -> PairPlan:
        """The plan of :meth:`facts`.

        Raises:
            TypeError: they are not a plan's.
        """
        lists = {
            name: tuple(value) for name, value in facts.items() if isinstance(value, list | tuple)
        }
        return PairPlan(**facts | {"shape": ()} | lists)

    def facts(self) -> dict[str, Any]:
        """What a manifest says of it: all fields but those that are off."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def digest(self) -> str:
        """Hash that every shard carries, so that shards of two plans are never mixed."""
        return hashlib.sha256(json.dumps(self.facts()).encode()).hexdigest()[:16]

    def noise(self, index: Tensor) -> Tensor:
        """Noise [B, *shape] drawn for the pairs ``index``, made where the index lies."""
        return Rng(self.seed).normal("pairs", index, self.shape)

    def labels(self, index: Tensor) -> Tensor:
        """Labels [B] drawn for the pairs ``index``."""
        return Rng(self.seed).integers("pair-label", index, max(1, self.classes))

    def shards(self) -> int:
        """Number of files."""
        return -(-self.num // self.shard)

    def indices(self, shard: int) -> Tensor:
        """Indices of the pairs in a shard."""
        return torch.arange(shard * self.shard, min(self.num, (shard + 1) * self.shard))

    def size(self) -> int:
        """Bytes of the store's tensors."""
        kept = self.store or "fp32"
        noise = max(2, BYTES[kept]) if self.images else 0
        return self.num * (math.prod(self.held) * BYTES[kept] + math.prod(self.shape) * noise + 8)

    def alike(self, other: PairPlan) -> str | None:
        """The first thing in which another store's pairs are of another kind; None: of the same.

        Seed, number, file size, storage and direction may differ within one merged store.
        """
        free = {"num", "seed", "shard", "images", "store"}
        names = (f.name for f in fields(self) if f.name not in free)
        return next((n for n in names if getattr(self, n) != getattr(other, n)), None)


@dataclass(frozen=True)
class MergedPlan:
    """Stores of several plans in one folder, whose shards are numbered on from part to part."""

    parts: tuple[PairPlan, ...]

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"parts": [part.facts() for part in self.parts]}


@dataclass(frozen=True)
class Piece:
    """A shard of a store.

    Args:
        plan: of the part that it belongs to.
        shard: its place in that part.
        number: of its file.
    """

    plan: PairPlan
    shard: int
    number: int


AnyPlan = PairPlan | MergedPlan


def parts_of(plan: AnyPlan) -> tuple[PairPlan, ...]:
    """The plans of a store; one, where it is not merged."""
    return plan.parts if isinstance(plan, MergedPlan) else (plan,)


def pieces(plan: AnyPlan) -> Iterator[Piece]:
    """All shards of a store, in the order of their files."""
    number = 0
    for part in parts_of(plan):
        for shard in range(part.shards()):
            yield Piece(part, shard, number)
            number += 1
