"""Merging stores, and checking one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stepdistill.data.pairs.claims import Claims
from stepdistill.data.pairs.folder import Folder
from stepdistill.data.pairs.make import MANIFEST, read_manifest, write_manifest
from stepdistill.data.pairs.plan import AnyPlan, MergedPlan, PairPlan, parts_of, pieces
from stepdistill.data.pairs.shards import faults, lacking, read_header, shard_name
from stepdistill.run.errors import UserError


@dataclass(frozen=True)
class Fault:
    """A shard that is not as it should be: the file's place, and what is wrong with it."""

    path: str
    what: str


def verify(folder: Folder, plan: AnyPlan) -> Iterator[Fault | None]:
    """Read every shard; what is wrong with it first of all, or None."""
    sizes = folder.sizes()
    for piece in pieces(plan):
        name = shard_name(piece.number)
        wrong = next(faults(folder, piece, sizes.get(name)), None)
        yield Fault(folder.path(name), wrong) if wrong else None


def plan_in(folder: Folder) -> AnyPlan:
    """What a store says that it holds.

    Raises:
        UserError: there is no store.
    """
    plan = read_manifest(folder)
    if plan is None:
        raise UserError(f"{folder.place}: has no {MANIFEST}, so it is no store of pairs")
    return plan


def merge(stores: Sequence[Folder], out: Folder) -> AnyPlan:
    """Copy stores into one; returns what it holds.

    Stores of one plan give one store of it, of the shards that any of them has: where two have a
    shard it must be the same, and the first one's is taken. Of several plans the shards are
    numbered on. Shards that ``out`` has are kept.

    Raises:
        UserError: the stores' pairs are not of one kind; two disagree in a shard, or none has it;
            or ``out`` holds other pairs.
    """
    sources: dict[PairPlan, list[tuple[Folder, int]]] = {}
    for store in stores:
        base = 0
        for part in parts_of(plan_in(store)):
            sources.setdefault(part, []).append((store, base))
            base += part.shards()
    first, *others = sources
    for other in others:
        differs = first.alike(other)
        if differs is not None:
            raise UserError(
                f"{sources[other][0][0].place}: {differs} is {getattr(other, differs)}, and "
                f"{getattr(first, differs)} in {sources[first][0][0].place}; merge pairs of one "
                "teacher, made alike"
            )
    plan: AnyPlan = MergedPlan((first, *others)) if others else first
    write_manifest(out, plan, Claims(out))
    sizes = {store: store.sizes() for store in stores}
    for piece in lacking(out, list(pieces(plan))):
        found = [(store, shard_name(base + piece.shard)) for store, base in sources[piece.plan]]
        out.write(shard_name(piece.number), _one_of(found, piece.plan, sizes))
    return plan


def _one_of(
    found: list[tuple[Folder, str]], plan: PairPlan, sizes: dict[Folder, dict[str, int]]
) -> bytes:
    """The file of a shard that some of the stores have.

    Raises:
        UserError: none has it, or two have different ones.
    """
    there = []
    for store, name in found:
        header = read_header(store, name, sizes[store].get(name))
        if header is not None and header.facts.get("plan") == plan.digest():
            there.append((store, name, header))
    if not there:
        places = ", ".join(store.place for store, _ in found)
        raise UserError(
            f"{found[0][1]}: is in none of {places}; make it by `stepdistill pairs` first"
        )
    store, name, header = there[0]
    for other, its_name, its_header in there[1:]:
        if its_header.facts.get("sha256") != header.facts.get("sha256"):
            raise UserError(
                f"{other.path(its_name)}: is not the shard of {store.path(name)}, which has the "
                "same plan (they were made on other devices, or one is damaged); leave out one "
                "of the stores"
            )
    return store.read(name)
