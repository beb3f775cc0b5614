"""Arguments that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(help="a config file, or the name of an installed one")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.sub=value, over what the file says")
]
