"""One trial: a method, in one setting, trained by its own trainer on one closed-form teacher."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.data.order import share
from stepdistill.data.pairs.folder import open_folder
from stepdistill.data.pairs.make import make_pairs
from stepdistill.data.pairs.store import PairStore
from stepdistill.oracles.denoiser import Oracle
from stepdistill.oracles.named import Teacher, form_at
from stepdistill.proof.student import Kind, begin
from stepdistill.run.log import Meter
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.find import trainer as find_trainer
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.pair_walk import PairWalk, plan_of, settings

Recipe = dict[str, Any]
FAST = {"betas": (0.9, 0.99)}


def opposed(lr: float) -> Recipe:
    """A discriminator's optimizer."""
    return {"discriminator": {"lr": lr, "betas": (0.0, 0.99)}}


AFFINE: dict[str, Recipe] = {
    "map": {"steps": 1500, "optim": {"lr": 1e-2, **FAST}},
    "law": {"steps": 1600, "optim": {"lr": 3e-3}, "critic": {"lr": 1e-2}, **opposed(1e-2)},
    "field": {"steps": 2000, "optim": {"lr": 4e-3, **FAST}},
}
NETWORK: dict[str, Recipe] = {
    "map": {"steps": 4000, "optim": {"lr": 4e-3, **FAST}},
    "law": {"steps": 3000, "optim": {"lr": 1.5e-3}, "critic": {"lr": 5e-3}, **opposed(5e-3)},
    "field": {"steps": 2000, "optim": {"lr": 4e-3, **FAST}},
}
"""Training by the fixed point's kind: of students that are affine, and of small networks."""
SHARED: Recipe = {"batch_size": 256, "ema": {"decay": 0.997}, "critic_steps": 2}
OPTIM: Recipe = {"betas": (0.0, 0.999), "decay": "cosine", "clip": None}
CLASSES = 2  # times the batch where every sample teaches one class only
PAIRS: Recipe = {"num": 8192, "steps": 16, "shard": 4096, "batch_size": 4096}
ROWS = 20
WARM, TIMED = 10, 30


@dataclass(frozen=True)
class Case:
    """What is tried: a method, the name of its setting, and a teacher's name or file."""

    method: str
    setting: str
    teacher: str

    def __str__(self) -> str:
        """In words."""
        return f"{self.method} ({self.setting}) on {self.teacher}"


@dataclass
class Trial:
    """A trained trainer with what it was trained on.

    Args:
        case: what was tried.
        teacher: the closed-form teacher.
        kind: of the student.
        build: makes the trainer anew: keyword arguments go to it.
        source: gives the batch of a step to a trainer.
        point: what theory says of it.
        trainer: the trained one.
        seconds: of training.
        rows: the log, as a run would have written it.
    """

    case: Case
    teacher: Teacher
    kind: Kind
    build: Callable[..., Trainer]
    source: Callable[[Trainer, int], Batch]
    point: FixedPoint
    trainer: Trainer
    seconds: float = 0.0
    rows: list[tuple[int, list[str], Tensor]] = field(default_factory=list)

    @cached_property
    def oracle(self) -> Oracle:
        """The denoiser that the student is held against: the teacher's, or of its law tilted."""
        own, tilt = self.teacher.oracle, self.point.tilt
        if tilt is None:
            return own
        return Oracle.of(own.process, own.head.name, tilt(self.teacher.mixture))

    @property
    def affine(self) -> bool:
        """Whether the student can hold the answer exactly."""
        return self.kind != "network"


def proofs(method: str) -> Mapping[str, Proof]:
    """The settings in which a method is proven, by name."""
    return find_trainer(method).proofs


