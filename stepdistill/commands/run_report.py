"""report: a run's page: its facts, samples, curves, and ratios against their healthy bands."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from stepdistill.commands import charts
from stepdistill.commands.charts import Series, number
from stepdistill.commands.read import read_config
from stepdistill.commands.report import Grid, facts_section, grids_section
from stepdistill.commands.report_style import html_page
from stepdistill.commands.run_paths import paths
from stepdistill.run.bands import BY_HAND, MEANINGS, SETTLED, Band, load, plain, series
from stepdistill.run.errors import UserError
from stepdistill.run.files import write_text
from stepdistill.run.log import read_rows
from stepdistill.trainers.settings import TrainConfig

_GRIDS = 3
_SAMPLES = {
    "student/sample_mean": "Mean of the student's samples, all pixels together",
    "student/sample_std": "Standard deviation of the student's samples",
    "student/saturation": "Share of pixels beyond 0.99 of the range",
}


def report(run: Path, out: Path | None = None, *, overwrite: bool = False) -> Path:
    """Write a run's page and return its path.

    Args:
        run: the run's folder; the run may still be going on.
        out: the page; RUN/report.html if left out.
        overwrite: replace a page that is there.

    Raises:
        UserError: no run, no rows yet, or a page that is not to be replaced.
    """
    file, path = run / "config.yaml", out or run / "report.html"
    if not file.is_file():
        raise UserError(f"{run}: no config.yaml, so this is no run; give the folder of `run=`")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another file with --out or pass --overwrite")
    if not path.parent.is_dir():
        raise UserError(f"{path}: no folder {path.parent}; make it first")
    _, config = read_config(str(file))
    rows = [row for row in read_rows(run) if "losses" in row or "eval" in row]
    if not rows:
        raise UserError(
            f"{run}: log.jsonl has no rows: the first comes after log.every_steps="
            f"{config.log.every_steps} steps, before which the run is or was stopped"
        )
    write_text(path, html_page(f"{config.method}: {run.name}", page(run, config, rows)))
    return path


def page(run: Path, config: TrainConfig, rows: Sequence[dict[str, Any]]) -> str:
    """The content of the page."""
    student = (run / "student").is_dir()
    state = "finished" if student else f"{rows[-1]['step']} of {config.steps} steps so far"
    skipped = max((row.get("skipped", 0) for row in rows), default=0)
    head = (
        f"<header><h1>{escape(config.method)}: {escape(run.name)}</h1>"
        f'<p class="intro">{escape(state)}, {rows[-1]["seconds"]:,.0f} s; '
        f"{skipped:,} updates skipped. Student of {escape(config.teacher or 'no teacher')}.</p>"
        "</header>"
    )
    parts = [
        head,
        grids_section(
            grids(run),
            "Samples along the run",
            "Above the teacher's, below the student's from the same noise.",
        ),
        grids_section(
            shown(run) if student else [],
            "Paths",
            "Of the teacher above, of the student below, in steps that are even in flow time.",
        ),
        curves(rows, config),
        health(rows, config),
        facts_section(facts(run, config, rows, state, skipped), "The run"),
    ]
    return "\n".join(part for part in parts if part)


def shown(run: Path) -> list[Grid]:
    """The paths of a flow; where its teacher is gone, none, which is told."""
    try:
        return paths(run)
    except UserError as error:
        print(f"report: no paths are shown: {error}", file=sys.stderr)
        return []


def grids(run: Path) -> list[Grid]:
    """At most three of the run's sample grids, the first and the last among them."""
    paths = sorted((run / "samples").glob("step-*.png"))
    count = min(_GRIDS, len(paths))
    places = {round(i * (len(paths) - 1) / max(1, count - 1)) for i in range(count)}
    return [
        Grid(f"step {int(paths[i].stem.removeprefix('step-')):,}", "", paths[i].read_bytes())
        for i in sorted(places)
    ]


