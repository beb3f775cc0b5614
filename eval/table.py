"""The table of figures, with the teacher's row beside every student's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from stepdistill.eval.runner import Row

_COLUMNS: tuple[tuple[str, Callable[[Row], str | None]], ...] = (
    ("fd", lambda row: _number(row.fd, ".2f")),
    ("kid x1000", lambda row: _kid(row)),
    ("precision", lambda row: _number(row.precision, ".3f")),
    ("recall", lambda row: _number(row.recall, ".3f")),
    ("diversity", lambda row: _number(row.diversity, ".3f")),
    ("fid", lambda row: _number(row.fid, ".2f")),
    ("clip", lambda row: _number(row.clip, ".2f")),
    ("straightness", lambda row: _number(row.straightness, ".4f")),
    ("psnr", lambda row: _number(row.psnr, ".2f")),
    ("feature distance", lambda row: _number(row.feature_distance, ".3f")),
)


def results_table(rows: Sequence[Row], teacher: Sequence[Row] = ()) -> Table:
    """Rows grouped by number of steps, the teacher's first in each group.

    Columns that are empty everywhere are left out. The caption says against what, in which feature
    space and from how many samples the figures are.
    """
    merged = sorted(
        [(row.steps or 0, 0, row) for row in teacher] + [(row.steps or 0, 1, row) for row in rows],
        key=lambda item: item[:2],
    )
    everyone = [row for _, _, row in merged]
    columns = [(name, show) for name, show in _COLUMNS if any(show(row) for row in everyone)]
    table = Table(caption=_caption(everyone))
    for name in ("steps", "model", "method"):
        table.add_column(name, justify="right" if name == "steps" else "left")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for place, (steps, student, row) in enumerate(merged):
        last = place + 1 == len(merged) or merged[place + 1][0] != steps
        table.add_row(
            str(row.steps or "-"),
            row.model,
            row.method,
            *(show(row) or "-" for _, show in columns),
            end_section=last,
            style="" if student else "dim",
        )
    return table


def _caption(rows: Sequence[Row]) -> str:
    spaces = sorted({f"{row.features} features against {row.reference}" for row in rows})
    counts = sorted({row.num for row in rows})
    return f"{'; '.join(spaces)}; {', '.join(f'{count:,}' for count in counts)} samples"


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _kid(row: Row) -> str | None:
    if row.kid is None:
        return None
    error = "" if row.kid_se is None else f" ± {1000 * row.kid_se:.1f}"
    return f"{1000 * row.kid:.1f}{error}"
