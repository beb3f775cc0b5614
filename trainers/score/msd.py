"""Multi-student distillation: one student for each part of the classes, chosen by the class.

Every student has a fake score of its own, and both see their own classes alone, so that each is
``dmd2`` without its head on a part of the conditions. A step trains one student, the next step the
next. Students may be smaller than the teacher: they then learn its scores first.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser, Experts, Routed
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.sampler import sample
from stepdistill.diffusion.timesteps import Density, Uniform, uniform_grid
from stepdistill.run.errors import UserError, hint
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Turn
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.flow.denoising import NetworkConfig
from stepdistill.trainers.score.matching import Matching, MatchingConfig
from stepdistill.trainers.score.rollout import GridConfig, GridTrainer
from stepdistill.trainers.smaller import smaller

MOST_STUDENTS = 4  # an exported pipeline holds as many networks


def _text(value: Any) -> Any:
    return str(value) if type(value) is int else value


Name = Annotated[str, BeforeValidator(_text)]


class SmallConfig(NetworkConfig):
    """A smaller network for the students, and how it learns the teacher's scores (TSM)."""

    steps: int = Field(1000, ge=1, description="first steps, in which students learn scores alone")
    t: Density = Field(
        default_factory=lambda: Uniform(low=0.0, high=1.0), description="times of these steps"
    )
    walk: int = Field(8, ge=1, description="the teacher's steps to a sample that is learnt on")


class MSDConfig(GridConfig, MatchingConfig):
    """Settings of ``msd``."""

    critic_steps: int = Field(5, ge=1, description="fake-score updates a student update")
    students: int = Field(2, ge=1, le=MOST_STUDENTS, description="number of students")
    parts: tuple[tuple[Name, ...], ...] | None = Field(
        None,
        description="names or labels of each student's classes; null: equal runs of the labels",
    )
    network: SmallConfig | None = Field(
        None, description="the students' network; null: the teacher's, with its weights"
    )