def curves(rows: Sequence[dict[str, Any]], config: TrainConfig) -> str:
    """Losses and figures over steps."""
    names = dict.fromkeys(plain(name) for row in rows for name in row.get("losses", {}))
    losses = [name for name in names if name.split("/")[1] in ("loss", "gap", "distance")]
    shown = [chart(rows, name, config.steps) for name in losses]
    judged: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.get("eval", {}).items():
            if value is not None:
                judged.setdefault(name, []).append((row["step"], value))
    for name, points in judged.items():
        line = Series(config.method, "m1", points)
        drawn = charts.time_chart(
            line, what=name, seconds=config.steps, unit="steps", measured=True
        )
        shown.append(f"<figure><figcaption>{escape(name)}</figcaption>{drawn}</figure>")
    return (
        "<section><h2>Losses and figures</h2><p>Over steps; the strong line of a loss is its "
        f'running mean.</p><div class="pair">{"".join(shown)}</div></section>'
    )


def chart(rows: Sequence[dict[str, Any]], name: str, steps: int, band: Band | None = None) -> str:
    """A ratio or loss over steps, the phases in one line."""
    points = [point for part in series(rows, name).values() for point in part]
    line = Series(name.split("/")[0], "m0", [(float(at), value) for at, value in points])
    limits = None if band is None else (max(band.low, -10.0), band.high)
    drawn = charts.time_chart(
        line, what=name.split("/")[-1], seconds=steps, unit="steps", band=limits
    )
    return f"<figure><figcaption>{escape(name)}</figcaption>{drawn}</figure>"


def health(rows: Sequence[dict[str, Any]], config: TrainConfig) -> str:
    """Every ratio with its band and what it means; the samples' figures without one."""
    bands = BY_HAND | load().get(config.method, {})
    known = {plain(name) for row in rows for name in row.get("losses", {})}
    known |= {"skipped_share"} if any("skipped_share" in row for row in rows) else set()
    blocks = list(_ratios(rows, config, bands, known))
    samples = [
        f"<div>{chart(rows, name, config.steps)}<p>{escape(text)}.</p></div>"
        for name, text in _SAMPLES.items()
        if name in known
    ]
    if not blocks and not samples:
        return ""
    return (
        '<section class="health"><h2>Health</h2><p>The area is the healthy band, learnt from runs '
        "that went well; the first quarter of a run or phase is not held against it. Ratios "
        "without an area have no band for this method.</p>"
        f'{"".join(blocks)}<div class="pair">{"".join(samples)}</div></section>'
    )


def _ratios(
    rows: Sequence[dict[str, Any]], config: TrainConfig, bands: dict[str, Band], known: set[str]
) -> Iterator[str]:
    for name, meaning in MEANINGS.items():
        if name not in known:
            continue
        band = bands.get(name)
        kind, state = verdict(rows, name, band)
        advice = [f"Above: {meaning.above}."] + [f"Below: {meaning.below}."] * bool(meaning.below)
        yield (
            f'<div class="run">{chart(rows, name, config.steps, band)}<div>'
            f'<h3>{escape(name)}</h3><p class="state {kind}">{escape(state)}</p>'
            f"<p>{escape(meaning.text)}</p>"
            f'<p class="note">{escape(" ".join(advice) if band else "")}</p></div></div>'
        )


def verdict(rows: Sequence[dict[str, Any]], name: str, band: Band | None) -> tuple[str, str]:
    """A style and a line on how much of the settled run lies inside the band."""
    values = [
        value
        for points in series(rows, name).values()
        for _, value in points[math.ceil(SETTLED * len(points)) :]
    ]
    if band is None or not values:
        return "", "no band to compare with" if values else "too few rows yet"
    inside = sum(band.side(value) is None for value in values) / len(values)
    limits = f"{number(band.low)} to {number(band.high)}"
    return (
        "good" if inside >= 0.9 else "bad",
        f"{inside:.0%} of the settled rows within {limits}; last {number(values[-1])}",
    )


def facts(
    run: Path, config: TrainConfig, rows: Sequence[dict[str, Any]], state: str, skipped: int
) -> dict[str, str]:
    """What the run was, and how to do it again."""
    text = (run / "config.yaml").read_text(encoding="utf-8")
    notes = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    peak = max((row.get("memory_bytes", 0) for row in rows), default=0)
    settings = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return {
        "state": state,
        "training": f"{rows[-1]['step']:,} steps, {rows[-1]['seconds']:,.0f} s, "
        f"{sorted(rates)[len(rates) // 2] if rates else 0:,.0f} images/s, "
        f"peak memory {peak / 2**20:,.0f} MiB",
        "updates skipped": f"{skipped:,}",
        "made with": "; ".join(notes),
        "command": f"stepdistill train {run / 'config.yaml'} run=NEW",
        "config": settings,
    }
