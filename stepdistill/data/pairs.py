"""The pair store: noise and the image a teacher makes of it, in safetensors shards.

Noise is a function of (seed, index), so only images and labels are stored and any worker can
make any shard. A shard is written whole or not at all; a shard that is there is not made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stepdistill.data.order import batch_positions
from stepdistill.diffusion.cond import Cond
from stepdistill.run.errors import UserError
from stepdistill.run.files import flush, write_bytes
from stepdistill.run.rng import Rng

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class PairPlan:
    """Everything that decides the pairs.

    Args:
        teacher: hash of its weights.
        precision: of its passes.
        steps: its Euler steps for a pair.
        guidance: its guidance scale.
        num: pairs in the store.
        seed: seed of their noise and labels.
        shape: of one sample.
        classes: number of classes; 0 for none.
        shard: pairs in a file.
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

    def digest(self) -> str:
        """Hash that every shard carries, so that shards of two plans are never mixed."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    def noise(self, index: Tensor) -> Tensor:
        """Noise [B, *shape] of the pairs ``index``, made where the index lies."""
        return Rng(self.seed).normal("pairs", index, self.shape)

    def labels(self, index: Tensor) -> Tensor:
        """Labels [B] of the pairs ``index``."""
        return Rng(self.seed).integers("pair-label", index, max(1, self.classes))

    def shards(self) -> int:
        """Number of files."""
        return -(-self.num // self.shard)

    def indices(self, shard: int) -> Tensor:
        """Indices of the pairs in a shard."""
        return torch.arange(shard * self.shard, min(self.num, (shard + 1) * self.shard))


def shard_path(root: Path, shard: int) -> Path:
    """File of a shard."""
    return root / f"pairs-{shard:06d}.safetensors"


def checksum(z: Tensor) -> list[float]:
    """Four numbers of the noise that tell a changed generator."""
    flat = z.flatten()
    picks: list[float] = flat[torch.linspace(0, len(flat) - 1, 4).long()].tolist()
    return picks


def same_noise(kept: list[float], z: Tensor) -> bool:
    """Whether noise is what it was, but for the last digits that devices differ in."""
    return all(abs(a - b) < 1e-4 for a, b in zip(kept, checksum(z), strict=True))


def shard_facts(file: Any) -> dict[str, Any]:
    """What an open shard says of itself: the hash of its plan and a checksum of its noise."""
    facts: dict[str, Any] = json.loads((file.metadata() or {}).get("shard", "{}"))
    return facts


def whole(root: Path, plan: PairPlan, shard: int) -> bool:
    """Whether a shard is there, readable, of this plan, and of full length.

    Raises:
        UserError: it belongs to another plan.
    """
    path = shard_path(root, shard)
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            facts, shape = shard_facts(file), file.get_slice("x").get_shape()
    except (SafetensorError, OSError):
        return False
    if facts.get("plan") != plan.digest():
        raise UserError(f"{path}: pairs of another plan; give pairs.path an empty folder")
    return bool(shape[0] == len(plan.indices(shard)))


def make_pairs(
    root: Path,
    plan: PairPlan,
    draw: Callable[[Tensor, Cond], Tensor],
    *,
    batch_size: int,
    told: Callable[[int], None],
    rank: int = 0,
    world: int = 1,
) -> None:
    """Make the shards that are missing; worker ``rank`` of ``world`` takes every world-th one.

    Args:
        root: the store's folder.
        plan: what to make.
        draw: (noise, condition) -> images, the teacher's sampler.
        batch_size: pairs made at once.
        told: is called with the number of pairs made after each batch.

    Raises:
        UserError: the teacher made an image that is not finite; its index is named.
    """
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(rank, plan.shards(), world):
        if whole(root, plan, shard):
            told(len(plan.indices(shard)))
            continue
        parts = []
        for index in plan.indices(shard).split(batch_size):
            cond = Cond(plan.labels(index) if plan.classes else None)
            x = draw(plan.noise(index), cond).cpu()
            bad = (~torch.isfinite(x).flatten(1).all(dim=1)).nonzero()
            if len(bad):
                raise UserError(f"pairs: image {int(index[bad[0, 0]])} is not finite; stopped")
            parts.append(x)
            told(len(index))
        _write(root, plan, shard, torch.cat(parts))
    if rank == 0:
        _write_anew(root / MANIFEST, json.dumps(asdict(plan), indent=1).encode())


def _write(root: Path, plan: PairPlan, shard: int, x: Tensor) -> None:
    index = plan.indices(shard)
    facts = {"plan": plan.digest(), "noise": checksum(plan.noise(index[:1]))}
    meta = {"shard": json.dumps(facts)}  # one entry, since safetensors writes several in any order
    data = save({"x": x.contiguous(), "label": plan.labels(index)}, metadata=meta)
    _write_anew(shard_path(root, shard), data)
    flush(root)


def _write_anew(path: Path, data: bytes) -> None:
    """Write a file, and remove what a worker that was killed while it wrote it has left."""
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink()
    write_bytes(path, data)


class PairStore:
    """A finished store, read back.

    Raises:
        UserError: a shard is missing or damaged, or its noise cannot be made again, or an image
            is not finite.
    """

    def __init__(self, root: Path, plan: PairPlan) -> None:
        self.plan = plan
        missing = [s for s in range(plan.shards()) if not whole(root, plan, s)]
        if missing:
            raise UserError(
                f"{root}: {len(missing)} of {plan.shards()} shards are missing or torn, first "
                f"{shard_path(root, missing[0]).name}; run `stepdistill pairs` again"
            )
        xs, labels = [], []
        for shard in range(plan.shards()):
            with safe_open(shard_path(root, shard), "pt") as file:
                first = plan.indices(shard)[:1]
                if not same_noise(shard_facts(file)["noise"], plan.noise(first)):
                    raise UserError(f"{shard_path(root, shard)}: its noise cannot be made again")
                xs.append(file.get_tensor("x"))
                bad = (~torch.isfinite(xs[-1]).flatten(1).all(dim=1)).nonzero()
                if len(bad):
                    raise UserError(
                        f"{shard_path(root, shard)}: image {int(first) + int(bad[0, 0])} is not "
                        "finite; remove the file and run `stepdistill pairs` again"
                    )
                labels.append(file.get_tensor("label"))
        self.x, self.label = torch.cat(xs), torch.cat(labels)

    def batch(
        self, step: int, batch_size: int, seed: int, share: slice, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, images and labels of this process's share of a step's global batch.

        Nothing waits for the device: the noise is made on it, the rest is sent from pinned memory.
        """
        index = torch.from_numpy(batch_positions(step, batch_size, self.plan.num, seed)[share])

        def send(value: Tensor) -> Tensor:
            pinned = value.pin_memory() if device.type == "cuda" else value
            return pinned.to(device, non_blocking=True)

        return self.plan.noise(send(index)), send(self.x[index]), send(self.label[index])