class MSDTrainer(Matching, GridTrainer):
    """Multi-student distillation (Song et al. 2024), spec 5.13; one student is ``dmd2`` headless.

    Here: students take turns step by step, in place of runs of their own; no adversarial stage;
    and smaller students learn the teacher's raw output, with weight 1, at its own samples noised
    anew, guided as the teacher is.
    """

    Config = MSDConfig
    config: MSDConfig
    clips = True
    part = 0  # the student whose turn it is
    scoring = 0  # first steps, in which small students learn scores
    begun = False  # whether they match distributions by now
    proofs: ClassVar = {"a student a class": Proof(("classes",), {"students": 2})}

    def setup(self) -> None:
        """A student and a fake score for each part.

        Raises:
            UserError: no classes, or parts that do not share them out; a network that does not
                stand in for the teacher's, or what goes with neither.
        """
        c = self.config
        if c.adversary is not None:
            raise UserError("adversary: msd has none; set adversary=null")
        self.parts = shares(c, self.teacher.classes)
        self.labels = [torch.tensor(part, device=self.device) for part in self.parts]
        self.routes = tuple(
            next(k for k, part in enumerate(self.parts) if label in part)
            for label in range(len(self.teacher.classes))
        )
        self.scoring = c.network.steps if c.network else 0
        self.matching = self.scoring + c.critic_first
        if self.matching + c.students > c.steps:
            before = {"network.steps": self.scoring, "critic_first": c.critic_first}
            told = [f"{key}={count}" for key, count in before.items() if count]
            raise UserError(
                f"{' and '.join(told) or 'this'} leave{'' if len(told) == 2 else 's'} one of "
                f"{c.students} students none of steps={c.steps} to match distributions in; give "
                "more steps"
            )
        if c.students > 1 and c.guides_fake:
            raise UserError(
                f"guide: {c.guide.kind} asks each student's fake score for no class, which there "
                "is a law of its own classes and of the teacher's that of all; set guide=teacher"
            )
        source = self.small() if c.network else self.initial
        super().setup()
        turns = self.turns_from(self.scoring)
        for k in range(c.students):
            total = self.turns_from(self.matching)
            if self.scoring:
                total = max(1, self.scoring // c.students)
            if k or c.network:
                self.add_player(numbered("student", k), source, c.optim, ema=True, total=total)
            if k:
                self.add_player(numbered("critic", k), self.initial, c.critic, ema=False, total=1)
            self.players[numbered("student", k)].total = total
            self.players[numbered("critic", k)].total = turns * c.critic_steps

    def turns_from(self, step: int) -> int:
        """The most turns that a student has from a step on."""
        return -(-(self.config.steps - step) // self.config.students)

    def small(self) -> Denoiser:
        """A fresh network that says what the teacher's says.

        Raises:
            UserError: it cannot, or is to be an adapter or to be followed.
        """
        c, teacher = self.config, self.teacher
        assert c.network is not None
        if c.critic_follows:
            raise UserError("critic_follows: smaller students have other weights; set it to 0")
        if c.lora and "student" in c.lora.players:
            raise UserError("lora.players: a smaller student starts anew; leave the critic alone")
        return smaller(c.network, c.seed, teacher)

    def prepare(self, step: int) -> None:
        """See :meth:`Trainer.prepare`: the students' optimizers start over after the scores."""
        if self.begun or step < self.scoring:
            return
        self.begun = True
        for player in self.students() if self.scoring else []:
            player.total = self.turns_from(self.matching)
            player.reset_optimizer()

    def owned(self, step: int) -> Tensor:
        """See :meth:`Trainer.owned`: those of the step's student."""
        return self.labels[step % self.config.students]

    def turns(self, step: int) -> list[Turn]:
        """Those of the engine for one student and its fake score; scores alone at first."""
        self.part = step % self.config.students
        if step < self.scoring:
            return [Turn(self.active, self.score_loss)]
        return super().turns(step - self.scoring)

    @property
    def active(self) -> str:
        """The student whose turn it is."""
        return numbered("student", self.part)

    @property
    def fake(self) -> str:
        """Its fake score."""
        return numbered("critic", self.part)

    def score_loss(self, batch: Batch, rng: Rng) -> Loss:
        """Squared error of the raw output to the teacher's, at its samples noised to times t."""
        c, cond = self.config, batch.cond
        assert c.network is not None
        with torch.no_grad():
            grid = uniform_grid(self.process, c.network.walk, self.start)
            x = sample(self.teacher, self.z(batch, rng), grid, cond, guidance=c.guidance)
            t = self.times(c.network.t, 0.0, batch, rng)
            x_t = self.process.noise(x, self.z(batch, rng, "e"), t)
            target = guided(self.teacher, x_t, t, cond, c.guidance).h
        h = self.denoiser(self.active)(x_t, t, cond).h
        loss = (h - target).square().mean()
        return Loss(loss, {"loss": loss})

    def best(self) -> Denoiser | Experts:
        """Every class by its own student."""
        made = [player.best for player in self.students()]
        return Routed(made, self.routes) if len(made) > 1 else made[0]

    def passes(self) -> list[Pass]:
        """Those of one student: of the comparison, or of the score that it learns at first."""
        c = self.config
        if self.begun or c.network is None:
            return super().passes()
        asked = Pass("teacher", "forward", c.network.walk + 1, 2 if c.guided else 1)
        return [Pass("student", "train"), asked]


def numbered(role: str, place: int) -> str:
    """Player names: student, student_2, ..., and the like."""
    return role if place == 0 else f"{role}_{place + 1}"


def shares(config: MSDConfig, classes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The labels of each student's classes.

    Raises:
        UserError: not every class has one owner, or a student has none.
    """
    count, labels = config.students, range(len(classes))
    if not classes:
        raise UserError("teacher: msd shares classes among students, and this teacher has none")
    if config.parts is None:
        if count > len(classes):
            raise UserError(f"students={count} share {len(classes)} classes; set fewer")
        cuts = [round(len(classes) * k / count) for k in range(count + 1)]
        return tuple(tuple(labels[a:b]) for a, b in zip(cuts, cuts[1:], strict=False))
    if len(config.parts) != count or not all(config.parts):
        raise UserError(
            f"parts: students={count} need as many lists of classes, none of them empty; there "
            f"are {len(config.parts)}"
        )
    parts = tuple(tuple(label_of(name, classes) for name in part) for part in config.parts)
    owned = sorted(label for part in parts for label in part)
    for label in labels:
        if owned.count(label) != 1:
            raise UserError(
                f"parts: class {classes[label]} must be in one part, and is in {owned.count(label)}"
            )
    return parts


def label_of(name: str, classes: tuple[str, ...]) -> int:
    """The label of a class by its name, or by itself where no class is called so.

    Raises:
        UserError: there is none.
    """
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    raise UserError(f"parts: the teacher has no class {name}; {hint(name, classes, 'there are')}")


TRAINER = MSDTrainer
