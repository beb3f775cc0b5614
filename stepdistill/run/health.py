"""Watches for updates that were skipped, and for a fake score that grows without bound."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from stepdistill.run.errors import UserError
from stepdistill.run.player import Player

IN_A_ROW = 3
GROWS = tuple(
    f"critic{place}/{what}" for place in ("", "_2", "_3", "_4") for what in ("loss", "grad_norm")
)


class NotFinite(UserError):  # noqa: N818
    """A player skipped three updates in a row.

    Args:
        step: the last of them.
        player: its name.
    """

    remedy = (
        "Try a smaller optim.lr, a longer optim.warmup_steps, precision=fp32, or look at the data "
        "and the teacher"
    )

    def __init__(self, step: int, player: str) -> None:
        self.what = (
            f"step {step}: the {player}'s gradient was not finite {IN_A_ROW} updates in a row; "
            "its weights are as they were before"
        )
        super().__init__(f"{self.what}. {self.remedy}")


class Health:
    """Counts skipped updates of every player and stops a run that only skips.

    On a GPU a flag is read one step late, when it has long arrived, so the host never waits for
    the device; nothing is lost by that, since the device itself skipped the update.

    Args:
        skipped: updates skipped so far, by player.
    """

    def __init__(self, skipped: dict[str, int] | None = None) -> None:
        self.skipped = dict(skipped or {})
        self.row: dict[str, int] = {}
        self.latest: tuple[int, str] | None = None
        self._seen = [0, 0]
        self._waiting: list[tuple[str, int, Tensor, torch.cuda.Event | None]] = []

    def note(self, players: Iterable[Player], step: int) -> None:
        """Take the flags of a step and look at those that have arrived.

        Raises:
            NotFinite: a player skipped three updates in a row.
        """
        for player in players:
            if player.finite is None:
                continue
            flag, event = player.finite, None
            if flag.is_cuda:
                flag = flag.to("cpu", non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._waiting.append((player.name, step, flag, event))
            player.finite = None
        self.look()

    def look(self, *, wait: bool = False) -> None:
        """Read the flags that have arrived, or all of them."""
        while self._waiting:
            name, step, flag, event = self._waiting[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._waiting.pop(0)
            self._count(name, step, bool(flag))

    def share(self) -> float:
        """Share of the updates since the last call that were skipped."""
        (seen, skipped), self._seen = self._seen, [0, 0]
        return skipped / seen if seen else 0.0

    def _count(self, name: str, step: int, finite: bool) -> None:
        self._seen[0] += 1
        if finite:
            self.row[name] = 0
            return
        self._seen[1] += 1
        self.skipped[name] = self.skipped.get(name, 0) + 1
        self.row[name] = self.row.get(name, 0) + 1
        self.latest = step, name
        if self.row[name] >= IN_A_ROW:
            raise NotFinite(step, name)


class Divergence:
    """Tells from the rows of a log that a fake score grows without bound.

    Its loss has a floor that training cannot go below, so a loss or a gradient that stands two
    rows in a row far above its own lowest mean comes back no more.

    Args:
        factor: how far above is too far.
        rows: rows of a mean.
    """

    def __init__(self, factor: float, rows: int) -> None:
        self.factor, self.rows = factor, rows
        self.calm = self._seen = 0
        self._players: frozenset[str] = frozenset()
        self._begin()

    def _begin(self) -> None:
        self._last = {name: deque[float](maxlen=self.rows) for name in GROWS}
        self._lowest = dict.fromkeys(GROWS, math.inf)
        self._above = dict.fromkeys(GROWS, 0)

    def look(self, step: int, losses: Mapping[str, float], *, skipped: bool) -> str | None:
        """What grew, in words, or None; ``calm`` is then the last step before it began.

        Args:
            step: of the row.
            losses: of the row.
            skipped: whether updates were skipped in it, which may leave it without a number.
        """
        players = frozenset(name.split("/")[0] for name in losses)
        if players != self._players:  # a new phase, whose fake score starts anew
            self._players = players
            self._begin()
        found, calm = None, True
        for name in GROWS:
            value = losses.get(name)
            if value is None or (skipped and not math.isfinite(value)):
                continue
            lowest = self._lowest[name] or math.inf
            calm &= math.isfinite(value) and value <= math.sqrt(self.factor) * lowest
            if math.isfinite(value) and value <= self.factor * lowest:
                self._above[name] = 0
                self._last[name].append(value)
                if len(self._last[name]) == self.rows:
                    self._lowest[name] = min(lowest, sum(self._last[name]) / self.rows)
                continue
            self._above[name] += 1
            if self._above[name] == 2:
                found = f"{name} is {value:.3g}"
                if math.isfinite(lowest):
                    mean = f"its lowest mean of {self.rows} rows, {lowest:.3g}"
                    found += f", over {self.factor:g} times {mean}"
        if calm:  # the row's own last update was not seen yet: what it left may be bad already
            self.calm, self._seen = self._seen, step
        return found
