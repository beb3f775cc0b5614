"""bench students: every method's student of the digits teacher, on one budget of training time.

Each run is a training of its own, as many at a time as there are cores, one thread each. Its
number of steps is its budget over the time that a step takes, measured just before. What is
there already is kept, so a benchmark that was stopped goes on.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from stepdistill.commands.demo import METRICS, TEACHER, deliver, teacher_rows
from stepdistill.commands.evaluate import open_reference
from stepdistill.commands.job import job
from stepdistill.commands.read import read_config
from stepdistill.commands.train import Source
from stepdistill.commands.watch import Watch
from stepdistill.eval.runner import Reference, Row
from stepdistill.run.assets import load_teacher
from stepdistill.run.config import CONFIGS
from stepdistill.run.errors import CheckFailed, UserError
from stepdistill.run.files import write_text
from stepdistill.run.versions import versions

WARM, TIMED = 3, 9


@dataclass(frozen=True)
class Entry:
    """One training of the benchmark.

    Args:
        config: name of the config.
        steps: sampler steps of its student.
        seed: of the run.
        keys: overrides by which it has so many steps; a run without any serves every number.
    """

    config: str
    steps: int
    seed: int
    keys: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.config}{f'-k{self.steps}' if self.keys else ''}-s{self.seed}"


def students(
    out: Path,
    *,
    names: Sequence[str] | None,
    steps: int,
    seconds: float,
    seeds: str,
    num: int,
    markdown: Path | None,
) -> list[Row]:
    """Train, export and evaluate; print the table and write ``out``/results-k<steps>.json.

    Args:
        out: folder of runs; those that it holds are not trained again.
        names: configs; all that distil the shipped digits teacher if none.
        steps: sampler steps of the students.
        seconds: training budget of each.
        seeds: by commas.
        num: samples of each evaluation.
        markdown: a file whose section for this number of steps is replaced or added.

    Raises:
        UserError: no such config, or one whose student cannot have so many steps.
        CheckFailed: a training ended with an error; its own line tells why.
    """
    entries = plan(names or shipped(steps), steps, seeds)
    reference = open_reference("digits", None, METRICS, "cpu")
    teacher = teacher_rows(reference, num)
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        codes = list(pool.map(lambda entry: train(out, entry, seconds), entries))
    failed = [entry.name for entry, code in zip(entries, codes, strict=True) if code]
    if failed:
        raise CheckFailed(f"training did not finish: {', '.join(failed)}")
    rows = [row for entry in entries for row in judged(out, entry, reference, num)]
    text = json.dumps([row.model_dump() for row in [*teacher, *rows]], indent=1)
    write_text(out / f"results-k{steps}.json", text + "\n")
    table = section(rows, teacher, steps, seconds, num)
    print(table)
    if markdown is not None:
        replace_section(markdown, table)
    return rows


def plan(names: Sequence[str], steps: int, seeds: str) -> list[Entry]:
    """Every config with every seed.

    Raises:
        UserError: no such config, one whose student cannot have so many steps, or bad seeds.
    """
    keys = {name: keys_for(name, steps) for name in names}
    for name in names:
        if keys[name] is None:
            raise UserError(f"--config {name}: its student has no {steps} steps")
    try:
        return [
            Entry(name, steps, int(seed), keys[name] or ())
            for seed in seeds.split(",")
            for name in names
        ]
    except ValueError:
        raise UserError(f"--seeds {seeds}: write whole numbers by commas, as 0,1,2") from None


def shipped(steps: int) -> list[str]:
    """Configs that distil the digits teacher into a student of so many steps."""
    names = sorted(path.stem for path in CONFIGS.glob("*-digits.yaml"))
    return [name for name in names if keys_for(name, steps) is not None]


def keys_for(name: str, steps: int) -> tuple[str, ...] | None:
    """The overrides by which a config's student has so many steps; None if it cannot."""
    try:
        cls, config = read_config(name)
    except UserError as error:
        raise UserError(f"--config {name}: {error}") from error
    if config.teacher != TEACHER:
        return None
    if "student_steps" in cls.Config.model_fields:
        return (f"student_steps={steps}",)
    return () if steps in cls(config, load_teacher(TEACHER)).grids() else None


