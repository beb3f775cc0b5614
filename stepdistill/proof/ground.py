"""The proving ground: which cases there are, and what came of each, fit to travel between
processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stepdistill.oracles.mixture import Mixture
from stepdistill.oracles.named import read_teacher
from stepdistill.proof.contract import keep
from stepdistill.proof.judge import judge
from stepdistill.proof.rows import Picture, Row
from stepdistill.proof.trial import Case, proofs, run
from stepdistill.run.errors import UserError
from stepdistill.run.ratios import figures
from stepdistill.trainers.find import methods, trainer
from stepdistill.trainers.fixed_point import FixedPoint

SHOWN = 600  # points of a picture


@dataclass(frozen=True)
class Cloud:
    """A picture's points as plain numbers.

    Args:
        steps: sampler steps.
        z: noise [N][D].
        x: the student's images [N][D].
        expected: theory's [N][D].
        paired: whether each x belongs to its expected.
        curve: on a line, the law's density at places: pairs (place, density).
    """

    steps: int
    z: list[list[float]]
    x: list[list[float]]
    expected: list[list[float]]
    paired: bool
    curve: list[tuple[float, float]]


@dataclass(frozen=True)
class Lines:
    """Paths as plain numbers.

    Args:
        whose: "teacher" or "student".
        times: flow times, falling [T].
        paths: one a noise [N][T][D].
    """

    whose: str
    times: list[float]
    paths: list[list[list[float]]]


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Args:
        case: what was tried.
        rows: its figures.
        clouds: its pictures.
        notes: what could not be judged.
        point: what theory says of it, without the times by which its teacher is walked.
        log: rows as a run's log has them.
        seconds: of training.
        steps: of training.
        lines: paths of teacher and student, where they are judged by how straight they are.
    """

    case: Case
    rows: list[Row]
    clouds: list[Cloud]
    notes: list[str]
    point: FixedPoint
    log: list[dict[str, object]] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    lines: list[Lines] = field(default_factory=list)

    @property
    def short(self) -> list[Row]:
        """The figures that fall short."""
        return [row for row in self.rows if not row.passed]


def plan(
    names: Sequence[str], settings: Sequence[str] = (), teacher: str | None = None
) -> list[Case]:
    """The cases of methods: every setting on the teachers that it declares, or on one.

    Args:
        names: methods; all if empty.
        settings: of these methods; all if empty.
        teacher: a closed-form teacher's name, or a mixture's file.

    Raises:
        UserError: no such method, setting or teacher.
    """
    for name in names:
        trainer(name)
    chosen = [method.name for method in methods() if method.name in names or not names]
    known = list(dict.fromkeys(setting for name in chosen for setting in proofs(name)))
    for setting in settings:
        if setting not in known:
            raise UserError(f"setting {setting!r} is unknown; known are {', '.join(known)}")
    cases = [
        Case(name, setting, one)
        for name in chosen
        for setting, proof in proofs(name).items()
        if setting in settings or not settings
        for one in ([teacher] if teacher else proof.teachers)
    ]
    for name in dict.fromkeys(case.teacher for case in cases):
        read_teacher(name)
    silent = [name for name in names if not proofs(name)]
    if silent:
        raise UserError(f"method {silent[0]} declares no proofs; see CONTRIBUTING, Add a method")
    return cases


def prove_case(case: Case, seconds: float | None = None) -> Outcome:
    """Train one case and hold it against theory.

    Args:
        case: what to try.
        seconds: of training, about; None for the recipe's own steps.
    """
    trial = run(case, read_teacher(case.teacher), seconds)
    made = judge(trial)
    keep(made)
    log = [
        {"step": step, "losses": figures(dict(zip(names, values.tolist(), strict=True)))}
        for step, names, values in trial.rows
    ]
    return Outcome(
        case,
        made.rows,
        [cloud(one) for one in made.pictures],
        made.notes,
        replace(trial.point, follow=None, tilt=None),  # functions, which do not travel
        log,
        round(trial.seconds, 2),
        trial.trainer.config.steps,
        [
            Lines(one.whose, one.times.tolist(), one.states.transpose(0, 1).double().tolist())
            for one in made.walks
        ],
    )


def cloud(picture: Picture) -> Cloud:
    """A picture's points, thinned."""

    def some(values: Tensor) -> list[list[float]]:
        numbers: list[list[float]] = values[:SHOWN].double().tolist()
        return numbers

    line = picture.law is not None and picture.law.dim == 1
    curve = density(picture.law) if line and picture.law is not None else []
    z, x, expected = (some(one) for one in (picture.z, picture.x, picture.expected))
    return Cloud(picture.steps, z, x, expected, picture.paired, curve)


def density(law: Mixture) -> list[tuple[float, float]]:
    """Places on a line with a law's density there."""
    centre, spread = float(law.mean()), float(law.covariance().sqrt())
    places = torch.linspace(centre - 4 * spread, centre + 4 * spread, 161, dtype=torch.float64)
    heights = law.log_density(places[:, None]).exp()
    return list(zip(places.tolist(), heights.tolist(), strict=True))
