"""The place of a store: a folder, or a folder of an object store that fsspec reaches."""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

from stepdistill.run.errors import UserError
from stepdistill.run.files import flush, write_bytes

# Where a file that is put is there whole or not at all.
ATOMIC = {"memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "oci", "oss"}


class Folder(ABC):
    """Files by name, written whole.

    Attributes:
        place: as the user wrote it, for messages.
    """

    place: str

    def path(self, name: str) -> str:
        """How a file is called in messages."""
        return f"{self.place.rstrip('/')}/{name}"

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of the files that are there, by name."""

    @abstractmethod
    def head(self, name: str, count: int) -> bytes:
        """The first ``count`` bytes of a file, or all of a shorter one."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All of a file.

        Raises:
            OSError: it is not there, or cannot be read.
        """

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Put a file there, whole or not at all; one of that name is replaced."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Put a file there unless it is there already; whether it was put."""

    @abstractmethod
    def stamp(self, name: str) -> tuple[bytes, int]:
        """The content of a small file and a number; one of them changes with :meth:`beat`.

        Raises:
            OSError: it is not there.
        """

    @abstractmethod
    def beat(self, name: str, data: bytes) -> None:
        """Change the stamp of a small file; where its content must change for it, to ``data``."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is let be."""

    @abstractmethod
    def free(self) -> int | None:
        """Bytes that there is room for; None where that is not known."""


class LocalFolder(Folder):
    """A folder of this machine, or one that several share."""

    def __init__(self, place: str) -> None:
        self.place, self.root = place, Path(place)

    def sizes(self) -> dict[str, int]:
        """See :meth:`Folder.sizes`."""
        found = {}
        with suppress(FileNotFoundError), os.scandir(self.root) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    def head(self, name: str, count: int) -> bytes:
        """See :meth:`Folder.head`."""
        with (self.root / name).open("rb") as file:
            return file.read(count)

    def read(self, name: str) -> bytes:
        """See :meth:`Folder.read`."""
        return (self.root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """See :meth:`Folder.write`; what a writer that was killed has left is removed."""
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.glob(f".{name}.*"):
            left.unlink(missing_ok=True)
        write_bytes(self.root / name, data)
        flush(self.root)

    def create(self, name: str, data: bytes) -> bool:
        """See :meth:`Folder.create`; the file system sees to it that one alone succeeds."""
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(self.root / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        return True

    def stamp(self, name: str) -> tuple[bytes, int]:
        """See :meth:`Folder.stamp`."""
        return self.read(name), (self.root / name).stat().st_mtime_ns

    def beat(self, name: str, data: bytes) -> None:
        """See :meth:`Folder.beat`."""
        os.utime(self.root / name)

    def remove(self, name: str) -> None:
        """See :meth:`Folder.remove`."""
        (self.root / name).unlink(missing_ok=True)

    def free(self) -> int:
        """See :meth:`Folder.free`."""
        there = next(
            path for path in (self.root.absolute(), *self.root.absolute().parents) if path.exists()
        )
        return shutil.disk_usage(there).free


class RemoteFolder(Folder):
    """A folder of a file system that fsspec knows, by its URL.

    Raises:
        UserError: fsspec does not know it, or what it needs for it is not installed.
    """

    def __init__(self, place: str) -> None:
        import fsspec  # not needed for folders

        self.place = place
        try:
            fs, root = fsspec.core.url_to_fs(place, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"pairs.path={place}: {error}") from error
        self.fs: Any = fs
        self.root: str = root.rstrip("/")
        kinds = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
        self.atomic = bool(ATOMIC & set(kinds))

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def sizes(self) -> dict[str, int]:
        """See :meth:`Folder.sizes`."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.root, detail=True)
        except FileNotFoundError:
            return {}
        return {
            entry["name"].rpartition("/")[2]: int(entry["size"] or 0)
            for entry in found
            if entry["type"] == "file"
        }

    def head(self, name: str, count: int) -> bytes:
        """See :meth:`Folder.head`."""
        return bytes(self.fs.cat_file(self._at(name), start=0, end=count))

    def read(self, name: str) -> bytes:
        """See :meth:`Folder.read`."""
        return bytes(self.fs.cat_file(self._at(name)))

    def write(self, name: str, data: bytes) -> None:
        """See :meth:`Folder.write`."""
        if self.atomic:
            self.fs.pipe_file(self._at(name), data)
            return
        self.fs.makedirs(self.root, exist_ok=True)
        part = self._at(f".{name}.{os.getpid()}.part")
        self.fs.pipe_file(part, data)
        self.fs.mv(part, self._at(name))

    def create(self, name: str, data: bytes) -> bool:
        """See :meth:`Folder.create`; two may succeed at once where the store cannot tell.

        It is read back, so that of two that overlapped the later one stays.
        """
        if not self.atomic:
            self.fs.makedirs(self.root, exist_ok=True)
        try:
            self.fs.pipe_file(self._at(name), data, mode="create")
        except FileExistsError:
            return False
        with suppress(FileNotFoundError):
            return self.read(name) == data
        return False

    def stamp(self, name: str) -> tuple[bytes, int]:
        """See :meth:`Folder.stamp`."""
        return self.read(name), 0

    def beat(self, name: str, data: bytes) -> None:
        """See :meth:`Folder.beat`."""
        self.fs.pipe_file(self._at(name), data)

    def remove(self, name: str) -> None:
        """See :meth:`Folder.remove`."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self._at(name))

    def free(self) -> None:
        """See :meth:`Folder.free`."""
        return


def open_folder(place: str | Path) -> Folder:
    """The folder of a path, or of a URL such as s3://bucket/pairs."""
    text = str(place)
    if text.startswith(("file://", "local://")):
        text = text.partition("://")[2]
    return RemoteFolder(text) if "://" in text else LocalFolder(text)


def write_json(folder: Folder, name: str, value: Any) -> None:
    """Write a value as JSON."""
    folder.write(name, json.dumps(value, indent=1).encode())
