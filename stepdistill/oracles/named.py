"""Closed-form teachers by name: five that are built in, and mixtures written in YAML files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from stepdistill.diffusion.process import RF, Process
from stepdistill.oracles.denoiser import Oracle
from stepdistill.oracles.flow import Form, form
from stepdistill.oracles.mixture import Mixture
from stepdistill.run.config import Raw, read, validate
from stepdistill.run.errors import UserError, hint

MOST_COMPONENTS = 100


@dataclass(frozen=True)
class Teacher:
    """A closed-form teacher and what is known of it.

    Args:
        name: built-in name, or the file's.
        oracle: the denoiser.
        mixture: the law of its data; labels are the classes.
        null: the law under "no class", where it is another than the whole mixture.
        guidance: scale that it is to be guided by; 1 is none.
        kind: how its guided flow map is known, see :func:`stepdistill.oracles.flow.form`.
    """

    name: str
    oracle: Oracle
    mixture: Mixture
    null: Mixture | None
    guidance: float
    kind: Form


def _row(value: Any) -> Any:
    return [value] if isinstance(value, (int, float, str)) else value


Row = Annotated[list[float], BeforeValidator(_row), Field(min_length=1)]
Share = Annotated[float, Field(gt=0)]
Std = Annotated[float, Field(ge=0)]


class MixtureFile(BaseModel):
    """A Gaussian mixture with isotropic components, as a file says it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["gaussian_mixture"] = Field(description="what the file describes")
    weights: list[Share] = Field(description="shares of the components, in any unit")
    means: list[Row] = Field(
        min_length=1,
        description="centres, a list a component (a number where samples have one coordinate)",
    )
    stds: list[Std] = Field(description="standard deviations, one a component; 0 is a point")
    labels: list[int | str] | None = Field(None, description="classes, one a component")
    guidance: float = Field(1.0, ge=0, description="classifier-free guidance; 1 is none")


def gaussian() -> tuple[Mixture, Mixture | None, float]:
    """A tilted Gaussian off the origin: standard deviations 1.3 and 0.6, turned by 30 degrees."""
    angle = torch.tensor(torch.pi / 6, dtype=torch.float64)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    spread = turn * torch.tensor([1.3, 0.6], dtype=torch.float64).square() @ turn.T
    return Mixture.of([[0.5, -0.3]], covariances=spread), None, 1.0


def gmm1d() -> tuple[Mixture, Mixture | None, float]:
    """Three unequal modes on a line, some 3 standard deviations apart."""
    return Mixture.of([[-1.6], [0.2], [1.9]], stds=0.55, weights=[0.5, 0.3, 0.2]), None, 1.0


def gmm2d() -> tuple[Mixture, Mixture | None, float]:
    """Four unequal modes at the corners of a square, 3.3 standard deviations apart."""
    corners = [[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]
    return Mixture.of(corners, stds=0.6, weights=[0.4, 0.3, 0.2, 0.1]), None, 1.0


def mixed() -> tuple[Mixture, Mixture | None, float]:
    """Two classes of one covariance; "no class" is their mixture, as networks learn it."""
    spread = [[0.5, 0.15], [0.15, 0.3]]
    means = [[0.8, 0.5], [-0.8, -0.5]]
    return Mixture.of(means, covariances=spread, labels=[0, 1]), None, 2.0


def classes() -> tuple[Mixture, Mixture | None, float]:
    """Two classes and "no class", Gaussians of one covariance: guided, they stay Gaussians."""
    spread = [[0.5, 0.15], [0.15, 0.3]]
    means = [[0.8, 0.5], [-0.8, -0.5]]
    mixture = Mixture.of(means, covariances=spread, labels=[0, 1])
    return mixture, Mixture.of([[0.0, 0.0]], covariances=spread), 2.0


BUILT_IN: dict[str, Callable[[], tuple[Mixture, Mixture | None, float]]] = {
    made.__name__: made for made in (gaussian, gmm1d, gmm2d, classes, mixed)
}
"""Built-in teachers by name; each gives mixture, null law and guidance."""


def read_teacher(name: str, *, process: Process | None = None, head: str = "velocity") -> Teacher:
    """A teacher by its built-in name, or from a YAML file of a Gaussian mixture.

    Args:
        name: a name of :data:`BUILT_IN`, or a file (see :class:`MixtureFile`).
        process: the corruption; rectified flow if left out.
        head: what the denoiser's raw output is to mean.

    Raises:
        UserError: no such teacher, or a file that does not describe one.
    """
    mixture, null, guidance = BUILT_IN[name]() if name in BUILT_IN else _from_file(name)
    return teacher_of(name, mixture, null, guidance, process=process, head=head)


def teacher_of(
    name: str,
    mixture: Mixture,
    null: Mixture | None = None,
    guidance: float = 1.0,
    *,
    process: Process | None = None,
    head: str = "velocity",
) -> Teacher:
    """The teacher of a mixture; see :class:`Teacher` and :func:`read_teacher`."""
    oracle = Oracle.of(process or RF(), head, mixture, null=null)
    return Teacher(name, oracle, mixture, null, guidance, form_at(oracle, guidance))


def form_at(oracle: Oracle, guidance: float) -> Form:
    """How the flow maps of a teacher guided by a scale are known: the least known of its classes'.

    Args:
        oracle: the teacher.
        guidance: scale of classifier-free guidance; 1 is none.
    """
    queried = range(len(oracle.classes)) if oracle.classes else [None]
    forms = {form(oracle.law(label, guidance)) for label in queried}
    order: tuple[Form, ...] = ("integral", "quantile", "gaussian")
    return next(one for one in order if one in forms)


def _from_file(name: str) -> tuple[Mixture, None, float]:
    path = Path(name)
    if path.is_dir():
        raise UserError(f"teacher {name}: a folder; name a YAML file in it")
    if not path.is_file():
        raise UserError(f"teacher {name}: no such file; {hint(name, BUILT_IN, 'built in are')}")
    try:
        raw = read(name)
    except UserError as error:  # what YAML says of a binary file has several lines
        raise UserError(" ".join(str(error).split())) from error
    file = validate(raw, MixtureFile)
    _check(raw, file)
    mixture = Mixture.of(file.means, stds=file.stds, weights=file.weights, labels=file.labels or ())
    return mixture, None, file.guidance


def _check(raw: Raw, file: MixtureFile) -> None:
    """What keys must be to each other.

    Raises:
        UserError: the first that does not fit.
    """
    count = len(file.means)
    if count > MOST_COMPONENTS:
        raise UserError(f"{raw.place('means')}: {count} components; give at most {MOST_COMPONENTS}")
    for key in ("weights", "stds", "labels"):
        values = getattr(file, key)
        if values is not None and len(values) != count:
            raise UserError(
                f"{raw.place(key)}: {key} has length {len(values)}, means has {count}; "
                "give one a component"
            )
    for k, mean in enumerate(file.means):
        if len(mean) != len(file.means[0]):
            raise UserError(
                f"{raw.place('means')}: means.{k} has length {len(mean)}, means.0 has "
                f"{len(file.means[0])}; give every component as many coordinates"
            )
    if file.guidance != 1 and not file.labels:
        raise UserError(
            f"{raw.place('guidance')}: guidance={file.guidance:g} needs labels, the components' "
            "classes; give labels or set guidance to 1"
        )
