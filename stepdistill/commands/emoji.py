"""data emoji: Twemoji's pictures as a captioned set."""

from __future__ import annotations

from pathlib import Path

from stepdistill.data.emoji import make_emoji
from stepdistill.run.errors import UserError


def emoji(source: Path, out: Path, *, overwrite: bool = False) -> str:
    """Make the set; returns what was made, in a line.

    Raises:
        UserError: the folder is not the package's, or a set is there.
    """
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; choose another folder or pass --overwrite")
    ours = all((out / name).is_file() for name in ("NOTICE.txt", "metadata.jsonl"))
    if out.exists() and not (ours or (out.is_dir() and not any(out.iterdir()))):
        raise UserError(f"{out} is no set that this command has made, so it is not overwritten")
    pictures, captions = make_emoji(source, out)
    return f"{out}: {pictures:,} pictures with {captions:,} captions"
