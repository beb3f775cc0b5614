"""bench students: every method's student of the digits teacher, on one budget of training time.

Each run is a training of its own, one core each. Its number of steps is its budget over the time
that a step takes, measured before the first run. Plans and figures are kept in a record, a run
each; what it holds is not made again, so a benchmark that was stopped goes on, and one that is in
the record from elsewhere is finished here.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from stepdistill.commands.demo import METRICS, TEACHER, deliver, teacher_rows
from stepdistill.commands.evaluate import open_reference
from stepdistill.commands.fleet import Fleet
from stepdistill.commands.job import job
from stepdistill.commands.read import read_config
from stepdistill.commands.students_table import replace_section, section
from stepdistill.commands.train import Source
from stepdistill.commands.watch import Watch
from stepdistill.eval.runner import Reference, Row
from stepdistill.run.assets import load_teacher
from stepdistill.run.config import CONFIGS, digest
from stepdistill.run.errors import CheckFailed, UserError
from stepdistill.run.files import write_text

WARM, TIMED = 4, 10


@dataclass(frozen=True)
class Entry:
    """One training of the benchmark.

    Args:
        config: name of the config, or its file.
        steps: sampler steps of its student.
        seed: of the run.
        keys: overrides by which the config takes part.
        any_steps: whether one run serves every number of sampler steps.
        settings: hash of what it trains with, but for seed and number of training steps.
    """

    config: str
    steps: int
    seed: int
    keys: tuple[str, ...]
    any_steps: bool
    settings: str

    @property
    def stem(self) -> str:
        """Name of its config, wherever the file is."""
        return Path(self.config).stem

    @property
    def plan(self) -> str:
        """Name of its plan."""
        return f"{self.stem}{'' if self.any_steps else f'-k{self.steps}'}"

    @property
    def run(self) -> str:
        """Name of its run."""
        return f"{self.plan}-s{self.seed}-{self.settings}"

    @property
    def method(self) -> str:
        """Name of its method in the table."""
        return self.stem.removesuffix("-digits")

    @property
    def name(self) -> str:
        """Name of its figures."""
        return f"{self.stem}-k{self.steps}-s{self.seed}"


class Plan(BaseModel):
    """How many training steps fit into the budget, and by what time a step."""

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
    """All that a benchmark has found so far."""

    model_config = ConfigDict(extra="forbid")

    seconds: float
    num: int
    plans: dict[str, Plan] = {}
    figures: dict[str, Figures] = {}


def students(
    out: Path,
    *,
    names: Sequence[str] | None,
    steps: int,
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
        names: configs; all that distil a shipped digits teacher if none.
        steps: sampler steps of the students.
        seconds: training budget of each.
        seeds: by commas.
        num: samples of each evaluation.
        record: file of plans and figures; ``out``/record.json if none.
        markdown: a file whose section for this number of steps is replaced or added.
        recorded: train nothing, and tell what the record holds.

    Raises:
        UserError: no such config, one whose student cannot have so many steps, a record of
            another budget, or one that holds none of these where it is to hold them.
        CheckFailed: a training ended with an error; its own line tells why.
    """
    entries = entries_of(names, steps, seeds)
    reference = open_reference("digits", None, METRICS, "cpu")
    bench = Bench(out, record or out / "record.json", reference, seconds, num)
    if recorded:
        entries = [entry for entry in entries if bench.holds(entry)]
        if not entries:
            raise UserError(f"--recorded: {bench.file} holds no student of these in {steps} steps")
    rows = bench.rows(entries)
    teacher = teacher_rows(reference, num)
    guided = {e.method for e in entries if read_config(e.config, e.keys)[1].guides_law}
    table = section(rows, teacher, steps=steps, seconds=seconds, num=num, guided=guided)
    print(table)
    if markdown is not None:
        replace_section(markdown, table)
    return rows


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
        plans = {e.plan: e for e in todo if e.plan not in self.record.plans}
        self.fleet = Fleet(len(todo))
        for stage, items in ((self.measure, [*plans.values()]), (self.train, todo)):
            codes = self.fleet.each(stage, items)
            failed = [entry.run for entry, code in zip(items, codes, strict=True) if code]
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

    def measure(self, entry: Entry) -> int:
        """Plan an entry's steps; returns the exit code."""
        file = self.out / "plans" / f"{entry.plan}.json"
        code = self.fleet.run(
            __name__, entry.config, str(self.record.seconds), str(file), *entry.keys
        )
        if code == 0:
            with self.lock:
                found = json.loads(file.read_text(encoding="utf-8"))
                self.record.plans[entry.plan] = Plan(settings=entry.settings, **found)
                self.keep()
        return code

    def train(self, entry: Entry) -> int:
        """Train and judge an entry; returns the training's exit code."""
        run, folder = self.out / "runs" / entry.run, self.out / "pipelines" / entry.run
        own = (f"seed={entry.seed}", f"steps={self.record.plans[entry.plan].steps}")
        quiet = ("eval.every_steps=0", "sample.every_steps=0")
        code = self.fleet.train(entry.config, run, *own, *quiet, *entry.keys)
        if code == 0:
            with self.lock:  # the reference keeps what it has computed, and the record is one file
                num, steps = self.record.num, (entry.steps,)
                rows = deliver(run, folder, self.reference, entry.method, steps=steps, num=num)
                self.record.figures[entry.name] = Figures(settings=entry.settings, row=rows[0])
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


