"""Making a store: every worker takes the shards that are missing and nobody's, until none is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.data.pairs.claims import CLAIM, TIMEOUT_SECONDS, Claims
from stepdistill.data.pairs.folder import Folder, write_json
from stepdistill.data.pairs.plan import AnyPlan, MergedPlan, PairPlan, Pairs, Piece, pieces
from stepdistill.data.pairs.shards import lacking, tensors_of, write_shard
from stepdistill.run.errors import UserError

MANIFEST = "manifest.json"
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 2.0

Maker = Callable[[Tensor], Pairs]
"""From indices [B] to their pairs."""


def of_noise(plan: PairPlan, draw: Callable[[Tensor, Cond], Tensor]) -> Maker:
    """What makes a plan's pairs by drawing images of noise under conditions."""

    def make(index: Tensor) -> Pairs:
        z, label = plan.noise(index), plan.labels(index)
        return Pairs(z, draw(z, Cond(label if plan.classes else None)).cpu(), label)

    return make


def make_pairs(
    folder: Folder,
    plan: PairPlan,
    make: Maker,
    *,
    batch_size: int,
    told: Callable[[int, int], None],
    part: tuple[int, int] = (0, 1),
    timeout: float = TIMEOUT_SECONDS,
) -> None:
    """Make the shards that are missing, beside other workers on the same folder if there are any.

    It comes back when all are there, whoever made them.

    Args:
        folder: the store's.
        plan: what to make.
        make: makes pairs of indices.
        batch_size: pairs made at once.
        told: is called with the number of pairs that are there, and of those made here, after each
            batch.
        part: (k, n): only every n-th shard from the k-th on.
        timeout: seconds without a sign of life after which another worker's shard is taken over.

    Raises:
        UserError: the teacher made an image that is not finite, whose index is named; or the
            folder holds other pairs.
    """
    k, n = part
    worker = _Worker(folder, plan, make, batch_size, told, Claims(folder, timeout))
    worker.work(list(pieces(plan))[k::n])


class _Worker:
    """One of those that make a store; see :func:`make_pairs`."""

    def __init__(
        self,
        folder: Folder,
        plan: PairPlan,
        make: Maker,
        batch_size: int,
        told: Callable[[int, int], None],
        claims: Claims,
    ) -> None:
        self.folder, self.plan, self.make, self.batch_size = folder, plan, make, batch_size
        self.told, self.claims, self.made = told, claims, 0

    def work(self, every: list[Piece]) -> None:
        """Make what is missing of these shards, or wait for those who do."""
        self.wanted, pause = self._pairs_in(every), FIRST_PAUSE_SECONDS
        self.left = lacking(self.folder, every)
        self.tell()
        write_manifest(self.folder, self.plan, self.claims)
        while self.left:
            if self._take_one():
                pause = FIRST_PAUSE_SECONDS
            else:
                time.sleep(pause)
                pause = min(LONGEST_PAUSE_SECONDS, 1.5 * pause)
            self.left = lacking(self.folder, self.left)
            self.tell()
        for name in self.folder.sizes():  # of workers that died after their shard was written
            if name.startswith(f"{CLAIM}pairs-"):
                number = int(name.removeprefix(f"{CLAIM}pairs-"))
                if number in {piece.number for piece in every}:
                    self.claims.drop(_claimed(number))

    def tell(self, extra: int = 0) -> None:
        """Say how many pairs are there, ``extra`` of them in the shard at work."""
        self.told(self.wanted - self._pairs_in(self.left) + extra, self.made)

    def _pairs_in(self, some: list[Piece]) -> int:
        return sum(len(self.plan.indices(piece.shard)) for piece in some)

    def _take_one(self) -> bool:
        """Make the first shard that is nobody's; whether there was one."""
        for piece in self.left:
            with self.claims.take(_claimed(piece.number)) as mine:
                if mine:
                    if lacking(self.folder, [piece]):  # else another has made it meanwhile
                        self._make(piece)
                    return True
        return False

    def _make(self, piece: Piece) -> None:
        index, parts, done = self.plan.indices(piece.shard), [], 0
        for some in index.split(self.batch_size):
            parts.append(tensors_of(self.plan, some, self.make(some)))
            done += len(some)
            self.made += len(some)
            self.tell(done)
        kept = {key: torch.cat([one[key] for one in parts]) for key in parts[0]}
        write_shard(self.folder, self.plan, piece.shard, kept)


def _claimed(number: int) -> str:
    return f"pairs-{number:06d}"


def write_manifest(folder: Folder, plan: AnyPlan, claims: Claims) -> None:
    """Have the manifest there, by this worker or another.

    Raises:
        UserError: there is one of other pairs.
    """
    while (kept := read_manifest(folder)) is None:
        with claims.take(MANIFEST) as mine:
            if mine:
                write_json(folder, MANIFEST, plan.facts())
        if not mine:
            time.sleep(FIRST_PAUSE_SECONDS)
    if kept != plan:
        raise UserError(
            f"{folder.path(MANIFEST)}: tells of pairs of another plan; give pairs.path an empty "
            "folder"
        )
    claims.drop(MANIFEST)  # of one that died after it had written it


def read_manifest(folder: Folder) -> AnyPlan | None:
    """What a store says that it holds; None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    try:
        facts = json.loads(folder.read(MANIFEST))
        if "parts" in facts:
            return MergedPlan(tuple(PairPlan.read(part) for part in facts["parts"]))
        return PairPlan.read(facts)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{folder.path(MANIFEST)}: is no manifest of pairs; remove it and run `stepdistill "
            "pairs` again"
        ) from error
