"""OPD: on-policy distillation; the student agrees with its teachers where its own sampler goes.

At states that the student itself reaches, the mean of its next step is pulled to that of a
teacher: the KL divergence of two Gaussian steps, differentiated directly with the state held.
Several teachers share the work by class.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser, Prediction
from stepdistill.diffusion.flow_sde import Step, flow_step, flow_times
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.process import translate
from stepdistill.diffusion.sampler import full
from stepdistill.losses.regression import mean_square
from stepdistill.losses.terms import Term, added, largest
from stepdistill.run.assets import load_teacher
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plugged
from stepdistill.run.ratios import sample_parts
from stepdistill.run.rng import Rng
from stepdistill.run.xformers import enable_xformers
from stepdistill.trainers.base import Loss, Pass, Trainer, Turn
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.settings import TrainConfig


class OPDConfig(TrainConfig):
    """Settings of ``opd``."""

    student_steps: int = Field(4, ge=1, description="steps of the student's grid")
    walk: Literal["sde", "ode"] = Field(
        "sde", description="the walk in training: with noise, or the flow as the export samples"
    )
    eta: float = Field(0.7, gt=0, le=2, description="strength of the walk's noise")
    denominator: Literal["exact", "flow", "ode"] = Field(
        "exact",
        description="of the squared gap of means: exact, 2 std^2 |dt|, the KL divergence "
        "(DiffusionOPD); flow, 2 std^2 (Flow-OPD); ode, 2, of the flow's own step",
    )
    compared: Literal["one", "all"] = Field(
        "one", description="one step of the walk an update, drawn, or all of them"
    )
    share: float = Field(
        1.0, gt=0, le=1, description="share of the walk's steps that are compared, the noisiest"
    )
    more_teachers: tuple[str, ...] = Field(
        (), description="further teachers, numbered from 1; pipelines as `teacher`, which is 0"
    )
    routes: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict,
        description="class (name or number): number of its teacher; classes not named have 0",
    )
    terms: tuple[Plugged[Term], ...] = Field(
        (), description="what is added to the loss on the clean estimates, such as diversity"
    )


class OPDTrainer(Trainer):
    """DiffusionOPD and Flow-OPD's direct form, and CFG distillation by ``guidance``, spec 5.21.

    Here: means over entries and over steps in the place of sums; a step trains the classes of one
    teacher, drawn by its number of classes, so that one teacher is asked; the teacher alone is
    guided. Flow-OPD's clipped policy gradient, whose mean is zero where its advantage is held, and
    its further aesthetic teacher are not part of it.
    """

    Config = OPDConfig
    config: OPDConfig
    shortens = False
    proofs: ClassVar = {
        "flow": Proof(
            ("classes",),
            {"guidance": 2.0, "walk": "ode", "denominator": "ode", "compared": "all"},
            effort=0.7,
        ),
        "noise": Proof(("classes",), {"guidance": 2.0}, effort=0.7),
        "flow-opd": Proof(("classes",), {"guidance": 2.0, "denominator": "flow"}, effort=0.7),
    }

    def setup(self) -> None:
        """The student, its steps, and the further teachers.

        Raises:
            UserError: a denominator that the walk has not, or teachers that do not fit.
        """
        c = self.config
        if c.walk == "ode" and c.denominator != "ode":
            raise UserError(
                f"denominator={c.denominator}: the steps of walk=ode have no variance; set "
                "denominator=ode or walk=sde"
            )
        self.sizes, self.group = (c.student_steps,), largest(c.terms)
        (self.grid,) = self.grids().values()
        times = flow_times(self.process, self.grid)
        pairs = zip(times, times[1:], strict=False)
        self.steps = [Step(*p) if c.walk == "ode" else flow_step(*p, c.eta) for p in pairs]
        self.compared = max(1, int(c.share * c.student_steps + 1e-9))
        self.add_player("student", self.initial, c.optim, ema=True, total=c.steps)
        self.experts = [self.teacher, *(self.expert(name) for name in c.more_teachers)]
        self.routes = self.routed()
        places = torch.tensor(self.routes, device=self.device)
        self.own = [torch.nonzero(places == n).flatten() for n in range(len(self.experts))]

    def expert(self, name: str) -> Denoiser:
        """A further teacher.

        Raises:
            UserError: it is not to be had, or makes other samples than the first.
        """
        try:
            den = load_teacher(name).to(self.device)
        except UserError as error:
            raise UserError(f"more_teachers: {error}") from error
        den.read(self.teacher.prompts)
        same = den.sample_shape == self.teacher.sample_shape
        if not same or len(den.classes) != len(self.teacher.classes):
            raise UserError(
                f"more_teachers: {name} makes {den.sample_shape} of {len(den.classes)} classes, "
                f"the teacher {self.teacher.sample_shape} of {len(self.teacher.classes)}; give one "
                "of the same"
            )
        if den.classes != self.teacher.classes:
            raise UserError(
                f"more_teachers: {name} has the classes {', '.join(den.classes)}, the teacher "
                f"{', '.join(self.teacher.classes)}; give one of the same, in the same order"
            )
        if self.config.guided and den.null_label is None:
            raise UserError(
                f"more_teachers: {name} has no label that means 'no class'; set guidance=1"
            )
        if self.config.xformers:
            enable_xformers(den.net, self.device)
        return den.requires_grad_(False)

    def routed(self) -> list[int]:
        """The number of each class's teacher.

        Raises:
            UserError: a class or a teacher that there is not, or teachers without classes.
        """
        c, classes = self.config, self.teacher.classes
        if c.more_teachers and not c.routes:
            raise UserError("more_teachers: which classes are theirs? name them in routes")
        out = [0] * len(classes)
        for name, number in c.routes.items():
            place = classes.index(name) if name in classes else None
            if place is None and name.isdigit() and int(name) < len(classes):
                place = int(name)
            if place is None:
                raise UserError(f"routes: the teacher has no class {name!r}; see its model index")
            if number >= len(self.experts):
                raise UserError(
                    f"routes.{name}={number}: there are {len(self.experts)} teachers, numbered "
                    "from 0; give more teachers"
                )
            out[place] = number
        return out

    def task(self, step: int) -> int:
        """Number of the teacher whose classes a step trains, the same on every process."""
        if not any(self.routes):
            return 0
        return self.routes[Rng(self.config.seed).at(step).integer("task", len(self.routes))]

    def owned(self, step: int) -> Tensor | None:
        """See :meth:`Trainer.owned`: those of the step's teacher."""
        return self.own[self.task(step)] if any(self.routes) else None

    @property
    def fixed_point(self) -> FixedPoint:
        """The (guided) teacher's field at the states of the grid, and so its walk on it."""
        return FixedPoint("map", follow=lambda t: (t, 0.0))

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """The divergence of the compared steps, a mean; and the terms on the last estimate."""
        c, den = self.config, self.experts[self.task(rng.step)]
        whole, student = c.compared == "all", self.denoiser("student")
        last = self.compared - 1 if whole else rng.integer("exit", self.compared)
        first, parts, gaps = 0 if whole else last, [], []
        z = self.z(batch, rng)
        y = self.steps[0].s * z
        with torch.no_grad():
            for place in range(first):
                pred = self.predict(student, place, y, batch.cond)
                y = self.move(place, y, pred.z - pred.x, batch, rng)
        for place in range(first, last + 1):
            pred = self.predict(student, place, y, batch.cond)
            own = pred.z - pred.x
            with torch.no_grad():
                real = self.ask(den, pred.x_t, place, batch.cond)
                y = self.move(place, y, own, batch, rng)
            gap = own - real
            parts.append((self.factor(self.steps[place]) * mean_square(gap)).mean())
            gaps.append(gap.detach().abs().mean())
        value = torch.stack(parts).mean()
        logs = {"loss": value, "gap": torch.stack(gaps).mean()}
        more, named = added(c.terms, pred.x, batch.cond.label)
        return Loss(value + more, logs | named | sample_parts(pred.x))

    def move(self, place: int, y: Tensor, own: Tensor, batch: Batch, rng: Rng) -> Tensor:
        """The state after a step of the walk by the student's velocity, in flow coordinates."""
        step = self.steps[place]
        y = step.keep * y + step.gain * own
        if step.spread:
            y = y + step.spread * self.z(batch, rng, f"fresh-{place}")
        return y

    def predict(self, den: Denoiser, place: int, y: Tensor, cond: Cond) -> Prediction:
        """What a network of the student's process says of a state."""
        t = full(y, self.grid[place])
        at = self.process.coefs(t).expand(y)
        out: Prediction = den(y * (at.alpha + at.sigma), t, cond)
        return out

    def ask(self, den: Denoiser, x_t: Tensor, place: int, cond: Cond) -> Tensor:
        """A teacher's velocity z - x, guided if it is, at states of the student's process."""
        t = full(x_t, self.grid[place])
        if den is not self.teacher:
            x_t, t = translate(x_t, t, self.process, den.process)
        real = guided(den, x_t, t, cond, self.config.guidance)
        return real.z - real.x

    def factor(self, step: Step) -> float:
        """What the squared gap of velocities is multiplied by."""
        kind = self.config.denominator
        if kind == "ode":
            return step.width**2 / 2
        variance = step.rate**2 if kind == "flow" else step.spread**2
        return step.gain**2 / (2 * variance)

    def members(self) -> list[tuple[str, Denoiser]]:
        """See :meth:`Trainer.members`; with the further teachers."""
        return super().members() + [("teacher", den) for den in self.experts[1:]]

    def passes(self) -> list[Pass]:
        """A trained pass and a teacher's a compared step, and the walk to a drawn one."""
        whole = self.config.compared == "all"
        count = self.compared if whole else 1
        walk = 0 if whole else (self.compared - 1) / 2
        own = [
            Pass("student", "train", count),
            Pass("teacher", "forward", count, 2 if self.config.guided else 1),
        ]
        return own + ([Pass("student", "forward", walk)] if walk else [])


TRAINER = OPDTrainer
