"""A shard: one safetensors file of pairs, written whole, and what can be told of it.

Tensors: x [n, *held] in the type that the plan names, label [n] int64, and z [n, *shape] where
noise was found and not drawn. A shard is a function of its plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from stepdistill.data.pairs.folder import Folder
from stepdistill.data.pairs.plan import Kept, PairPlan, Pairs, Piece
from stepdistill.run.errors import UserError

DTYPES = {
    "uint8": torch.uint8,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
FURTHEST_PIXEL = 2.0  # a teacher's pixels overshoot [-1, 1] a little; what goes further is none
_FIRST_READ = 4096


def shard_name(number: int) -> str:
    """File of a shard."""
    return f"pairs-{number:06d}.safetensors"


def packed(x: Tensor, kept: Kept | None) -> Tensor:
    """Images as they are kept; pixels are clamped to [-1, 1] and rounded half to even."""
    if kept == "uint8":
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.to(DTYPES[kept or "fp32"])


def unpacked(x: Tensor) -> Tensor:
    """Kept images as fp32."""
    return x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x.float()


def as_kept(pairs: Pairs, plan: PairPlan) -> Pairs:
    """Pairs as a store of the plan gives them back."""
    z = unpacked(packed(pairs.z, _noise_type(plan))) if plan.images else pairs.z
    return Pairs(z, unpacked(packed(pairs.x, plan.store)), pairs.label)


def checksum(z: Tensor) -> list[float]:
    """Four numbers of the noise that tell a changed generator."""
    flat = z.flatten()
    picks: list[float] = flat[torch.linspace(0, len(flat) - 1, 4).long()].tolist()
    return picks


def same_noise(kept: list[float], z: Tensor) -> bool:
    """Whether noise is what it was, but for the last digits that devices differ in."""
    return all(abs(a - b) < 1e-4 for a, b in zip(kept, checksum(z), strict=True))


def tensors_of(plan: PairPlan, index: Tensor, pairs: Pairs) -> dict[str, Tensor]:
    """What a shard keeps of pairs, checked.

    Raises:
        UserError: an image or its noise is not finite as it is kept, or no pixel's value.
    """
    kept = {"x": packed(pairs.x, plan.store), "label": pairs.label}
    if plan.images:
        kept["z"] = packed(pairs.z, _noise_type(plan))
    checked = {"image": pairs.x if plan.store == "uint8" else kept["x"], "noise": kept.get("z")}
    for what, value in checked.items():
        if value is None:
            continue
        bad = _first(~torch.isfinite(value))
        if bad is not None:
            raise UserError(f"pairs: {what} {int(index[bad])} is not finite; stopped")
    if plan.store == "uint8":
        bad = _first(pairs.x.abs() > FURTHEST_PIXEL)
        if bad is not None:
            raise UserError(
                f"pairs.store=uint8: image {int(index[bad])} reaches "
                f"{float(pairs.x[bad].abs().max()):.3g}, and pixels lie in [-1, 1]; take "
                "store=fp16 or bf16"
            )
    return kept


def write_shard(folder: Folder, plan: PairPlan, shard: int, kept: dict[str, Tensor]) -> None:
    """Write a shard's tensors with its facts."""
    first = plan.noise(plan.indices(shard)[:1])
    facts = {"plan": plan.digest(), "noise": checksum(first), "sha256": content_hash(kept)}
    meta = {"shard": json.dumps(facts)}  # one entry, since safetensors writes several in any order
    data = save({name: value.contiguous() for name, value in kept.items()}, metadata=meta)
    folder.write(shard_name(shard), data)


def content_hash(kept: dict[str, Tensor]) -> str:
    """SHA-256 of tensors, in hex."""
    total = hashlib.sha256()
    for name, value in sorted(kept.items()):
        total.update(name.encode())
        total.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


