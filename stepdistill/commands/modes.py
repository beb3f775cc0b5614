"""bench modes: how many of twenty-five modes four-step students keep, at equal student updates."""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from pathlib import Path

from stepdistill.commands.prove import one_thread
from stepdistill.commands.students_table import replace_section
from stepdistill.proof.modes import Shares, entries, student_of, times, untrained
from stepdistill.run.errors import UserError
from stepdistill.run.versions import versions

COLUMNS: dict[str, Callable[[Shares], float]] = {
    "modes": lambda one: one.covered,
    "least": lambda one: one.least,
    "mass error": lambda one: one.mass,
    "sliced W1": lambda one: one.sliced,
    "near": lambda one: one.near,
}
NOTE = """The law has twenty-five equal modes on a square, 0.5 apart, each of standard deviation
0.05. Every student takes four steps at the times {times} (those inside a phase of `phased_dmd`
are spread evenly), starts as the teacher and makes as many updates; `dmd2` has no adversarial
head. Modes: those with at least half of their weight, of 25. Least: share of the most neglected
mode, as a part of its weight. Mass error: total variation of the modes' shares. Sliced W1: to the
law, in its standard deviations. Near: share of samples within four standard deviations of a mode.
Exits: the mass error of the images predicted at each of the four steps. Where it says so the fake
score learns these, all of a phase as one; else what the sampler makes, which is the last."""


def modes(
    *, seeds: str, updates: int, shift: float, workers: int, markdown: Path | None
) -> dict[str, list[Shares]]:
    """Train and measure every student with every seed, print the table, write it if asked to.

    Args:
        seeds: by commas.
        updates: of each student, over all its phases.
        shift: of the times of the steps; below 1 they lie nearer to the images.
        workers: trainings at a time, one thread each.
        markdown: a file whose section of this benchmark is replaced or added.

    Raises:
        UserError: seeds that are no numbers.
    """
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds {seeds}: write whole numbers by commas, as 0,1,2") from None
    found: dict[str, list[Shares]] = {entry.name: [] for entry in entries(shift)}
    with (
        one_thread(),
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
    ):
        jobs = {
            pool.submit(student_of, entry, seed, updates, shift): (entry.name, seed)
            for seed in numbers
            for entry in entries(shift)
        }
        for job in as_completed(jobs):
            (name, seed), one = jobs[job], job.result()
            found[name].append(one)
            line = f"{name}, seed {seed}: {one.covered} modes, mass error {one.mass:.3f}"
            print(f"{line}, {one.seconds:.0f} s", file=sys.stderr, flush=True)
    text = section(found, untrained(shift), seeds, updates, shift)
    print(text)
    if markdown is not None:
        replace_section(markdown, text)
    return found


def section(
    students: Mapping[str, Sequence[Shares]],
    beside: Mapping[str, Shares],
    seeds: str,
    updates: int,
    shift: float = 1.0,
) -> str:
    """The benchmark as a section of Markdown."""
    command = f"stepdistill bench modes --updates {updates} --seeds {seeds}"
    title, at = "## Twenty-five modes", ", ".join(f"{t:.3g}" for t in times(shift)[:-1])
    if shift != 1:
        command += f" --shift {shift:g}"
        title += f" with shift {shift:g}"
    lines = [
        title,
        "",
        f"{date.today()}, {versions()}; `{command}`; mean ± standard deviation over seeds.",
        *NOTE.format(times=at).splitlines(),
        "",
        f"| student | {' | '.join(COLUMNS)} | exits | seconds |",
        f"| --- |{' ---: |' * (len(COLUMNS) + 2)}",
    ]
    for name, group in students.items():
        cells = [_cell(column, group) for column in COLUMNS]
        places = zip(*(one.exits for one in group), strict=True)
        exits = ", ".join(f"{statistics.fmean(place):.2f}" for place in places)
        seconds = statistics.fmean(one.seconds for one in group)
        lines.append(f"| {name} | {' | '.join(cells)} | {exits} | {seconds:.0f} |")
    for name, one in beside.items():
        cells = [_cell(column, [one]) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} | | |")
    return "\n".join(lines) + "\n"


def _cell(column: str, group: Sequence[Shares]) -> str:
    """Mean and, of several, standard deviation of a column."""
    values = [COLUMNS[column](one) for one in group]
    digits = 1 if column == "modes" else 3
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
