"""bench students: every method's student of a digits teacher, on one budget of training time.

Each run is a training of its own, one core each. Its number of steps is its budget over the time
that a step takes, measured before the first run; a student for any number of sampler steps is
trained once for all. Plans and figures are kept in a record; what it holds is not made again, so a
benchmark that was stopped goes on, and one that is in the record from elsewhere is finished here:
times are told in those of a pass of the shipped teacher, so that budgets are as large on a slow day
as on the day that the record was begun.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from stepdistill.adapters.cond import Cond
from stepdistill.commands.demo import METRICS, TEACHER, deliver, teacher_rows
from stepdistill.commands.entries import Entry, entries_of, whole_numbers
from stepdistill.commands.evaluate import open_reference
from stepdistill.commands.fleet import Fleet
from stepdistill.commands.job import job
from stepdistill.commands.read import read_config
from stepdistill.commands.students_table import replace_section, section
from stepdistill.commands.train import Source
from stepdistill.commands.watch import Watch
from stepdistill.eval.runner import Reference, Row
from stepdistill.run.assets import load_teacher
from stepdistill.run.errors import CheckFailed, UserError
from stepdistill.run.files import write_text

TEACHER_STEPS = (1, 2, 4, 8, 32)
WARM, TIMED = 2, 6
PASS = 128  # samples of the pass that a machine is measured by
PARTS = 0.125, 0.375, 0.625, 0.875  # of a run whose steps are timed: stages may differ


class Plan(BaseModel):
    """How many training steps fit into the budget, and by what time a step where it was begun."""

    model_config = ConfigDict(extra="forbid")

    settings: str
    steps: int
    seconds_a_step: float


class Figures(BaseModel):
    """What a run has reached."""

    model_config = ConfigDict(extra="forbid")

    settings: str
    row: Row


class Record(BaseModel):
    """All that a benchmark has found so far.

    Args:
        seconds: training budget of each run.
        num: samples of each evaluation.
        pass_seconds: what a pass of the shipped teacher took where the record was begun; None
            before the first plan.
        plans: by a config's name.
        figures: by a run's.
    """

    model_config = ConfigDict(extra="forbid")

    seconds: float
    num: int
    pass_seconds: float | None = None
    plans: dict[str, Plan] = {}
    figures: dict[str, Figures] = {}


def students(
    out: Path,
    *,
    names: Sequence[str] | None,
    family: str | None = None,
    teacher: str = TEACHER,
    overrides: Sequence[str] = (),
    steps: str,
    seconds: float,
    seeds: str,
    num: int,
    record: Path | None,
    markdown: Path | None,
    recorded: bool = False,
) -> list[Row]:
    """Train, export and evaluate; print the table.

    Args:
        out: folder of runs and pipelines.
        names: configs; all that make a digits teacher faster if none.
        family: of methods, whose configs alone take part where none are named.
        teacher: name of the shipped teacher.
        overrides: keys with values that all take part with.
        steps: sampler steps of the students, by commas.
        seconds: training budget of each.
        seeds: by commas.
        num: samples of each evaluation.
        record: file of plans and figures; ``out``/record.json if none.
        markdown: a file whose sections for these numbers of steps are replaced or added.
        recorded: train nothing, and tell what the record holds.

    Raises:
        UserError: no such config, one whose student cannot have so many steps, a record of
            another budget, or one that holds none of these where it is to hold them.
        CheckFailed: a training ended with an error; its own line tells why.
    """
    sampled = whole_numbers("--steps", steps)
    entries = entries_of(names, sampled, seeds, teacher=teacher, family=family, overrides=overrides)
    reference = open_reference("digits", None, METRICS, "cpu")
    bench = Bench(out, record or out / "record.json", reference, seconds, num)
    if recorded:
        entries = [entry for entry in entries if bench.holds(entry)]
        if not entries:
            raise UserError(f"--recorded: {bench.file} holds no student of these in {steps} steps")
    rows = bench.rows(entries)
    walks = teacher_rows(reference, num, teacher, TEACHER_STEPS)
    for table in tables(entries, rows, walks, seconds, num, overrides):
        print(table)
        if markdown is not None:
            replace_section(markdown, table)
    return rows


def tables(
    entries: Sequence[Entry],
    rows: Sequence[Row],
    walks: Sequence[Row],
    seconds: float,
    num: int,
    overrides: Sequence[str] = (),
) -> Iterator[str]:
    """A table for each number of sampler steps, by rising number."""
    guided = {e.method for e in entries if read_config(e.config, e.keys)[1].guides_law}
    for steps in sorted({entry.steps for entry in entries}):
        yield section(
            [row for row, entry in zip(rows, entries, strict=True) if entry.steps == steps],
            walks,
            teacher=entries[0].teacher,
            overrides=overrides,
            steps=steps,
            seconds=seconds,
            num=num,
            guided=guided,
        )


class Bench:
    """Plans, runs and figures, each made unless the record holds it.

    Args:
        out: folder of runs and pipelines.
        file: the record's.
        reference: the real images.
        seconds: training budget of each run.
        num: samples of each evaluation.

    Raises:
        UserError: a record of another budget.
    """

    def __init__(
        self, out: Path, file: Path, reference: Reference, seconds: float, num: int
    ) -> None:
        self.out, self.file, self.reference = out, file, reference
        self.record, self.lock = read_record(file, seconds, num), Lock()

    def rows(self, entries: Sequence[Entry]) -> list[Row]:
        """A row of each entry.

        Raises:
            CheckFailed: a training ended with an error.
        """
        self.forget(entries)
        todo = [entry for entry in entries if entry.name not in self.record.figures]
        plans = {e.plan: [e] for e in todo if e.plan not in self.record.plans}
        runs = {entry.run: [e for e in todo if e.run == entry.run] for entry in todo}
        self.fleet = Fleet(len(runs))
        for stage, items in ((self.measure, plans), (self.train, runs)):
            codes = self.fleet.each(stage, [*items.values()])
            failed = [own[0].run for own, code in zip(items.values(), codes, strict=True) if code]
            if failed:
                raise CheckFailed(f"training did not finish: {', '.join(failed)}")
        return [self.record.figures[entry.name].row for entry in entries]

    def holds(self, entry: Entry) -> bool:
        """Whether the record has figures of an entry as it is set now."""
        found = self.record.figures.get(entry.name)
        return found is not None and found.settings == entry.settings

    def forget(self, entries: Sequence[Entry]) -> None:
        """Drop what was recorded of other settings than an entry's, and say so."""
        for entry in entries:
            for kept, name in ((self.record.plans, entry.plan), (self.record.figures, entry.name)):
                if name in kept and kept[name].settings != entry.settings:
                    print(f"{name}: its settings have changed; made again", file=sys.stderr)
                    del kept[name]

    def measure(self, same: Sequence[Entry]) -> int:
        """Plan the steps of entries that are trained alike; returns the exit code."""
        entry = same[0]
        file = self.out / "plans" / f"{entry.plan}.json"
        code = self.fleet.run(__name__, entry.config, str(file), *entry.keys)
        if code == 0:
            with self.lock:
                found = json.loads(file.read_text(encoding="utf-8"))
                self.record.plans[entry.plan] = self.plan(entry, **found)
                self.keep()
        return code

    def plan(self, entry: Entry, seconds_a_step: float, pass_seconds: float) -> Plan:
        """A plan by the times of a step and of a pass, measured side by side."""
        if self.record.pass_seconds is None:
            self.record.pass_seconds = pass_seconds
        each = seconds_a_step * self.record.pass_seconds / pass_seconds
        steps = max(1, round(self.record.seconds / each))
        return Plan(settings=entry.settings, steps=steps, seconds_a_step=each)

    def train(self, same: Sequence[Entry]) -> int:
        """Train a run, and judge it in the steps of its entries; returns the exit code."""
        entry = same[0]
        run, folder = self.out / "runs" / entry.run, self.out / "pipelines" / entry.run
        own = (f"seed={entry.seed}", f"steps={self.record.plans[entry.plan].steps}")
        quiet = ("eval.every_steps=0", "sample.every_steps=0")
        code = self.fleet.train(entry.config, run, *own, *quiet, *entry.keys)
        if code == 0:
            with self.lock:  # the reference keeps what it has computed, and the record is one file
                num, steps = self.record.num, [one.steps for one in same]
                rows = deliver(run, folder, self.reference, entry.method, steps=steps, num=num)
                for one, row in zip(same, rows, strict=True):
                    self.record.figures[one.name] = Figures(settings=one.settings, row=row)
                self.keep()
        return code

    def keep(self) -> None:
        """Write the record."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, self.record.model_dump_json(indent=1, exclude_none=True) + "\n")


def read_record(file: Path, seconds: float, num: int) -> Record:
    """The record in a file, or a new one.

    Raises:
        UserError: the file is no record, or one of another budget or number of samples.
    """
    if not file.is_file():
        return Record(seconds=seconds, num=num)
    try:
        kept = Record.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a record of this benchmark; name another file") from error
    if (kept.seconds, kept.num) != (seconds, num):
        raise UserError(
            f"{file}: holds students of {kept.seconds:g} s judged by {kept.num} samples; ask for "
            "those, or name another file"
        )
    return kept


def time_steps(config: str, file: Path, keys: Sequence[str]) -> None:
    """Write the time of a training step, by the medians of a few in all parts, and that of passes
    of the shipped teacher between them."""
    torch.set_num_threads(1)
    passes = list[float]()
    with TemporaryDirectory() as folder:
        own = [f"run={folder}/run", "log.tensorboard=false"]
        cls, settings = read_config(config, [*keys, *own])
        with job(settings) as (processes, net):
            trainer = cls(settings, net, wrap=processes.wrap, autocast=processes.autocast)
            teacher_pass = pass_of_teacher(trainer.device)
            batches = Source(trainer, processes, Watch(settings)).batches(0)
            found_at = []
            for part in PARTS:
                first, times = int(part * max(0, settings.steps - WARM - TIMED)), []
                for step in range(first, first + WARM + TIMED):
                    trainer.prepare(step)
                    began = _clock()
                    trainer.step(step, next(batches))
                    times.append(_clock() - began)
                    began = _clock()
                    teacher_pass()
                    passes.append(_clock() - began)
                even, odd = (statistics.median(times[WARM + k :: 2]) for k in (0, 1))
                found_at.append((even + odd) / 2)  # steps may alternate
    found = {
        "seconds_a_step": statistics.fmean(found_at),
        "pass_seconds": statistics.median(passes),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(found) + "\n")


def pass_of_teacher(device: torch.device) -> Callable[[], object]:
    """A call of the shipped teacher on a batch."""
    den = load_teacher(TEACHER).to(device)
    x_t = torch.zeros(PASS, *den.sample_shape, device=device)
    cond = Cond(torch.zeros(PASS, dtype=torch.int64, device=device))
    return torch.no_grad()(lambda: den(x_t, x_t[:, 0, 0, 0] + 0.5, cond))


def _clock() -> float:
    """Seconds of this process on a CPU, which neighbours do not slow; of the day on a GPU."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.monotonic()


if __name__ == "__main__":
    time_steps(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
