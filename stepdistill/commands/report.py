"""The demo's report: one HTML page that needs nothing but a browser."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from stepdistill.commands import charts
from stepdistill.commands.charts import Point, Series, count, number, squares
from stepdistill.commands.report_style import html_page
from stepdistill.commands.report_table import Figures, known, results_table, times
from stepdistill.run.errors import UserError
from stepdistill.run.files import write_text

_COLOURS = 6
_PNG = b"\x89PNG\r\n\x1a\n"
_SHOWN = 280  # a sample grid is at most so wide, in pixels


@dataclass(frozen=True)
class Grid:
    """A picture of samples.

    Args:
        title: the model and its number of steps.
        caption: a line below.
        png: the file's bytes; one pixel of a sample as one pixel is enough.
    """

    title: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Curve:
    """What was seen of one method while it trained.

    Args:
        method: its name.
        loss: pairs (seconds of training, loss).
        fd: pairs (seconds of training, FD of the samples).
        teacher_fd: the teacher's at its most steps.
    """

    method: str
    loss: list[Point]
    fd: list[Point]
    teacher_fd: float


def write_report(
    path: Path,
    *,
    title: str,
    intro: str,
    rows: Sequence[Mapping[str, Any]],
    grids: Sequence[Grid],
    curves: Sequence[Curve],
    facts: Mapping[str, str],
) -> None:
    """Write the page so that it is whole or not there; an older one is replaced.

    Args:
        path: of the HTML file, in a folder that exists.
        title: the heading.
        intro: a paragraph below it; blank lines part paragraphs.
        rows: figures with keys model, method ("teacher" for the teacher's), steps, features, fd,
            kid, diversity, num, train_seconds. A figure that is None shows as a dash.
        grids: pictures of samples from the same noise, in the order in which they are shown.
        curves: one a method.
        facts: versions, seeds, hardware, commands: what it takes to do it again.

    Raises:
        UserError: there is no row of the teacher, or a grid is not a PNG.
    """
    figures = Figures.of(rows)
    methods = [*(row["method"] for row in rows), *(curve.method for curve in curves)]
    names = [name for name in dict.fromkeys(methods) if name != "teacher"]
    colours = {name: f"m{n % _COLOURS}" for n, name in enumerate(names)}
    body = [
        _header(title, intro, figures, colours),
        results_table(figures, colours),
        grids_section(grids),
        _curves(curves, figures, colours),
        facts_section(facts),
    ]
    write_text(path, html_page(title, "\n".join(part for part in body if part)))


def _header(title: str, intro: str, figures: Figures, colours: Mapping[str, str]) -> str:
    paragraphs = "".join(f'<p class="intro">{escape(part)}</p>' for part in intro.split("\n\n"))
    items = "".join(_best(row, figures, colours) for row in figures.best_by_steps())
    return (
        f"<header><h1>{escape(title)}</h1>{paragraphs}"
        '<div class="glance"><div>'
        "<h2>Best at each number of steps</h2>"
        f'<div class="small">FD as a multiple of the teacher’s at {count(figures.most)}, '
        f"which is {number(figures.best)}. Below 1 is better than the teacher.</div>"
        f'<ol class="best">{items}</ol></div>'
        "<div><h2>Distance to the data by number of steps</h2>"
        '<div class="small">FD, lower is better; both axes are logarithmic. '
        f"Dashed: the teacher at {count(figures.most)}.</div>"
        f"{_ladders(figures, colours)}</div></div></header>"
    )


def _best(row: Mapping[str, Any], figures: Figures, colours: Mapping[str, str]) -> str:
    ratio, beside = figures.ratio(row), figures.beside(row)
    assert ratio is not None
    same = "" if beside is None else f"<br>Teacher at {count(row['steps'])}: FD {number(beside)}"
    return (
        f'<li class="{"good" if ratio < 1 else ""}"><div class="budget">{squares(row["steps"])}'
        f'{count(row["steps"])}</div><div><div class="times">{times(ratio)}</div>'
        f'<div class="small"><b class="key {colours[row["method"]]}">{escape(row["method"])}</b>, '
        f"FD {number(row['fd'])}{same}</div></div></li>"
    )


def _ladders(figures: Figures, colours: Mapping[str, str]) -> str:
    teacher = Series("teacher", "mt", [(n, row["fd"]) for n, row in figures.teacher.items()])
    students = []
    for name in dict.fromkeys(row["method"] for row in figures.students):
        mine = [row for row in figures.students if row["method"] == name]
        points = [(float(row["steps"]), row["fd"]) for row in mine if (known(row["fd"]) or 0) > 0]
        students.append(Series(name, colours[name], points))
    students = [one for one in students if one.points]
    wide = charts.ladder_chart(teacher, students, width=640, height=420)
    narrow = charts.ladder_chart(teacher, students, width=360, height=330)
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def grids_section(
    grids: Sequence[Grid],
    title: str = "Samples from the same noise",
    intro: str = "The same place in every picture started from the same noise.",
) -> str:
    """Pictures side by side, each within the page; nothing if there are none.

    Raises:
        UserError: one is not a PNG.
    """
    if not grids:
        return ""
    figures = []
    for grid in grids:
        if not grid.png.startswith(_PNG):
            raise UserError(f"report: the grid {grid.title!r} is not a PNG")
        width, height = (int.from_bytes(grid.png[at : at + 4], "big") for at in (16, 20))
        large = width > _SHOWN
        shown = width / math.ceil(width / _SHOWN) if large else width * (_SHOWN // width)
        figures.append(
            f'<figure><img alt="samples of {escape(grid.title)}" width="{width}" height="{height}"'
            f' class="{"large" if large else "small"}" style="width:{shown:.0f}px"'
            f' src="data:image/png;base64,{b64encode(grid.png).decode()}">'
            f"<figcaption><h3>{escape(grid.title)}</h3><span>{escape(grid.caption)}</span>"
            "</figcaption></figure>"
        )
    return (
        f"<section><h2>{escape(title)}</h2><p>{escape(intro)}</p>"
        f'<div class="grids">{"".join(figures)}</div></section>'
    )


def _curves(curves: Sequence[Curve], figures: Figures, colours: Mapping[str, str]) -> str:
    if not curves:
        return ""
    loss = {curve.method: charts.finite(curve.loss) for curve in curves}
    fd = {curve.method: charts.finite(curve.fd) for curve in curves}
    seconds = max([at for points in (*loss.values(), *fd.values()) for at, _ in points] + [0.0])
    ends = [curve.teacher_fd for curve in curves if math.isfinite(curve.teacher_fd)]
    among = [value for points in fd.values() for _, value in points] + ends
    runs = []
    for curve in curves:
        name, colour = curve.method, colours[curve.method]
        left = charts.time_chart(Series(name, colour, loss[name]), what="loss", seconds=seconds)
        right = charts.time_chart(
            Series(name, colour, fd[name]),
            what="FD",
            seconds=seconds,
            among=among,
            reference=(f"teacher, {count(figures.most)}", curve.teacher_fd),
            measured=True,
        )
        runs.append(
            f'<div class="run"><h3 class="key {colour}">{escape(name)}</h3>'
            f"<figure><figcaption>Loss</figcaption>{left}</figure>"
            f"<figure><figcaption>FD</figcaption>{right}</figure></div>"
        )
    return (
        "<section><h2>Training</h2><p>Loss and FD over seconds of training. All charts share the "
        "axis of seconds, and those of FD their axis of FD; losses of two methods cannot be "
        "compared. The strong line of a loss is its running mean.</p>"
        f'<div class="runs">{"".join(runs)}</div></section>'
    )


def facts_section(facts: Mapping[str, str], title: str = "How to get this again") -> str:
    """Names and values in a list; nothing if there are none."""
    if not facts:
        return ""
    items = "".join(
        f"<dt>{escape(key)}</dt><dd>{_fact(key, value)}</dd>" for key, value in facts.items()
    )
    return f"<section><h2>{escape(title)}</h2><dl>{items}</dl></section>"


def _fact(key: str, value: str) -> str:
    return f"<code>{escape(value)}</code>" if "command" in key.lower() else escape(value)
