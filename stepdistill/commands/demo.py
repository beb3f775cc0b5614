"""demo: the main job on real images: distil, export, reload, evaluate, report."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

from stepdistill.commands.evaluate import evaluate, open_reference
from stepdistill.commands.export import export
from stepdistill.commands.fleet import Fleet
from stepdistill.commands.picture import write_picture
from stepdistill.commands.report import Curve, Grid, write_report
from stepdistill.eval.generate import generate, load_pipeline
from stepdistill.eval.images import save_grid
from stepdistill.eval.runner import Reference, Row
from stepdistill.eval.table import results_table
from stepdistill.run.assets import teacher_path
from stepdistill.run.errors import CheckFailed, UserError
from stepdistill.run.files import write_text
from stepdistill.run.log import read_rows

METHODS = ("sim", "dmd", "phased_dmd", "consistency", "reflow")
TEACHER, TEACHER_STEPS, SEED = "digits-dit", (1, 2, 4, 32), 0
STEPS = (1, 2, 4)
METRICS = ("fd", "kid", "diversity")


RATIOS = {
    ("sim", 1): 1.7,
    ("dmd", 1): 1.9,
    ("consistency", 1): 1.6,
    ("reflow", 1): 5.0,
    ("phased_dmd", 4): 1.2,
    ("consistency", 4): 1.4,
    ("reflow", 4): 2.2,
}
"""Largest Frechet distance of a row, in the teacher's at its most steps."""

SPREADS = {"sim": 0.03, "dmd": 0.03, "phased_dmd": 0.03, "consistency": 0.08, "reflow": 0.08}
"""Largest relative change of the diversity against that teacher, by method."""


def demo(out: Path, *, num: int = 2000, methods: Sequence[str] | None = None) -> None:
    """Run the demo into ``out``; finished runs in it are kept and only evaluated again.

    Raises:
        UserError: an unknown method.
        CheckFailed: a student fell short of what the demo must show.
    """
    chosen = list(methods or METHODS)
    unknown = [name for name in chosen if name not in METHODS]
    if unknown:
        raise UserError(f"--method {unknown[0]}: the demo has {', '.join(METHODS)}")
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    reference = open_reference("digits", None, METRICS, "cpu")
    teacher = teacher_rows(reference, num)
    train_all(out / "runs", chosen)
    rows: list[Row] = []
    for method in chosen:
        run, folder = out / "runs" / method, out / "pipelines" / method
        rows += deliver(run, folder, reference, method, steps=STEPS, num=num)
    everything = [*teacher, *rows]
    write_text(
        out / "results.json", json.dumps([row.model_dump() for row in everything], indent=1) + "\n"
    )
    Console().print(results_table(rows, teacher))
    page(out, chosen, everything, num, time.monotonic() - began)
    print(f"report: {out / 'report.html'}  ({time.monotonic() - began:.0f} s in all)")
    judge(teacher, rows, full=num >= 2000)


def train_all(runs: Path, methods: Sequence[str]) -> None:
    """Train every method, as many at a time as there are cores.

    Raises:
        CheckFailed: a training ended with an error; its own line tells why.
    """
    fleet = Fleet(len(methods))
    codes = fleet.each(lambda name: fleet.train(f"{name}-digits", runs / name), methods)
    failed = [f"{name} (exit code {n})" for name, n in zip(methods, codes, strict=True) if n]
    if failed:
        raise CheckFailed(f"demo: training did not finish: {', '.join(failed)}")


def teacher_rows(
    reference: Reference,
    num: int,
    teacher: str = TEACHER,
    steps: Sequence[int] = TEACHER_STEPS,
) -> list[Row]:
    """A shipped teacher's figures at each of its numbers of steps."""
    return evaluate(
        teacher,
        reference,
        steps=steps,
        num=num,
        metrics=METRICS,
        seed=SEED,
        method="teacher",
    )


def deliver(
    run: Path, folder: Path, reference: Reference, name: str, *, steps: Sequence[int], num: int
) -> list[Row]:
    """Export a finished run with its check, and evaluate what was exported.

    Args:
        run: its folder.
        folder: of the pipeline, replaced if it is there.
        reference: the real images.
        name: of method and model in the rows.
        steps: sampler steps; those that the student does not have are left out.
        num: samples of each evaluation.
    """
    difference = export(run, folder, overwrite=True)
    print(f"{name}: exported, largest difference {difference:.1g}", file=sys.stderr, flush=True)
    rows = evaluate(
        folder,
        reference,
        steps=steps,
        num=num,
        metrics=METRICS,
        seed=SEED,
        name=name,
        method=name,
        trust_remote_code=True,
    )
    seconds = read_rows(run)[-1]["seconds"]
    for row in rows:
        row.train_seconds = round(seconds, 1)
    return rows


