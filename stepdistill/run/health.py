"""Watches for steps that were skipped because a gradient was not finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from stepdistill.run.errors import UserError
from stepdistill.run.player import Player

IN_A_ROW = 3


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
        self._waiting: list[tuple[str, int, Tensor, torch.cuda.Event | None]] = []

    def note(self, players: Iterable[Player], step: int) -> None:
        """Take the flags of a step and look at those that have arrived.

        Raises:
            UserError: a player skipped three updates in a row.
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

    def _count(self, name: str, step: int, finite: bool) -> None:
        if finite:
            self.row[name] = 0
            return
        self.skipped[name] = self.skipped.get(name, 0) + 1
        self.row[name] = self.row.get(name, 0) + 1
        if self.row[name] >= IN_A_ROW:
            raise UserError(
                f"step {step}: the {name}'s gradient was not finite {IN_A_ROW} updates in a row; "
                "its weights are as they were before. Try a smaller optim.lr, a longer "
                "optim.warmup_steps, precision=fp32, or look at the data and the teacher"
            )
