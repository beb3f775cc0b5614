"""Who takes part in the benchmark of students: configs, by teacher, sampler steps and seed."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stepdistill.commands.demo import TEACHER
from stepdistill.commands.read import read_config
from stepdistill.run.assets import TEACHERS, load_teacher
from stepdistill.run.config import CONFIGS, digest
from stepdistill.run.errors import UserError, hint
from stepdistill.trainers.find import methods
from stepdistill.trainers.settings import TrainConfig

OWN = {
    "method": "give --config",
    "teacher": "give --teacher",
    "steps": "give --seconds",
    "seed": "give --seeds",
    "student_steps": "give --steps",
    "run": "give --out",
    "resume": "leave it out: what was begun is gone on with",
    "guidance": "leave it out: all learn the unguided law",
}
"""Keys of configs that the benchmark sets, and what to do about one that is to be overridden."""


@dataclass(frozen=True)
class Entry:
    """One training of the benchmark.

    Args:
        config: name of the config, or its file.
        teacher: name of the shipped teacher.
        steps: sampler steps of its student.
        seed: of the run.
        keys: overrides by which the config takes part.
        any_steps: whether one run serves every number of sampler steps.
        settings: hash of what it trains with, but for seed and number of training steps.
        tag: what its overrides are told from others by, in names.
    """

    config: str
    teacher: str
    steps: int
    seed: int
    keys: tuple[str, ...]
    any_steps: bool
    settings: str
    tag: str = ""

    @property
    def stem(self) -> str:
        """Name of its config, wherever the file is."""
        return Path(self.config).stem

    @property
    def student(self) -> str:
        """Name of what it trains: its config, its teacher but for the first one, overrides."""
        own = self.teacher == TEACHER or self.stem.endswith(f"-{self.teacher}")
        return self.stem + ("" if own else f"@{self.teacher.removeprefix('digits-')}") + self.tag

    @property
    def plan(self) -> str:
        """Name of its plan."""
        return f"{self.student}{'' if self.any_steps else f'-k{self.steps}'}"

    @property
    def run(self) -> str:
        """Name of its run."""
        return f"{self.plan}-s{self.seed}-{self.settings}"

    @property
    def method(self) -> str:
        """Name of its method in the table."""
        return self.stem.removesuffix(f"-{self.teacher}").removesuffix("-digits")

    @property
    def name(self) -> str:
        """Name of its figures."""
        return f"{self.student}-k{self.steps}-s{self.seed}"


def entries_of(
    names: Sequence[str] | None,
    steps: Sequence[int],
    seeds: str,
    *,
    teacher: str = TEACHER,
    family: str | None = None,
    overrides: Sequence[str] = (),
) -> list[Entry]:
    """Every config with every number of steps that its student can have, and every seed.

    Args:
        names: of configs, or their files; all that make a teacher faster if None, of which some
            methods have one for the teacher.
        steps: numbers of sampler steps.
        seeds: by commas.
        teacher: name of the shipped teacher.
        family: of methods, whose configs alone take part where none are named.
        overrides: keys with values for all of them.

    Raises:
        UserError: no such config, teacher or family, a named config whose student cannot have so
            many steps, bad seeds, or overrides of what the benchmark sets or that fit no config.
    """
    for key in overrides:
        if (mend := OWN.get(key.partition("=")[0])) is not None:
            raise UserError(f"{key}: the benchmark sets it; {mend}")
    if teacher not in TEACHERS:
        raise UserError(f"--teacher {teacher}: not shipped; {hint(teacher, TEACHERS)}")
    found = []
    for name in names or configs_of(family, teacher):
        plain: Plain | None = None
        for number in steps:
            try:
                plain = plain or taking_part(name, teacher, overrides)
                found.append(plain.entry(number))
            except UserError as error:
                if names:
                    raise UserError(f"--config {name}: {error}") from error
                part = f" in {number} steps" if plain else ""
                print(f"{name}{part} is left out: {error}", file=sys.stderr)
                if plain is None:
                    break
    if not found:
        raise UserError("no config takes part; the lines above say why of each")
    numbers = whole_numbers("--seeds", seeds, least=0)
    return [replace(one, seed=seed) for seed in numbers for one in found]


def whole_numbers(key: str, text: str, least: int = 1) -> list[int]:
    """Numbers by commas, each once.

    Raises:
        UserError: one is no whole number, or too small.
    """
    try:
        numbers = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        numbers = [least - 1]
    if min(numbers) < least:
        raise UserError(f"{key} {text}: write whole numbers from {least} on by commas, as 1,2,4")
    return numbers


def configs_of(family: str | None, teacher: str = TEACHER) -> list[str]:
    """The installed configs of digits, of a family of methods or of all; those for the teacher,
    named NAME-``teacher``, in place of NAME-digits.

    Raises:
        UserError: no such family.
    """
    names = [path.stem for path in sorted(CONFIGS.glob("*-digits.yaml"))]
    own = {name: f"{name.removesuffix('-digits')}-{teacher}" for name in names}
    names = [own[name] if (CONFIGS / f"{own[name]}.yaml").is_file() else name for name in names]
    if family is None:
        return names
    families = {method.name: method.family for method in methods()}
    if family not in families.values():
        raise UserError(f"--family {family}: unknown; {hint(family, sorted({*families.values()}))}")
    return [name for name in names if families[read_config(name)[1].method] == family]


@dataclass(frozen=True)
class Plain:
    """A config as it takes part, before it is said in how many steps.

    Args:
        name: of the config, or its file.
        teacher: name of the shipped teacher.
        keys: overrides.
        settings: what it trains with.
        steps: the numbers of steps that its student can sample in.
        any_steps: whether one run serves all of them.
        tag: see :class:`Entry`.
    """

    name: str
    teacher: str
    keys: tuple[str, ...]
    settings: TrainConfig
    steps: list[int]
    any_steps: bool
    tag: str

    def entry(self, steps: int) -> Entry:
        """Its training for so many steps, with seed 0.

        Raises:
            UserError: its student cannot have these.
        """
        keys, settings, found = self.keys, self.settings, self.steps
        if not self.any_steps:
            keys = (*keys, f"student_steps={steps}")
            if steps not in found:
                settings, found = trained(self.name, self.teacher, keys)
        if steps not in found:
            raise UserError(f"its student has no {steps} steps")
        known = digest(settings)[:8]
        return Entry(self.name, self.teacher, steps, 0, keys, self.any_steps, known, self.tag)


def taking_part(name: str, teacher: str, overrides: Sequence[str] = ()) -> Plain:
    """A config as it takes part: unguided where the method does not insist, of the teacher's law.

    Raises:
        UserError: no such config, or one that cannot be trained so.
    """
    cls, config = read_config(name, overrides)
    if not cls.shortens:
        raise UserError(f"{config.method} makes no teacher faster")
    keys = [*overrides] + ([f"teacher={teacher}"] if config.teacher != teacher else [])
    if config.teacher != teacher and Path(name).stem.endswith(f"-{config.teacher}"):
        raise UserError(f"is of the teacher {config.teacher}; give --teacher {config.teacher}")
    if config.guidance != 1:
        plain = read_config(name, [*overrides, "guidance=1"])[1]
        insists = plain.guided or getattr(plain, "guides_fake", False)
        keys += [] if insists else ["guidance=1"]
    settings, found = trained(name, teacher, keys)
    any_steps = len(found) > 1 or "student_steps" not in cls.Config.model_fields
    tag = "".join("-" + re.sub(r"[^\w.=-]+", "_", key) for key in overrides)
    return Plain(name, teacher, tuple(keys), settings, found, any_steps, tag)


def trained(name: str, teacher: str, keys: Sequence[str]) -> tuple[TrainConfig, list[int]]:
    """A config's settings, and the numbers of steps that its student can sample in."""
    cls, settings = read_config(name, [*keys, "seed=0", "steps=1000"])
    return settings, list(cls(settings, load_teacher(teacher)).grids())
