"""prove: every method, trained on teachers in closed form, against what theory says of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from stepdistill.commands.proof_page import write_markdown, write_page
from stepdistill.commands.proof_words import figure, headline
from stepdistill.proof.ground import Outcome, plan, prove_case
from stepdistill.proof.rows import Row
from stepdistill.proof.trial import Case
from stepdistill.run import bands
from stepdistill.run.errors import CheckFailed, UserError
from stepdistill.run.files import write_text
from stepdistill.run.versions import versions


def prove(
    names: Sequence[str],
    *,
    settings: Sequence[str] = (),
    teacher: str | None = None,
    budget: float | None = None,
    json_file: Path | None = None,
    out: Path = Path("out/proof"),
    markdown: Path | None = None,
    bands_file: Path | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> list[Row]:
    """Prove methods, print the table, and write what was asked for.

    Args:
        names: methods; all if empty.
        settings: of the methods; all if empty.
        teacher: a closed-form teacher's name, or a mixture's YAML file; each setting's own if None.
        budget: seconds of the whole, about; the settings' own training steps if None.
        json_file: where the rows go.
        out: folder of the report page.
        markdown: where the table goes as Markdown.
        bands_file: where the healthy bands go that the runs teach.
        workers: cases at a time, one thread each; as many as there are cores if None.
        overwrite: whether files that are there may be replaced.

    Raises:
        UserError: bad input.
        stepdistill.run.errors.CheckFailed: a figure falls short.
    """
    for file in (json_file, markdown, bands_file):
        if file is not None and file.exists() and not overwrite:
            raise UserError(f"{file} is there already; choose another name, or give --overwrite")
    cases = plan(names, settings, teacher)
    for folder in (out, *(file.parent for file in (json_file, markdown, bands_file) if file)):
        folder.mkdir(parents=True, exist_ok=True)  # told now if it cannot be, not at the end
    began, outcomes = time.monotonic(), []
    for outcome in _run(cases, budget, workers or os.cpu_count() or 1):
        outcomes.append(outcome)
        _tell(outcome, len(outcomes), len(cases))
    outcomes.sort(key=lambda one: cases.index(one.case))
    rows = [row for one in outcomes for row in one.rows]
    _print(outcomes)
    facts = {
        "figures": f"{sum(row.passed for row in rows)} of {len(rows)} hold",
        "trainings": f"{len(outcomes)} in {time.monotonic() - began:.0f} s, one thread each",
        "versions": versions(),
        "command": " ".join(["stepdistill", *sys.argv[1:]]),
    }
    if json_file is not None:
        write_text(json_file, json.dumps([row.model_dump() for row in rows], indent=1) + "\n")
    write_page(out / "report.html", outcomes, facts)
    if markdown is not None:
        write_markdown(markdown, outcomes, facts)
    if bands_file is not None:
        _learn(bands_file, outcomes)
    _verdict(outcomes)
    return rows


def _run(cases: Sequence[Case], budget: float | None, workers: int) -> Iterator[Outcome]:
    """Outcomes as they come; in this process if there is one worker."""
    workers = min(workers, len(cases))
    seconds = None if budget is None else budget * workers / len(cases)
    with one_thread():
        if workers == 1:
            yield from (prove_case(case, seconds) for case in cases)
            return
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        try:
            futures = [pool.submit(prove_case, case, seconds) for case in cases]
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread here and in processes begun here: the same figures on any number of cores."""
    threads, before = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _tell(outcome: Outcome, done: int, count: int) -> None:
    """A line as soon as a case is through."""
    case, held = outcome.case, len(outcome.rows) - len(outcome.short)
    line = f"[{done}/{count}] {case}: {held} of "
    line += f"{len(outcome.rows)} figures hold, {outcome.steps} steps in {outcome.seconds:.0f} s"
    print(line, file=sys.stderr, flush=True)
    for note in outcome.notes:
        print(f"    {note}", file=sys.stderr, flush=True)


def _print(outcomes: Sequence[Outcome]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("method", "setting", "teacher", "steps", "quantity"):
        table.add_column(title, overflow="fold")
    for title in ("expected", "measured", "tolerance"):
        table.add_column(title, justify="right")
    table.add_column("verdict")
    last = None
    for row in (row for one in outcomes for row in one.rows):
        head = (row.method, row.setting, row.teacher)
        shown = head if head != last else ("", "", "")
        last = head
        steps = "" if row.student_steps is None else str(row.student_steps)
        verdict = "[green]holds[/green]" if row.passed else "[bold red]FALLS SHORT[/bold red]"
        figures = (figure(v) for v in (row.expected, row.measured, row.tolerance))
        table.add_row(*shown, steps, row.quantity, *figures, verdict)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def _learn(file: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the bands of the ratios in the logs of the cases that hold."""
    runs: dict[str, dict[str, bands.Rows]] = {}
    for one in outcomes:
        if not one.short:
            name = f"{one.case.setting} on {one.case.teacher}"
            runs.setdefault(one.case.method, {})[name] = one.log
    bands.write(file, bands.learn(runs), f"by {' '.join(['stepdistill', *sys.argv[1:]])}")


def _verdict(outcomes: Sequence[Outcome]) -> None:
    """Say how it ended.

    Raises:
        CheckFailed: naming the cases; a line before it tells each figure that falls short.
    """
    if not any(one.rows for one in outcomes):
        raise CheckFailed("prove: nothing could be judged")
    if not any(one.short for one in outcomes):
        print(f"prove: all {sum(len(one.rows) for one in outcomes)} figures hold")
        return
    for one in outcomes:
        for row in one.short:
            steps = "" if row.student_steps is None else f" at {row.student_steps} steps"
            print(
                f"prove: {one.case}{steps}: {row.quantity} is {figure(row.measured)}, expected "
                f"{figure(row.expected)} within {figure(row.tolerance)}",
                file=sys.stderr,
            )
    cases = [str(one.case) for one in outcomes if one.short]
    said = headline([row for one in outcomes for row in one.rows])
    raise CheckFailed(f"prove: {said}: {', '.join(cases)}")