def train(out: Path, entry: Entry, seconds: float) -> int:
    """Train an entry in a process of its own unless it is finished; returns its exit code."""
    run = out / "runs" / entry.name
    if (run / "student").is_dir():
        return 0
    plan = run / "plan.json"
    if not plan.is_file():
        code = subprocess.run(
            [sys.executable, "-m", __name__, entry.config, str(entry.steps), str(seconds), plan],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        ).returncode
        if code:
            return code
    count = json.loads(plan.read_text(encoding="utf-8"))["steps"]
    call = [sys.executable, "-m", "stepdistill", "train", entry.config, f"run={run}"]
    call += [f"seed={entry.seed}", f"steps={count}", "resume=auto", "log.tensorboard=false"]
    call += ["eval.every_steps=0", "sample.every_steps=0", *entry.keys]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TTY_COMPATIBLE": "0"}
    return subprocess.run(call, env=env, stdout=subprocess.DEVNULL, check=False).returncode


def plan_steps(config: str, steps: int, seconds: float, file: Path) -> None:
    """Write how many training steps fit into a budget, by the median of a few."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        keys = [*(keys_for(config, steps) or ()), f"run={folder}/run", "log.tensorboard=false"]
        cls, settings = read_config(config, keys)
        with job(settings) as (processes, net):
            trainer = cls(settings, net, wrap=processes.wrap, autocast=processes.autocast)
            last = settings.steps - WARM - TIMED  # late: every player trains then
            batches = Source(trainer, processes, Watch(settings)).batches(0)
            times = []
            for step in range(max(0, last), max(0, last) + WARM + TIMED):
                trainer.prepare(step)
                began = time.monotonic()
                trainer.step(step, next(batches))
                times.append(time.monotonic() - began)
    each = statistics.median(times[WARM:])
    found = {"steps": max(1, round(seconds / each)), "seconds_a_step": each}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(found) + "\n")


def judged(out: Path, entry: Entry, reference: Reference, num: int) -> list[Row]:
    """The rows of a finished run, measured on its exported pipeline; kept in the run's folder."""
    run = out / "runs" / entry.name
    kept = run / f"figures-k{entry.steps}-{num}.json"
    if kept.is_file():
        return [Row.model_validate(row) for row in json.loads(kept.read_text(encoding="utf-8"))]
    folder, name = out / "pipelines" / entry.name, entry.config.removesuffix("-digits")
    rows = deliver(run, folder, reference, name, steps=(entry.steps,), num=num)
    write_text(kept, json.dumps([row.model_dump() for row in rows], indent=1) + "\n")
    return rows


def section(
    rows: Sequence[Row], teacher: Sequence[Row], steps: int, seconds: float, num: int
) -> str:
    """The benchmark as a section of Markdown, the best first."""
    best = teacher[-1]
    lines = [
        f"## Students of {steps} step{'s' if steps > 1 else ''}, {seconds:g} s of training each",
        "",
        f"{date.today()}, {versions()}; `stepdistill bench students --steps {steps} --seconds "
        f"{seconds:g}`; {num:,} samples against the digits, Frechet distance fd in the features of "
        "the shipped digits classifier; r is fd over the teacher's at 32 steps; mean ± standard "
        "deviation over seeds. Diversity is the mean pairwise distance of the images, and its "
        "change against the teacher's.",
        "",
        "| method | fd | r | diversity | seconds | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups = {row.method: [r for r in rows if r.method == row.method] for row in rows}
    for method, group in sorted(groups.items(), key=lambda item: mean(item[1], "fd")):
        fd, spread = mean(group, "fd"), deviation(group, "fd")
        wide = mean(group, "diversity")
        change = wide / (best.diversity or 1) - 1
        lines.append(
            f"| `{method}` | {fd:.2f} ± {spread:.2f} | {fd / (best.fd or 1):.2f} "
            f"± {spread / (best.fd or 1):.2f} | {wide:.2f} ({change:+.1%}) "
            f"| {mean(group, 'train_seconds'):.0f} | {len(group)} |"
        )
    for row in teacher:
        lines.append(
            f"| teacher, {row.steps} steps | {row.fd:.2f} | {(row.fd or 0) / (best.fd or 1):.2f} "
            f"| {row.diversity:.2f} | | |"
        )
    return "\n".join(lines) + "\n"


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
    title = text.splitlines()[0].split(",")[0]
    parts = old.split("\n## ")
    kept = [parts[0].rstrip(), *(f"## {part.rstrip()}" for part in parts[1:])]
    kept = [part for part in kept if part.splitlines()[0].split(",")[0] != title]
    write_text(file, "\n\n".join([*kept, text.rstrip()]) + "\n")


if __name__ == "__main__":
    plan_steps(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]))
