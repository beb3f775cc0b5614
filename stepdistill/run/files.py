"""Files and folders that are whole and on the disk, or not there at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flush(path: Path) -> None:
    """Have the disk hold a file's content or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it and rename it."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A fresh sibling folder that becomes ``out`` when the block ends well, else is removed.

    What was at ``out`` before is put aside until the new folder is in its place.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    fresh, aside = (out.with_name(f".{out.name}.{mark}.{kind}") for kind in ("part", "old"))
    fresh.mkdir()
    try:
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            flush(path)
        if out.exists():
            out.rename(aside)
        try:
            fresh.rename(out)
        except OSError:
            if aside.exists():
                aside.rename(out)
            raise
        flush(out.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)
