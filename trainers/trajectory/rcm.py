"""Score-regularised continuous-time consistency: sCM, and a pull on the student's own samples.

sCM keeps to the teacher's flow and covers its modes; the gap of a fake score and the teacher at
the student's samples, as in DMD, sharpens what a tangent of finite networks leaves blurred.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Prediction
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.sampler import first_state, full
from stepdistill.diffusion.timesteps import Density
from stepdistill.losses.continuous import field
from stepdistill.losses.regression import mean_square
from stepdistill.run.errors import UserError
from stepdistill.run.ratios import gap_parts
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Turn
from stepdistill.trainers.beginning import told
from stepdistill.trainers.by_output import of_clean
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.engine import CriticOptim
from stepdistill.trainers.trajectory.scm import CALM, PLAIN, UNIFORM, SCMConfig, SCMTrainer

PUBLISHED = 0.01, 2.1e6  # weight of the pull, and the number of entries it was tuned for
LEAST = 1e-5  # of the pull's normaliser


class RCMConfig(SCMConfig):
    """Settings of ``rcm``."""

    adaptive: bool = Field(False, description="weigh times by a learned function of theirs")
    guidance_range: None = Field(None, description="always null: the fake score is of one law")
    critic: CriticOptim = Field(
        default_factory=CriticOptim, description="the fake score's optimizer"
    )
    critic_steps: int = Field(4, ge=1, description="fake-score updates a student update")
    alone: int | None = Field(
        None,
        ge=0,
        description="steps at the start in which the student learns by the tangent alone; null: "
        "those of the warm-up",
    )
    regularizer: float | None = Field(
        None,
        ge=0,
        description="weight of the pull; null: 0.01 sqrt(2.1e6 / entries of a sample), which "
        "keeps its balance with a normalised tangent at any size",
    )
    own_steps: int = Field(4, ge=1, description="most steps of the student's own samples")
    own_walk: Literal["grid", "drawn"] = Field(
        "grid",
        description="times of the student's own samples: the sampler's, in 1, 2, 4 or 8 steps, of "
        "which the fake score is told the number; or drawn by own_t, in any number (published)",
    )
    own_t: Density | None = Field(
        None,
        description="times at which teacher and fake score are compared, and where drawn walks go "
        "on; null: lognormal noise as published, in sigma_data",
    )


class RCMTrainer(SCMTrainer):
    """rCM, spec M12, from its published code and paper.

    Here: the tangent is sCM's, which differs where the derivative has not its whole weight yet;
    means over entries take the place of sums, in both parts; student and fake score take turns
    within a step; fake score and pull are in the units of the tangent (``by_output``); and the
    student's own samples are, unless ``own_walk: drawn``, what its sampler makes in a drawn number
    of steps. The fake score is told this number: it would else hold their mixture alone to the
    teacher's law, in which what one step lacks may be what many have too much. The pull goes to the
    images of any of these steps: those of the first by the fake score of one step, whose images
    they are, others by that of the whole walk, which is not their own.
    """

    Config = RCMConfig
    config: RCMConfig
    published: ClassVar = (-0.8, 1.6)
    published_own: ClassVar = (0.0, 1.6)
    proofs: ClassVar = {
        "both": Proof(
            ("gaussian",), UNIFORM | {"critic_steps": 1, "optim": CALM, "regularizer": 0.1}
        ),
        "both, plain tangent": Proof(
            ("gmm1d",),
            UNIFORM | PLAIN | {"critic_steps": 1, "optim": CALM, "regularizer": 0.03},
            effort=0.8,
        ),
    }

    def setup(self) -> None:
        """Student and fake score, both from the teacher.

        Raises:
            UserError: the fake score would never train, or walks of steps that the sampler has not.
        """
        super().setup()
        c = self.config
        if c.own_walk == "grid" and c.own_steps not in self.sizes:
            raise UserError(
                f"own_steps={c.own_steps}: the sampler takes {', '.join(map(str, self.sizes))} "
                "steps; set one of these, or own_walk=drawn"
            )
        if self.alone >= c.steps:
            raise UserError(
                f"alone={self.alone} leaves the fake score none of steps={c.steps}; lower it"
            )
        total = (c.steps - self.alone) * c.critic_steps
        first = self.initial
        if self.counted:
            first = told(c, first, "steps", role="critic", instead="own_walk=drawn")
        self.add_player("critic", first, c.critic, ema=False, total=total, copy=not self.counted)

    @cached_property
    def own_times(self) -> Density:
        """The density of times of the student's own samples."""
        return self.config.own_t or self.lognormal(*self.published_own)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The numbers of steps of the student's own samples, one of which is drawn."""
        most = self.config.own_steps
        if self.config.own_walk == "drawn":
            return tuple(range(1, most + 1))
        return tuple(n for n in self.sizes if n <= most)

    @property
    def counted(self) -> bool:
        """Whether the fake score is told this number."""
        return self.config.own_walk == "grid" and len(self.counts) > 1

    @property
    def alone(self) -> int:
        """Steps before the fake score trains, and pulls."""
        own = self.config.alone
        return self.warmup if own is None else own

    @property
    def regularizer(self) -> float:
        """Weight of the pull."""
        own, (weight, entries) = self.config.regularizer, PUBLISHED
        if own is not None:
            return own
        return weight * math.sqrt(entries / math.prod(self.teacher.sample_shape))

    @property
    def by_samples(self) -> bool:
        """See :attr:`SCMTrainer.by_samples`; the fake score learns of samples."""
        return True

    def turns(self, step: int) -> list[Turn]:
        """The student alone at first; then its update, and those of the fake score."""
        c = self.config
        if step < self.alone:
            return [Turn("student", self.loss)]
        return [Turn("student", self.both)] + [Turn("critic", self.critic_loss)] * c.critic_steps

    def both(self, batch: Batch, rng: Rng) -> Loss:
        """The tangent's loss, and the pull on the student's samples."""
        own = self.loss(batch, rng)
        sampled, at, cond = self.sampled(batch, rng, graph=True)
        made = self.eased(sampled, at, of_clean)
        t = self.drawn(self.own_times, rng.uniform("own-t", batch.index))
        x = made.detach()
        x_t = self.process.noise(x, self.z(batch, rng, "own-e"), t)
        with torch.no_grad():
            fake = self.denoiser("critic")(x_t, t, cond).x
            real = guided(self.teacher, x_t, t, batch.cond, self.config.guidance).x
            size = (x - real).abs().flatten(1).mean(dim=1).clamp_min(LEAST)
            aim = x - (fake - real) / expand(size, x)
        pull = mean_square(made - aim).mean()
        loss = own.value + self.regularizer * pull
        logs = own.logs | {"loss": loss, "gap": (fake - real).abs().mean(), "pull": pull}
        return Loss(loss, logs | gap_parts(fake, real, x, x))

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        """The fake score's velocity of the student's samples."""
        with torch.no_grad():
            x, _, cond = self.sampled(batch, rng, graph=False)
        t, e = self.drawn(self.own_times, rng.uniform("own-t", batch.index)), self.z(batch, rng)
        x_t = self.process.noise(x, e, t)
        k = self.process.coefs(t).expand(x_t)
        pred = self.denoiser("critic")(x_t, t, cond)
        off = self.field(pred) - field(x, e, k, self.data)
        loss = mean_square(self.by_field(off, t)).mean()
        return Loss(loss, {"loss": loss})

    def sampled(self, batch: Batch, rng: Rng, *, graph: bool) -> tuple[Tensor, Tensor, Cond]:
        """Samples of the student in a drawn number of steps, which the conditions tell, and the
        times [B] of the step that made them.

        With a graph, that of this step, they are the images of a drawn step.
        """
        student, z = self.denoiser("student"), self.z(batch, rng, "own-z")
        count = self.counts[rng.integer("own-steps", len(self.counts))]
        times, cond = self.walked(z, count, batch, rng, whole=not graph), batch.cond
        x_t = first_state(self.process, z, self.top)
        for place, (t, later) in enumerate(pairwise(times), start=1):
            with torch.no_grad():
                x = student(x_t, t, cond).x
            x_t = self.process.noise(x, self.z(batch, rng, f"own-e-{place}"), later)
        with torch.set_grad_enabled(graph):
            pred: Prediction = student(x_t, times[-1], cond)
        if self.counted:  # the first image of any walk is that of one step
            cond = replace(cond, steps=full(z, count if len(times) > 1 else 1))
        return pred.x, times[-1], cond

    def walked(self, z: Tensor, count: int, batch: Batch, rng: Rng, *, whole: bool) -> list[Tensor]:
        """The times [B] of a walk of ``count`` steps, or of as many as lead to a drawn one."""
        if self.config.own_walk == "grid":
            last = count if whole else 1 + rng.integer("own-exit", count)
            return [full(z, level) for level in self.grids()[count][:last]]
        times = [full(z, self.top)]
        for place in range(1, count):
            later = self.drawn(self.own_times, rng.uniform(f"own-t-{place}", batch.index))
            times.append(torch.minimum(times[-1], later))
        return times

    def passes(self) -> list[Pass]:
        """The tangent's, the walks, and those of the pull and the fake score."""
        c, mean = self.config, sum(self.counts) / len(self.counts)
        before = (mean - 1) / (2 if c.own_walk == "grid" else 1)
        return [
            *super().passes(),
            Pass("student", "train"),
            Pass("critic", "forward"),
            Pass("teacher", "forward", 1, 2 if c.guided else 1),
            Pass("critic", "train", c.critic_steps),
            Pass("student", "forward", before + c.critic_steps * mean),
        ]


TRAINER = RCMTrainer
