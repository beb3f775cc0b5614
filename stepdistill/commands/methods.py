"""methods and schema: what can be trained, and with which keys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from stepdistill.run.config import about
from stepdistill.trainers.find import methods as all_methods
from stepdistill.trainers.find import trainer


def methods() -> None:
    """Print the methods, read from their files without importing them, and the configs."""
    found = [(method.name, method.family, method.summary) for method in all_methods()]
    _print(("method", "family", "what it does"), found)
    print()
    _print(("config", "method", "what it trains"), about())


def _print(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*titles, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def schema(method: str) -> str:
    """The JSON schema of a method's config files.

    Raises:
        UserError: there is no such method.
    """
    made = trainer(method).Config.model_json_schema()
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    parent = {"type": "string", "description": "a config whose keys this one adds to"}
    made["properties"]["extends"] = parent
    made["properties"]["method"] |= {"const": method}
    return json.dumps(made, indent=2)