def page(out: Path, methods: Sequence[str], rows: Sequence[Row], num: int, seconds: float) -> None:
    """Write report.html."""
    many = next(r for r in rows if r.method == "teacher" and r.steps == max(TEACHER_STEPS))
    curves = [curve(out / "runs" / method, method, many.fd or math.nan) for method in methods]
    facts = {
        "samples of each row": f"{num:,}, seed {SEED}",
        "versions": ", ".join(f"{p} {version(p)}" for p in ("torch", "diffusers", "stepdistill")),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} "
        "threads",
        "whole demo": f"{seconds:.0f} s",
        "command": "make demo",
    }
    write_report(
        out / "report.html",
        title="Few steps instead of thirty-two",
        intro="A small diffusion transformer that draws handwritten digits in 32 steps, distilled "
        "by each method into one that needs one to four.",
        rows=[row.model_dump() for row in rows],
        grids=grids(out, methods, rows),
        curves=curves,
        facts=facts,
    )


def grids(out: Path, methods: Sequence[str], rows: Sequence[Row]) -> list[Grid]:
    """Forty images of the teacher and of every student, from the same noise; and grid.png."""
    wanted = [("teacher", teacher_path(TEACHER), n) for n in (1, max(TEACHER_STEPS))]
    for method in methods:
        own = sorted(row.steps or 0 for row in rows if row.method == method)
        picked = sorted({own[0], own[-1]})
        wanted += [(method, str(out / "pipelines" / method), n) for n in picked]
    distance = {(row.method, row.steps): row.fd for row in rows}
    made, lines = [], []
    for name, folder, steps in wanted:
        pipe = load_pipeline(folder, trust_remote_code=True)
        images = generate(pipe, 40, seed=SEED, steps=steps)
        path = out / "grids" / f"{name}-{steps}.png"
        save_grid(images, path, columns=10, scale=1, overwrite=True)
        title = f"{name}, {steps} step{'s' if steps > 1 else ''}"
        caption = f"fd {distance[name, steps]:.2f}"
        made.append(Grid(title=title, caption=caption, png=path.read_bytes()))
        lines.append((title, images[:10]))
    write_picture(out / "grid.png", lines)
    return made


def curve(run: Path, method: str, teacher_fd: float) -> Curve:
    """Loss and Frechet distance of a run over its seconds."""
    loss, fd = [], []
    for row in read_rows(run):
        if "losses" in row:
            name = next(n for n in row["losses"] if n.split("/")[1] in ("loss", "gap"))
            if row["losses"][name] is not None:  # not a row of skipped steps
                loss.append((row["seconds"], row["losses"][name]))
        else:
            fd.append((row["seconds"], next(iter(row["eval"].values()))))
    return Curve(method=method, loss=loss, fd=fd, teacher_fd=teacher_fd)


def judge(teacher: Sequence[Row], rows: Sequence[Row], *, full: bool) -> None:
    """Hold every row against its bound and against the teacher at the same number of steps.

    Raises:
        CheckFailed: naming each row that fell short, with its figures.
    """
    many = next(row for row in teacher if row.steps == max(TEACHER_STEPS))
    same = {row.steps: row.fd or 0.0 for row in teacher}
    short = []
    for row in rows:
        fd, spread = row.fd or 0.0, row.diversity or 0.0
        name = f"{row.method} at {row.steps} steps"
        if fd > same[row.steps]:
            short.append(f"{name}: fd {fd:.2f} is worse than the teacher's {same[row.steps]:.2f}")
        most, spread_most = RATIOS.get((row.method, row.steps or 0)), SPREADS[row.method]
        ratio = fd / (many.fd or 1.0)
        change = abs(spread / (many.diversity or 1.0) - 1)
        if most is not None and ratio > most:
            short.append(f"{name}: r {ratio:.2f} > {most}")
        if change > spread_most:
            short.append(f"{name}: diversity off by {change:.1%} > {spread_most:.0%}")
    if short and full:
        raise CheckFailed("demo: " + "; ".join(short))
    print("demo: every row reaches its bound" if full else "demo: too few samples to judge")
