"""What lies in a folder of images: the files and their labels, before any is opened.

Three layouts: a metadata file with the columns file_name and (if there are classes) label or (if
there are captions) text, of which each is a class; one sub-folder a class; or images alone.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from stepdistill.run.errors import UserError

EXTENSIONS = frozenset(".png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm .pgm".split())
_MOST_CLASSES = 1_000_000
_Row = tuple[str, str | int | None]


class Caption(str):
    """A name that is never read as a number."""


@dataclass(frozen=True)
class Layout:
    """Files of a folder, their labels (0 where there are none) and the class names by label."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    @classmethod
    def unlabelled(cls, files: Iterable[Path]) -> Layout:
        """Files without classes."""
        paths = tuple(files)
        return cls(paths, (0,) * len(paths), ())


def read_layout(folder: Path) -> Layout:
    """List a folder's images in a fixed order.

    Raises:
        UserError: no images, two layouts at once, or a metadata file that cannot be understood.
    """
    tables = [folder / name for name in ("metadata.jsonl", "metadata.csv")]
    found = [table for table in tables if table.is_file()]
    if len(found) == 2:
        raise UserError(f"{folder} has both metadata.jsonl and metadata.csv; keep one")
    if found:
        return _from_metadata(found[0])
    loose = _images(folder, "*")
    groups = {sub.name: _images(sub, "**/*") for sub in _subfolders(folder)}
    groups = {name: files for name, files in groups.items() if files}
    if loose and groups:
        raise UserError(
            f"{folder} has images both beside and inside its sub-folders ({loose[0].name}, "
            f"{next(iter(groups))}/); keep either class folders or loose images"
        )
    if not loose and not groups:
        raise UserError(f"no images in {folder} (looked for {', '.join(sorted(EXTENSIONS))})")
    if loose:
        return Layout.unlabelled(loose)
    classes = sorted(groups, key=_class_order)
    pairs = [(file, label) for label, name in enumerate(classes) for file in groups[name]]
    return Layout(tuple(f for f, _ in pairs), tuple(n for _, n in pairs), tuple(classes))


def _class_order(name: str) -> tuple[bool, int, str]:
    """Whole numbers first and by value, then names by letter: 2 comes before 10."""
    number = name.isdecimal()
    return (not number, int(name) if number else 0, name)


def _subfolders(folder: Path) -> list[Path]:
    return [sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith(".")]


def _images(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        path
        for path in folder.glob(pattern)
        if path.suffix.lower() in EXTENSIONS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _from_metadata(table: Path) -> Layout:
    rows = list(_jsonl_rows(table) if table.suffix == ".jsonl" else _csv_rows(table))
    if not rows:
        raise UserError(f"{table} lists no images")
    for name, _ in rows:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise UserError(f"{table}: file_name {name!r} must lie inside {table.parent}")
    values = [label for _, label in rows if label is not None]
    if values and len(values) < len(rows):
        missing = next(name for name, label in rows if label is None)
        raise UserError(f"{table}: {missing} has no label though other rows do")
    files = tuple(table.parent / name for name, _ in rows)
    if not values:
        return Layout.unlabelled(files)
    labels, classes = _number_labels(table, values)
    return Layout(files, labels, classes)


def _number_labels(table: Path, values: list[str | int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Whole numbers are kept as they are; names are numbered by letter."""
    numbers = (isinstance(v, int) or (v.isdecimal() and type(v) is str) for v in values)
    if all(numbers):
        labels = tuple(int(value) for value in values)
        for label in (min(labels), max(labels)):
            if not 0 <= label < _MOST_CLASSES:
                raise UserError(f"{table}: label {label} is out of range; number classes from 0")
        return labels, tuple(str(label) for label in range(max(labels) + 1))
    names = [str(value) for value in values]  # plain ones, of captions too
    classes = sorted(set(names), key=_class_order)
    number = {name: label for label, name in enumerate(classes)}
    return tuple(number[name] for name in names), tuple(classes)


def _jsonl_rows(table: Path) -> Iterator[_Row]:
    for number, line in enumerate(_text(table).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{table}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise UserError(f"{table}:{number}: needs a text file_name")
        label, text = row.get("label"), row.get("text")
        if not isinstance(label, (str, int, type(None))):
            raise UserError(f"{table}:{number}: label must be a name or a whole number")
        if not isinstance(text, (str, type(None))):
            raise UserError(f"{table}:{number}: text must be a caption")
        yield row["file_name"], _one_of(f"{table}:{number}", label, text)


def _csv_rows(table: Path) -> Iterator[_Row]:
    reader = csv.DictReader(_text(table).splitlines())
    if "file_name" not in (reader.fieldnames or ()):
        raise UserError(f"{table}:1: needs a column file_name")
    for row in reader:
        if not row["file_name"]:
            raise UserError(f"{table}:{reader.line_num}: needs a file_name")
        where = f"{table}:{reader.line_num}"
        yield row["file_name"], _one_of(where, row.get("label") or None, row.get("text") or None)


def _one_of(where: str, label: str | int | None, text: str | None) -> str | int | None:
    """The label of a row, or its caption.

    Raises:
        UserError: it has both.
    """
    if label is not None and text is not None:
        raise UserError(f"{where}: has both a label and a text; keep the one that is meant")
    return label if text is None else Caption(text)


def _text(table: Path) -> str:
    try:
        return table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {table}: {error}") from error
