"""A finished store, read back: mapped into memory, in the order of a run, ahead of its steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from stepdistill.data.order import batch_positions
from stepdistill.data.pairs.folder import Folder, LocalFolder, open_folder
from stepdistill.data.pairs.plan import AnyPlan, PairPlan, Pairs, Piece, parts_of, pieces
from stepdistill.data.pairs.shards import lacking, read_header, same_noise, shard_name, unpacked
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng

AHEAD = 2  # batches that are read while a step is taken
Positions = npt.NDArray[np.int64]
Sent = tuple[Tensor, Tensor, Tensor]


class PairStore:
    """A finished store, of one plan or merged; shards are mapped, and only what is asked is read.

    Args:
        root: the store's folder on this machine.
        plan: what it must hold.
        flip: every pair is there a second time, mirrored: noise and image [.., W] along W.
        shares: of a merged store's parts in a batch; None: as many as they have pairs.

    Raises:
        UserError: a shard is missing or damaged, or its noise cannot be made again; while reading,
            an image is not finite.
    """

    def __init__(
        self,
        root: Path | str,
        plan: AnyPlan,
        *,
        flip: bool = False,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.folder, self.plan, self.flip = LocalFolder(str(root)), plan, flip
        self.parts = parts_of(plan)
        if shares is not None and len(shares) != len(self.parts):
            raise UserError(
                f"pairs.shares: {len(shares)} numbers, and {root} has {len(self.parts)} parts; "
                "give one a part"
            )
        self.shares = None if shares is None else np.cumsum(np.asarray(shares) / sum(shares))
        self._pieces = list(pieces(plan))
        self._sizes = np.array([len(p.plan.indices(p.shard)) for p in self._pieces])
        self._ends = np.cumsum(self._sizes)
        self._open: dict[int, dict[str, Tensor]] = {}
        self._check()

    @property
    def num(self) -> int:
        """Pairs, the mirrored ones with them."""
        return int(self._ends[-1]) * (2 if self.flip else 1)

    def _check(self) -> None:
        missing = lacking(self.folder, self._pieces)
        if missing:
            raise UserError(
                f"{self.folder.place}: {len(missing)} of {len(self._pieces)} shards are missing or "
                f"torn, first {shard_name(missing[0].number)}; run `stepdistill pairs` again"
            )
        for piece in self._pieces:
            if piece.plan.images is not None:
                continue  # its noise is in the file
            name = shard_name(piece.number)
            header = read_header(self.folder, name, None)
            first = piece.plan.noise(piece.plan.indices(piece.shard)[:1])
            if header is None or not same_noise(header.facts["noise"], first):
                raise UserError(f"{self.folder.path(name)}: its noise cannot be made again")

    def at(self, index: Positions | Tensor) -> Pairs:
        """Pairs by their places in the store [B]: those of the first shard, then the next's."""
        places = np.asarray(index, dtype=np.int64)
        total = int(self._ends[-1])
        mirrored, places = places >= total, places % total
        shards = np.searchsorted(self._ends, places, side="right")
        part = self.parts[0]
        x, z = (torch.empty(len(places), *shape) for shape in (part.held, part.shape))
        label, own = torch.empty(len(places), dtype=torch.int64), np.empty(len(places), np.int64)
        drawn: dict[PairPlan, list[Positions]] = {}
        for shard in np.unique(shards).tolist():
            rows, piece, kept = (
                (shards == shard).nonzero()[0],
                self._pieces[shard],
                self._mapped(shard),
            )
            local = places[rows] - (self._ends[shard] - self._sizes[shard])
            own[rows] = local + piece.shard * piece.plan.shard
            x[rows], label[rows] = unpacked(kept["x"][local]), kept["label"][local]
            if piece.plan.images is None:
                drawn.setdefault(piece.plan, []).append(rows)
            else:
                z[rows] = unpacked(kept["z"][local])
        for plan, parts in drawn.items():  # at once: a draw costs the same for few and for many
            rows = np.concatenate(parts)
            z[rows] = plan.noise(torch.from_numpy(own[rows]))
        self._refuse_not_finite(x, shards, own)
        if mirrored.any():
            z[mirrored], x[mirrored] = z[mirrored].flip(-1), x[mirrored].flip(-1)
        return Pairs(z, x, label)

    def _refuse_not_finite(self, x: Tensor, shards: Positions, own: Positions) -> None:
        """Name the first image [B, *S] that is not finite, of those by file and own index."""
        finite = torch.isfinite(x)
        if not finite.all():
            row = int((~finite.flatten(1).all(dim=1)).nonzero()[0, 0])
            name = shard_name(self._pieces[int(shards[row])].number)
            raise UserError(
                f"{self.folder.path(name)}: image {int(own[row])} is not finite; remove the file "
                "and run `stepdistill pairs` again"
            )

    def _mapped(self, shard: int) -> dict[str, Tensor]:
        """The tensors of a shard, in memory that is mapped from its file."""
        if shard not in self._open:
            path = self.folder.root / shard_name(self._pieces[shard].number)
            with safe_open(path, "pt") as file:
                self._open[shard] = {name: file.get_tensor(name) for name in file.keys()}
        return self._open[shard]

    def positions(self, step: int, batch_size: int, seed: int) -> Positions:
        """Places in the store [batch_size] of a step's global batch."""
        if self.shares is None:
            return batch_positions(step, batch_size, self.num, seed)
        u = Rng(seed).at(step).uniform("pair-part", torch.arange(batch_size)).numpy()
        part = np.minimum(np.searchsorted(self.shares, u, side="right"), len(self.parts) - 1)
        out, base = np.empty(batch_size, dtype=np.int64), 0
        for k, plan in enumerate(self.parts):
            own = batch_positions(step, batch_size, plan.num * (2 if self.flip else 1), seed)
            twin = own // plan.num * int(self._ends[-1])  # of the mirrored ones
            out[part == k] = (base + own % plan.num + twin)[part == k]
            base += plan.num
        return out

    def batch(
        self, step: int, batch_size: int, seed: int, share: slice, device: torch.device
    ) -> Sent:
        """Noise, images and labels of this process's share of a step's global batch."""
        return sent(self._read(step, batch_size, seed, share, device), device)

    def batches(
        self, steps: range, batch_size: int, seed: int, share: slice, device: torch.device
    ) -> Generator[Sent, None, None]:
        """:meth:`batch` of each step, read ahead in a thread.

        Nothing waits for the device: batches are sent to it from pinned memory.
        """
        waiting: deque[Future[Pairs]] = deque()
        with ThreadPoolExecutor(1, "pairs") as pool:
            try:
                for step in steps:
                    while len(waiting) <= AHEAD and step + len(waiting) in steps:
                        ahead = step + len(waiting)
                        waiting.append(
                            pool.submit(self._read, ahead, batch_size, seed, share, device)
                        )
                    yield sent(waiting.popleft().result(), device)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _read(
        self, step: int, batch_size: int, seed: int, share: slice, device: torch.device
    ) -> Pairs:
        read = self.at(self.positions(step, batch_size, seed)[share])
        if device.type != "cuda":
            return read
        return Pairs(read.z.pin_memory(), read.x.pin_memory(), read.label.pin_memory())


