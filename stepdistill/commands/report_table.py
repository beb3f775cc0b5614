"""The table of the demo's report: rows grouped by number of steps, the teacher's beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from stepdistill.commands.charts import count, number, squares
from stepdistill.run.errors import UserError


@dataclass(frozen=True)
class Figures:
    """The rows, sorted out.

    Args:
        rows: all of them.
        teacher: the teacher's by number of steps, rising.
        students: all others, by rising number of steps.
        most: the teacher's largest number of steps.
        best: its FD there.
    """

    rows: Sequence[Mapping[str, Any]]
    teacher: Mapping[int, Mapping[str, Any]]
    students: Sequence[Mapping[str, Any]]
    most: int
    best: float

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Figures:
        """Sort rows out.

        Raises:
            UserError: none is the teacher's with an FD above zero.
        """
        by_steps = sorted(rows, key=lambda row: int(row["steps"]))
        mine = [row for row in by_steps if row["method"] == "teacher"]
        teacher = {row["steps"]: row for row in mine if (known(row["fd"]) or 0) > 0}
        if not teacher:
            raise UserError('report: no row with method "teacher" and an fd above zero')
        most = max(teacher)
        students = [row for row in by_steps if row["method"] != "teacher"]
        return cls(rows, teacher, students, most, teacher[most]["fd"])

    def ratio(self, row: Mapping[str, Any]) -> float | None:
        """The row's FD as a multiple of the teacher's at its most steps."""
        fd = known(row["fd"])
        return None if fd is None else fd / self.best

    def beside(self, row: Mapping[str, Any]) -> float | None:
        """The teacher's FD at the row's number of steps."""
        same = self.teacher.get(row["steps"])
        return None if same is None else known(same["fd"])

    def spread(self, row: Mapping[str, Any]) -> float | None:
        """The row's diversity against the teacher's at its most steps, in percent off."""
        own, full = known(row["diversity"]), known(self.teacher[self.most]["diversity"])
        return None if own is None or not full else 100 * (own / full - 1)

    def best_by_steps(self) -> Iterator[Mapping[str, Any]]:
        """The student's row with the least FD for each number of steps."""
        measured = [row for row in self.students if known(row["fd"]) is not None]
        for steps in sorted({row["steps"] for row in measured}):
            yield min((row for row in measured if row["steps"] == steps), key=_fd)


def results_table(figures: Figures, colours: Mapping[str, str]) -> str:
    """Say what FD is, then list all rows.

    Args:
        figures: the rows.
        colours: by method, the class that sets its colour.
    """
    heads = (
        "Method",
        "FD",
        f"÷ teacher’s FD<br>at {count(figures.most)}",
        "Teacher’s FD,<br>same steps",
        "KID<br>× 1000",
        f"Diversity, and against<br>teacher at {count(figures.most)}",
        "Training",
    )
    head = "".join(f'<th role="columnheader" scope="col">{text}</th>' for text in heads)
    ratios = [ratio for row in figures.students if (ratio := figures.ratio(row)) is not None]
    longest = 1.08 * min(8.0, max([1.25, *ratios]))
    groups = []
    for steps in sorted({row["steps"] for row in figures.rows}):
        here = [row for row in figures.rows if row["steps"] == steps]
        here.sort(key=lambda row: (row["method"] != "teacher", _fd(row)))
        lines = "".join(_row(row, figures, colours, longest) for row in here)
        groups.append(
            f'<tbody role="rowgroup"><tr class="group" role="row"><th role="rowheader"'
            f' scope="rowgroup" colspan="{len(heads)}">{squares(steps)}{count(steps)}</th></tr>'
            f"{lines}</tbody>"
        )
    return (
        f"<section><h2>Results</h2>{_what_fd_is(figures)}"
        f'<table role="table"><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f"{''.join(groups)}</table></section>"
    )