def run(
    case: Case, teacher: Teacher, seconds: float | None = None, *, proof: Proof | None = None
) -> Trial:
    """Train a case to its end.

    Args:
        case: what to try.
        teacher: the case's teacher, read.
        seconds: how long the training may take about; its recipe's own number of steps if None.
        proof: the setting, where it is none of the method's own.
    """
    proof = proof or proofs(case.method)[case.setting]
    cls = find_trainer(case.method)
    point = _made(cls, teacher, proof, "table", {"steps": 1000}).fixed_point
    reached = teacher.guidance if point.guided else 1.0
    gaussian = form_at(teacher.oracle, reached) == "gaussian"
    held: Kind = "smooth" if point.kind != "map" else "spline" if point.smooth else "table"
    kind: Kind = held if gaussian else "network"
    recipe = (AFFINE if gaussian else NETWORK)[point.kind]
    steps = round(recipe["steps"] * proof.effort)
    batch = SHARED["batch_size"] * proof.batch * (CLASSES if teacher.oracle.classes else 1)

    def build(**keys: Any) -> Trainer:
        own = {name: keys.pop(name) for name in ("rank", "world") if name in keys}
        return _made(
            cls,
            teacher,
            proof,
            kind,
            {**_filled(recipe), "steps": steps, "batch_size": batch, **keys},
            **own,
        )

    with TemporaryDirectory() as folder:
        source = sources(build(), teacher, Path(folder))
        if seconds is not None:
            steps = max(WARM, round(seconds / _step_seconds(build(), source)))
        made = build()
        trial = Trial(case, teacher, kind, build, source, made.fixed_point, made)
        began, meter = time.monotonic(), Meter()
        every = max(1, steps // ROWS)
        for step in range(steps):
            made.prepare(step)
            meter.add(made.step(step, source(made, step)))
            if (step + 1) % every == 0:
                trial.rows.append((step + 1, *meter.means()))
        trial.seconds = time.monotonic() - began
    return trial


def _filled(recipe: Recipe) -> Recipe:
    optims = {name: OPTIM | recipe.get(name, {}) for name in ("optim", "critic", "discriminator")}
    return {**SHARED, **recipe, **optims}


def _made(
    cls: type[Trainer], teacher: Teacher, proof: Proof, kind: Kind, recipe: Recipe, **own: Any
) -> Trainer:
    """A trainer of a setting; the recipe's keys that its config does not have are left out."""
    known = cls.Config.model_fields
    scratch = not known["teacher"].is_required()  # the network handed over is itself trained
    oracle = copy.deepcopy(teacher.oracle).float()  # once, not at every call
    keys = {name: value for name, value in recipe.items() if name in known} | dict(proof.keys)
    keys |= {"method": cls.__module__.rpartition(".")[2], "run": "proof", "teacher": teacher.name}
    if cls.needs == "pairs":
        keys["pairs"] = PAIRS | keys.get("pairs", {})
    if scratch:
        fresh = begin(oracle, "network", fresh=True)
        return cls(cls.Config(**keys), fresh, **own)
    keys.setdefault("guidance", teacher.guidance)
    return cls(cls.Config(**keys), oracle, initial=begin(oracle, kind), **own)


def _step_seconds(made: Trainer, source: Callable[[Trainer, int], Batch]) -> float:
    times = []
    for step in range(WARM + TIMED):
        began = time.monotonic()
        made.step(step, source(made, step))
        times.append(time.monotonic() - began)
    return sorted(times[WARM:])[TIMED // 2]


def sources(made: Trainer, teacher: Teacher, folder: Path) -> Callable[[Trainer, int], Batch]:
    """What gives a step's batch: labels alone, samples of the law, or pairs of a real store."""
    if made.needs == "labels":
        return lambda trainer, step: trainer.batch(step)
    if made.needs == "pairs":
        return _pairs(made, folder)
    return lambda trainer, step: _samples(trainer, step, teacher)


def _samples(made: Trainer, step: int, teacher: Teacher) -> Batch:
    index, rng = made.batch(step).index, Rng(made.config.seed + 1).at(step)
    z = rng.normal("data", index, (teacher.mixture.dim,))
    x, component = teacher.mixture.sample(z, rng.uniform("component", index))
    label = None
    if teacher.oracle.classes:
        places = {one: k for k, one in enumerate(teacher.mixture.classes)}
        label = torch.tensor([places[one] for one in teacher.mixture.labels])[component]
    return made.batch(step, x.float(), label)


def _pairs(made: Trainer, folder: Path) -> Callable[[Trainer, int], Batch]:
    pairs, oracle = settings(made.config), made.teacher
    plan = plan_of(made.config, oracle, name="oracle")
    walk = PairWalk(made.config, oracle, plan)
    make_pairs(
        open_folder(folder), plan, walk, batch_size=pairs.batch_size, told=lambda there, made: None
    )
    store = PairStore(folder, plan)

    def batch(trainer: Trainer, step: int) -> Batch:
        size, seed = trainer.config.batch_size, trainer.config.seed
        part = share(size, trainer.rank, trainer.world)
        z, x, label = store.batch(step, size, seed, part, trainer.device)
        return trainer.batch(step, x, label, z)

    return batch