@dataclass(frozen=True)
class Header:
    """What the beginning of a shard says.

    Args:
        facts: hash of its plan, checksum of its noise, hash of its content.
        shapes: of its tensors.
        types: of their numbers, as safetensors calls them.
    """

    facts: dict[str, Any]
    shapes: dict[str, list[int]]
    types: dict[str, str]


def read_header(folder: Folder, name: str, size: int | None) -> Header | None:
    """The header of a shard of so many bytes; None where it is torn or no such file."""
    try:
        head = folder.head(name, _FIRST_READ)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 or length > 1 << 20:
            return None
        if len(head) < 8 + length:
            head = folder.head(name, 8 + length)
        entries = json.loads(head[8 : 8 + length])
        facts = json.loads(entries.pop("__metadata__", {}).get("shard", "{}"))
        end = max(entry["data_offsets"][1] for entry in entries.values())
        shapes = {key: list(entry["shape"]) for key, entry in entries.items()}
        types = {key: entry["dtype"] for key, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    whole = size is None or size == 8 + length + end
    return Header(facts, shapes, types) if whole and isinstance(facts, dict) else None


def whole(
    folder: Folder, plan: PairPlan, shard: int, *, number: int | None = None, size: int | None
) -> bool:
    """Whether a shard is there, readable, of this plan, and of full length.

    Args:
        number: of its file, where that is not the shard's own.
        size: of the file in bytes; None: there is none.

    Raises:
        UserError: it belongs to another plan.
    """
    name = shard_name(shard if number is None else number)
    header = read_header(folder, name, size) if size else None
    if header is None:
        return False
    if header.facts.get("plan") != plan.digest():
        raise UserError(
            f"{folder.path(name)}: pairs of another plan; give pairs.path an empty folder"
        )
    return header.shapes.get("x", [0])[0] == len(plan.indices(shard))


def lacking(folder: Folder, wanted: list[Piece]) -> list[Piece]:
    """Those of a store's shards that are missing or torn.

    Raises:
        UserError: one belongs to another plan.
    """
    sizes = folder.sizes()

    def there(piece: Piece) -> bool:
        size = sizes.get(shard_name(piece.number))
        return whole(folder, piece.plan, piece.shard, number=piece.number, size=size)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(there, wanted))
    return [piece for piece, ok in zip(wanted, found, strict=True) if not ok]


def faults(folder: Folder, piece: Piece, size: int | None) -> Iterator[str]:
    """What is wrong with a shard, read whole."""
    plan, name = piece.plan, shard_name(piece.number)
    if size is None:
        yield "is missing"
        return
    header = read_header(folder, name, size)
    if header is None:
        yield "is torn or no safetensors file"
        return
    if header.facts.get("plan") != plan.digest():
        yield "is of another plan"
        return
    index, kept = plan.indices(piece.shard), load(folder.read(name))
    wanted = {"x": [len(index), *plan.held], "label": [len(index)]}
    wanted |= {"z": [len(index), *plan.shape]} if plan.images else {}
    if header.shapes != wanted:
        yield f"holds {header.shapes}, not {wanted}"
        return
    if "sha256" in header.facts and header.facts["sha256"] != content_hash(kept):
        yield "has other content than was written"
    if not same_noise(header.facts.get("noise", [0.0] * 4), plan.noise(index[:1])):
        yield "has noise that cannot be made again"
    if plan.images is None and not torch.equal(kept["label"], plan.labels(index)):
        yield "has other labels than its plan"
    for key in kept.keys() - {"label"}:
        bad = _first(~torch.isfinite(kept[key]))
        if bad is not None:
            yield f"has {'image' if key == 'x' else 'noise'} {int(index[bad])} that is not finite"


def _noise_type(plan: PairPlan) -> Kept:
    return "fp16" if plan.store == "uint8" else plan.store or "fp32"


def _first(bad: Tensor) -> int | None:
    """The first row of a mask [B, ...] in which something is set."""
    rows = bad.flatten(1).any(dim=1).nonzero()
    return int(rows[0, 0]) if len(rows) else None
