"""The tables of a benchmark as sections of a Markdown file."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Collection, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from stepdistill.eval.runner import Row
from stepdistill.run.files import write_text
from stepdistill.run.versions import versions


def section(
    rows: Sequence[Row],
    walks: Sequence[Row],
    *,
    teacher: str,
    overrides: Sequence[str] = (),
    steps: int,
    seconds: float,
    num: int,
    guided: Collection[str],
) -> str:
    """The benchmark of students as a section of Markdown, the best first.

    Args:
        rows: the students', a run each.
        walks: the teacher's, by rising number of steps.
        teacher: its name.
        overrides: keys with values that all took part with.
        steps: of the students.
        seconds: training budget of each.
        num: samples of each evaluation.
        guided: methods whose teacher is guided, which are told apart.
    """
    best, keys = walks[-1], f" {shlex.join(overrides)}" if overrides else ""
    lines = [
        f"## Students of {teacher} in {steps} step{'s' if steps > 1 else ''}"
        f"{keys and ' with'}{keys}, {seconds:g} s of "
        "training each",
        "",
        f"{date.today()}, {versions()}; `stepdistill bench students --teacher {teacher} --steps "
        f"{steps} --seconds {seconds:g}{keys}`; {num:,} samples against the digits, Frechet "
        "distance fd in the features of the shipped digits classifier; r is fd over the teacher's "
        "at 32 steps; mean ± standard deviation over seeds. Diversity is the mean pairwise "
        "distance of the images, and its change against the teacher's. The budget is of one core "
        "of the machine that the record was begun on, and counts steps by the time that one "
        "takes, in passes of a teacher, without the making of pairs; all learn the unguided "
        "teacher's law, but those that say guided.",
        "",
        "| method | fd | r | diversity | seeds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    groups = {row.method: [r for r in rows if r.method == row.method] for row in rows}
    for method, group in sorted(groups.items(), key=lambda item: mean(item[1], "fd")):
        fd, spread = mean(group, "fd"), deviation(group, "fd")
        wide = mean(group, "diversity")
        change = wide / (best.diversity or 1) - 1
        lines.append(
            f"| `{method}`{', guided' if method in guided else ''} | {given(group, fd, spread)} "
            f"| {given(group, fd / (best.fd or 1), spread / (best.fd or 1))} "
            f"| {wide:.2f} ({change:+.1%}) | {len(group)} |"
        )
    for row in walks:
        ratio = (row.fd or 0) / (best.fd or 1)
        lines.append(
            f"| teacher, {row.steps} steps | {row.fd:.2f} | {ratio:.2f} | {row.diversity:.2f} | |"
        )
    return "\n".join(lines) + "\n"


def given(rows: Sequence[Row], value: float, spread: float) -> str:
    """A figure, with its spread where there is one."""
    return f"{value:.2f} ± {spread:.2f}" if len(rows) > 1 else f"{value:.2f}"


def mean(rows: Sequence[Row], figure: str) -> float:
    """Mean of a figure over rows."""
    return statistics.fmean(getattr(row, figure) for row in rows)


def deviation(rows: Sequence[Row], figure: str) -> float:
    """Standard deviation of a figure over rows; 0 of one."""
    values: list[Any] = [getattr(row, figure) for row in rows]
    return statistics.stdev(values) if len(values) > 1 else 0.0


def replace_section(file: Path, text: str) -> None:
    """Put a section into a Markdown file, in place of the one of its title up to the budget."""
    old = file.read_text(encoding="utf-8") if file.is_file() else "# Benchmarks\n"
    parts = old.split("\n## ")
    sections = [parts[0].rstrip(), *(f"## {part.rstrip()}" for part in parts[1:])]
    titles = [section.splitlines()[0].split(",")[0] for section in sections]
    title = text.splitlines()[0].split(",")[0]
    if title in titles:
        sections[titles.index(title)] = text.rstrip()
    else:
        sections.append(text.rstrip())
    write_text(file, "\n\n".join(sections) + "\n")