def entries_of(names: Sequence[str] | None, steps: int, seeds: str) -> list[Entry]:
    """Every config with every seed.

    Raises:
        UserError: no such config, one whose student cannot have so many steps, or bad seeds.
    """
    try:
        numbers = dict.fromkeys(int(seed) for seed in seeds.split(","))
    except ValueError:
        raise UserError(f"--seeds {seeds}: write whole numbers by commas, as 0,1,2") from None
    found = []
    for name in names or sorted(path.stem for path in CONFIGS.glob("*-digits.yaml")):
        try:
            found.append(entry(name, steps))
        except UserError as error:
            if names:
                raise UserError(f"--config {name}: {error}") from error
    return [replace(one, seed=seed) for seed in numbers for one in found]


def entry(name: str, steps: int) -> Entry:
    """A config as it takes part, with seed 0.

    All learn the law of one teacher, unguided where the method does not insist.

    Raises:
        UserError: no such config, or one without a student of so many steps.
    """
    cls, config = read_config(name)
    if not cls.shortens:
        raise UserError(f"{config.method} makes no teacher faster")
    keys = [f"teacher={TEACHER}"] if config.teacher != TEACHER else []
    if config.guidance != 1:
        plain = read_config(name, ["guidance=1"])[1]
        insists = plain.guided or getattr(plain, "guides_fake", False)
        keys += [] if insists else ["guidance=1"]
    fixed = "student_steps" in cls.Config.model_fields
    keys += [f"student_steps={steps}"] if fixed else []
    settings = read_config(name, [*keys, "seed=0", "steps=1000"])[1]
    if steps not in cls(settings, load_teacher(TEACHER)).grids():
        raise UserError(f"its student has no {steps} steps")
    return Entry(name, steps, 0, tuple(keys), any_steps=not fixed, settings=digest(settings)[:8])


def plan_steps(config: str, seconds: float, file: Path, keys: Sequence[str]) -> None:
    """Write how many training steps fit into a budget, by the median of a few."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        own = [f"run={folder}/run", "log.tensorboard=false"]
        cls, settings = read_config(config, [*keys, *own])
        with job(settings) as (processes, net):
            trainer = cls(settings, net, wrap=processes.wrap, autocast=processes.autocast)
            last = settings.steps - WARM - TIMED  # late: every player trains then
            batches = Source(trainer, processes, Watch(settings)).batches(0)
            times = []
            for step in range(max(0, last), max(0, last) + WARM + TIMED):
                trainer.prepare(step)
                began = _clock()
                trainer.step(step, next(batches))
                times.append(_clock() - began)
    even, odd = (statistics.median(times[WARM + k :: 2]) for k in (0, 1))  # steps may alternate
    each = (even + odd) / 2
    found = {"steps": max(1, round(seconds / each)), "seconds_a_step": each}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(found) + "\n")


def _clock() -> float:
    """Seconds of this process on a CPU, which neighbours do not slow; of the day on a GPU."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.monotonic()


if __name__ == "__main__":
    plan_steps(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
