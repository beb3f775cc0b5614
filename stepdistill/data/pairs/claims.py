"""Claims: who makes which shard, among workers that share a folder and nothing else.

A claim is a small file, created by one worker alone and touched while it works. Of a worker that
died the claim is taken over: at once where it ran on this machine, else when its file has not
changed for as long as ``timeout`` by this worker's own clock. Where two hold one claim after all,
work is done twice: a shard is a function of its plan, so the second writes what is there.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from stepdistill.data.pairs.folder import Folder

CLAIM = "claim-"  # what the names of their files begin with
TIMEOUT_SECONDS = 60.0
EMPTY_SECONDS = 2.0  # of one that was created and not written


class Claims:
    """The claims of one worker on names in a folder.

    Args:
        folder: which the workers share.
        timeout: seconds without a sign of life after which a claim is void.
    """

    def __init__(self, folder: Folder, timeout: float = TIMEOUT_SECONDS) -> None:
        self.folder, self.timeout = folder, timeout
        self._seen: dict[str, tuple[Any, float]] = {}

    @contextmanager
    def take(self, name: str) -> Iterator[bool]:
        """Whether a name is this worker's for the block; it is given back at its end."""
        file, mine = f"{CLAIM}{name}", self._mark(0)
        if not (self.folder.create(file, mine) or self._inherit(file, mine)):
            yield False
            return
        ended = threading.Event()
        beating = threading.Thread(target=self._beat, args=(file, ended), daemon=True)
        beating.start()
        try:
            yield True
        finally:
            ended.set()
            beating.join()
            self.drop(name)

    def drop(self, name: str) -> None:
        """Remove a claim, whoever's, on what is done."""
        self._seen.pop(f"{CLAIM}{name}", None)
        self.folder.remove(f"{CLAIM}{name}")

    def _mark(self, beats: int) -> bytes:
        mark = {"host": socket.gethostname(), "pid": os.getpid(), "beats": beats}
        return json.dumps(mark | {"key": secrets.token_hex(4)}).encode()

    def _beat(self, file: str, ended: threading.Event) -> None:
        beats = 0
        while not ended.wait(self.timeout / 6):
            beats += 1
            with suppress(OSError):  # the next one may succeed; if none does, work is done twice
                self.folder.beat(file, self._mark(beats))

    def _inherit(self, file: str, mine: bytes) -> bool:
        """Take the claim of a worker that died."""
        try:
            stamp = self.folder.stamp(file)
        except OSError:  # given back just now
            return self.folder.create(file, mine)
        known, since = self._seen.get(file, (None, 0.0))
        if known != stamp:
            self._seen[file] = stamp, time.monotonic()
        still = time.monotonic() - since if known == stamp else 0.0
        limit = self.timeout if stamp[0] else min(EMPTY_SECONDS, self.timeout)
        if still < limit and not _died(stamp[0]):
            return False
        self._seen.pop(file, None)
        self.folder.remove(file)
        return self.folder.create(file, mine)


def _died(content: bytes) -> bool:
    """Whether a claim is of a process of this machine that is no more."""
    try:
        mark = json.loads(content)
        host, pid = mark["host"], int(mark["pid"])
    except (ValueError, KeyError, TypeError):
        return False
    if host != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
