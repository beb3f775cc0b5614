"""Twemoji's pictures with their names: a captioned set from an npm package.

The package is ``emoji-datasource-twitter``; the pictures are by Twitter and other contributors,
under CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/), which asks that they be named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from stepdistill.run.errors import UserError
from stepdistill.run.files import whole_folder

LIST, PICTURES = "emoji.json", "img/twitter/64"
NOTICE = (
    "Pictures: Twemoji, copyright Twitter, Inc and other contributors, licensed under CC-BY 4.0\n"
    "(https://creativecommons.org/licenses/by/4.0/), from the npm package\n"
    "emoji-datasource-twitter; set on white by `stepdistill data emoji`. Names: from Unicode and\n"
    "the same package.\n"
)


def make_emoji(source: Path, out: Path) -> tuple[int, int]:
    """Write pictures on white and metadata.jsonl, a row for each caption of each.

    Args:
        source: the package's folder, which holds emoji.json.
        out: folder to write, in the place of what was there.

    Returns:
        Numbers of pictures and of captions.

    Raises:
        UserError: the folder is not the package's.
    """
    rows = read_list(source)
    captions = 0
    with whole_folder(out) as folder:
        with (folder / "metadata.jsonl").open("w", encoding="utf-8") as table:
            for row in rows:
                on_white(source / PICTURES / row["image"]).save(folder / row["image"])
                for text in captions_of(row):
                    line = {"file_name": row["image"], "text": text, "category": row["category"]}
                    table.write(json.dumps(line) + "\n")
                    captions += 1
        (folder / "NOTICE.txt").write_text(NOTICE, encoding="utf-8")
    return len(rows), captions


def read_list(source: Path) -> list[dict[str, Any]]:
    """What the package says of each picture that it has, in the order of Unicode's chart.

    Raises:
        UserError: the folder is not the package's.
    """
    file = source / LIST
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        found = [row for row in rows if (source / PICTURES / row["image"]).is_file()]
        found.sort(key=lambda row: (row["sort_order"], row["image"]))
        named = all(isinstance(row["name"], str) and row["short_names"] for row in found)
        named = named and all(isinstance(row["category"], str) for row in found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--from {source}: no emoji-datasource-twitter there ({type(error).__name__} at "
            f"{LIST}); give its unpacked folder, `npm pack emoji-datasource-twitter`"
        ) from error
    if not found or not named:
        raise UserError(f"--from {source}: {PICTURES} holds none of the pictures of {LIST}")
    return found


def captions_of(row: dict[str, Any]) -> Iterator[str]:
    """A picture's name in small letters, and its short names where they say it otherwise."""
    seen = set()
    for name in (row["name"], *row["short_names"]):
        text = " ".join(re.sub(r"[-_]+", " ", name.lower()).split())
        words = frozenset(re.findall(r"\w+", text))
        if words and words not in seen and len(text) > 1:
            seen.add(words)
            yield text


def on_white(file: Path) -> Image.Image:
    """A picture in RGB, white where it is transparent.

    Raises:
        UserError: it is broken.
    """
    try:
        with Image.open(file) as image:
            rgba = image.convert("RGBA")
    except (OSError, SyntaxError) as error:
        raise UserError(f"--from: {file} is broken ({error}); unpack the package again") from error
    ground = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(ground, rgba).convert("RGB")
