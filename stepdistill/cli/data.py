"""The commands that prepare data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(help="Prepare data: sets of captioned pictures.")


@data.callback()
def _group() -> None:
    """Have the group's commands named, though there is one."""


@data.command()
def emoji(
    source: Annotated[
        Path, typer.Option("--from", help="the unpacked npm package emoji-datasource-twitter")
    ],
    out: Annotated[Path, typer.Option(help="folder of the pictures and their captions")],
    overwrite: Annotated[bool, typer.Option(help="replace a set that is there")] = False,
) -> None:
    """Make a captioned set of 1,911 colour pictures of 64 by 64 pixels."""
    from stepdistill.commands.emoji import emoji as make

    print(make(source, out, overwrite=overwrite))
