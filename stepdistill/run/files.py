"""Files and folders that are whole and on the disk, or not there at all."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from stepdistill.run.errors import UserError

_CHUNK = 1 << 20


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Give the system's errors of writing ``path`` its name; safetensors' become such errors."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def told(what: str, mend: Callable[[], str]) -> Iterator[None]:
    """Turn an error of the system into the one line that a user reads.

    Args:
        what: is being written.
        mend: gives what to do, and what is kept.

    Raises:
        UserError: the block could not write.
    """
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        why = error.strerror or str(error)
        raise UserError(f"{what} could not be written: {why}{where}; {mend()}") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    total, buffer = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total.update(view[:count])
    return total.hexdigest()


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
        with named(path):
            with fresh.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
    finally:
        with suppress(OSError):  # on a disk that takes no change the first error is the one to tell
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
        with named(out):
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