def sent(pairs: Pairs, device: torch.device) -> Sent:
    """Noise, images and labels on a device."""
    return (
        pairs.z.to(device, non_blocking=True),
        pairs.x.to(device, non_blocking=True),
        pairs.label.to(device, non_blocking=True),
    )


def fetch(folder: Folder, plan: AnyPlan, near: Path, part: tuple[int, int] = (0, 1)) -> Path:
    """A store's folder on this machine; of a store elsewhere, the shards are copied to ``near``.

    Args:
        part: (k, n): copy only every n-th shard, from the k-th on.

    Raises:
        UserError: ``near`` holds other pairs, or a shard is not there.
    """
    if isinstance(folder, LocalFolder):
        return folder.root
    copy, (k, n) = open_folder(near), part
    every: list[Piece] = list(pieces(plan))
    for piece in lacking(copy, every[k::n]):
        name = shard_name(piece.number)
        try:
            copy.write(name, folder.read(name))
        except FileNotFoundError as error:
            raise UserError(
                f"{folder.path(name)}: is missing; run `stepdistill pairs` again"
            ) from error
    return near


def described(plan: AnyPlan) -> str:
    """A store in a few words."""
    parts = parts_of(plan)
    num = f"{sum(part.num for part in parts):,} pairs"
    return num if isinstance(plan, PairPlan) else f"{num} of {len(parts)} merged stores"