def _what_fd_is(figures: Figures) -> str:
    rows = figures.rows
    names = dict.fromkeys(str(row["features"]) for row in rows)
    spaces = " and ".join(f"<code>{escape(name)}</code>" for name in names)
    counts = " or ".join(f"{n:,}" for n in sorted({row["num"] for row in rows}))
    return (
        f"<p>FD here is the Fréchet distance between {counts} samples and the 1,797 digits of "
        f"scikit-learn in the feature space {spaces}. It is not FID, which is measured in "
        "another feature space, and the two cannot be compared.</p>"
        '<p class="note">Each long bar is FD as a multiple of the teacher’s at '
        f"{count(figures.most)}, which is the mark in it; a student below 1 is better than that. "
        "KID is the kernel distance in the same feature space; lower is better for both. "
        "Diversity is the mean pairwise distance of the samples’ pixels, each with its difference "
        f"to the teacher’s at {count(figures.most)}.</p>"
    )


def _row(
    row: Mapping[str, Any], figures: Figures, colours: Mapping[str, str], longest: float
) -> str:
    method, is_teacher = row["method"], row["method"] == "teacher"
    ratio = figures.ratio(row)
    better = not is_teacher and ratio is not None and ratio < 1
    mark = '<span class="mark">better than the teacher</span>' if better else ""
    model = "" if row["model"] == method else f" <small>{escape(str(row['model']))}</small>"
    colour = "mt" if is_teacher else colours[method]
    seconds, kid = known(row["train_seconds"]), known(row["kid"])
    cells = [
        f'<td class="method" role="cell"><div><span class="key {colour}">{escape(method)}</span>'
        f"{model}{mark}</div></td>",
        _cell("FD", _shown(known(row["fd"])), "fd"),
        _cell("r", "" if ratio is None else _ratio_bar(ratio, longest, colour), "ratio"),
        _cell("teacher, same steps", "" if is_teacher else _beside(row, figures)),
        _cell("KID × 1000", "" if kid is None else f"{1000 * kid:.2f}".replace("-", "−")),
        _cell("diversity", _diversity(row, figures, colour)),
        _cell("trained", "" if seconds is None else f"{seconds:,.0f} s"),
    ]
    kind = "teacher" if is_teacher else "better" if better else ""
    return f'<tr class="{kind}" role="row">{"".join(cells)}</tr>'


def _cell(label: str, text: str, kind: str = "") -> str:
    kind = kind if text else f"{kind} blank".strip()
    return f'<td class="{kind}" role="cell" data-label="{label}">{text or "–"}</td>'


def _ratio_bar(ratio: float, longest: float, colour: str) -> str:
    share = 100 / longest
    cut = ' class="cut"' if ratio > longest else ""
    return (
        f'<span class="withbar"><span class="bar {colour}" aria-hidden="true">'
        f'<i{cut} style="width:{min(100.0, ratio * share):.1f}%"></i>'
        f'<u style="left:{share:.1f}%"></u></span><span>{times(ratio)}</span></span>'
    )


def _beside(row: Mapping[str, Any], figures: Figures) -> str:
    fd, beside = known(row["fd"]), figures.beside(row)
    if fd is None or beside is None:
        return _shown(beside)
    if fd > beside:
        return f'{number(beside)} <small class="worse">the teacher is better</small>'
    return number(beside) + (f" <small>{times(beside / fd)} as far</small>" if fd > 0 else "")


def _diversity(row: Mapping[str, Any], figures: Figures, colour: str) -> str:
    value, off = known(row["diversity"]), figures.spread(row)
    if value is None or off is None:
        return _shown(value)
    length = 50 * min(1.0, abs(off) / 10)  # ten percent fill one side
    left = 50 - length if off < 0 else 50
    sign = "−" if round(off, 1) < 0 else "+" if round(off, 1) > 0 else "±"
    return (
        f'<span class="withbar">{number(value)}<span class="bar off {colour}" aria-hidden="true">'
        f'<i style="left:{left:.1f}%;width:{length:.1f}%"></i><u style="left:50%"></u></span>'
        f"<span><small>{sign}{abs(off):.1f} %</small></span></span>"
    )


def known(value: Any) -> float | None:
    """Return the number, or None where it is missing or not finite."""
    return float(value) if value is not None and math.isfinite(value) else None


def _fd(row: Mapping[str, Any]) -> float:
    fd = known(row["fd"])
    return math.inf if fd is None else fd


def _shown(value: float | None) -> str:
    return "" if value is None else number(value)


def times(ratio: float) -> str:
    """Write a multiple, as 1.35×."""
    places = 2 if ratio < 9.95 else 1 if ratio < 99.5 else 0
    return f"{ratio:,.{places}f}×"
