"""What the score-distillation methods share: a student, a fake score, and how they take turns.

The student's turn comes first; the fake score's first turn trains on the very samples that it
made (as DMD2 does), any further ones on fresh samples. A discriminator, where there is one, reads
features of passes that are made anyway and trains in the fake score's turns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser, Prediction
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.heads import HEADS
from stepdistill.diffusion.sampler import full
from stepdistill.diffusion.timesteps import Density, LogitNormal, Uniform, raised
from stepdistill.losses.distribution import Renoise
from stepdistill.losses.guides import Guide, Teacher
from stepdistill.losses.terms import Term, added, largest
from stepdistill.run.errors import UserError
from stepdistill.run.player import Beta, OptimConfig
from stepdistill.run.plug import Plugged
from stepdistill.run.ratios import gap_parts, sample_parts
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Trainer, Turn
from stepdistill.trainers.score.adversary import Adversary, AdversaryConfig
from stepdistill.trainers.settings import TrainConfig

NULL_SHARE = 0.1  # of the labels that a guided fake score trains without, where none is given


class CriticOptim(OptimConfig):
    """The fake score's optimizer: quick, and without momentum, as what it follows moves."""

    lr: float = Field(4e-4, gt=0, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.0, 0.999), description="AdamW's betas")


class ScoreConfig(TrainConfig):
    """Settings of the score-distillation family."""

    critic: CriticOptim = Field(
        default_factory=CriticOptim, description="the fake score's optimizer"
    )
    critic_steps: int = Field(1, ge=1, description="fake-score updates a student update")
    critic_first: int = Field(
        0, ge=0, description="steps at the start in which the fake score trains alone"
    )
    critic_follows: float = Field(
        0.0, ge=0, lt=1, description="share by which it moves to the student's weights each step"
    )
    student_t: Density = Field(
        default_factory=lambda: Uniform(low=0.02, high=0.98),
        description="times at which student and teacher are compared",
    )
    critic_t: Density = Field(
        default_factory=LogitNormal, description="times at which the fake score trains"
    )
    critic_weight: Literal["ratio", "clamp", "none"] = Field(
        "ratio", description="weight of the fake score's loss near the sample's own level"
    )
    critic_drop: float | None = Field(
        None, ge=0, lt=1, description="share of labels it trains without; null: 0.1 if guided"
    )
    guide: Plugged[Guide] = Field(
        default_factory=Teacher, description="how teacher and fake score are guided"
    )
    recompute: bool = Field(
        False,
        description="make the student's sample twice, first without a graph: one more forward, "
        "and never two networks' activations at a time",
    )
    adversary: AdversaryConfig | None = Field(
        None, description="an adversarial head beside the scores, which needs data; null: none"
    )
    terms: tuple[Plugged[Term], ...] = Field(
        (), description="what is added to the student's loss on its clean samples, such as a reward"
    )

    @property
    def guided(self) -> bool:
        """See :attr:`TrainConfig.guided`."""
        return bool(self.guide.on(self.guidance))

    @property
    def guides_law(self) -> bool:
        """See :attr:`TrainConfig.guides_law`; not where teacher and fake score are guided alike."""
        return self.guided and self.guide.leads

    @property
    def guides_fake(self) -> bool:
        """Whether the fake score is guided, asked or trained, and so must know "no class"."""
        return bool(self.guide.on_fake(self.guidance) or self.guide.trained() != 1)


@dataclass(frozen=True)
class Sample:
    """A student's sample.

    Args:
        x: the sample [B, C, *S], at noise level ``level``.
        level: time of the sample; 0 is clean.
        reference: the clean estimate that it came from, for normalisers.
        known: whether its law is the one that fake score and head are trained on.
    """

    x: Tensor
    level: float
    reference: Tensor
    known: bool = True


@dataclass(frozen=True)
class Asked:
    """What fake score and teacher say of the noised sample.

    Args:
        fake: the fake score's estimates, guided if it is.
        real: the teacher's.
        features: what the discriminator reads, part of the graph; empty if there is none.
    """

    fake: Prediction
    real: Prediction
    features: Sequence[Tensor]


class ScoreTrainer(Trainer):
    """Student and fake score in turns; a method adds ``generate`` and ``compare``."""

    config: ScoreConfig
    shared: Sample | None = None
    adversary: Adversary | None = None
    opposed = True  # where there is an adversary: whether it takes part at present
    moved = False  # whether the student has a turn in this step, and the fake score none since

    def setup(self) -> None:
        """Student and fake score both start as the teacher.

        Raises:
            UserError: settings that contradict each other, or would have no effect.
        """
        c = self.config
        self._check()
        self.group = largest(c.terms)
        total = self.length - c.critic_first
        self.add_player("student", self.initial, c.optim, ema=True, total=total)
        if c.adversary is not None:
            self.needs = "data"
            self.adversary = Adversary(c.adversary, self.teacher, self.initial, c.seed)
        self.add_player(
            "critic",
            self.initial,
            c.critic,
            ema=False,
            total=self.length * c.critic_steps,
            extra=self.adversary.net if self.adversary else None,
            pace=c.adversary.pace if c.adversary else 1.0,
        )

    def _check(self) -> None:
        c, null = self.config, self.teacher.null_label
        if c.guides_fake and null is None:
            raise UserError(
                f"guide: {c.guide.kind} guides the fake score, and the teacher has no label that "
                "means 'no class'; set guide=teacher"
            )
        if c.guide.own_scale and c.guidance != 1:
            raise UserError(
                f"guidance={c.guidance:g}: guide={c.guide.kind} has scales of its own; set "
                "guidance=1, or another guide"
            )
        if c.critic_drop and null is None:
            raise UserError(
                f"critic_drop={c.critic_drop:g}: the teacher has no label that means 'no class'; "
                "set critic_drop=null"
            )
        if c.critic_first >= self.length:
            raise UserError(
                f"critic_first={c.critic_first} leaves the student none of {self.length} steps; "
                "lower it"
            )
        if c.adversary is not None and c.adversary.from_step >= c.steps:
            raise UserError(
                f"adversary.from_step={c.adversary.from_step}: the head would take part in none "
                f"of steps={c.steps}; lower it, or set adversary=null"
            )

    def turns(self, step: int) -> list[Turn]:
        """The student once, then the fake score ``critic_steps`` times."""
        c = self.config
        self.opposed = self.adversary is None or step >= self.adversary.config.from_step
        self.moved = step % self.length >= c.critic_first
        critic = [Turn(self.fake, self.critic_loss)] * c.critic_steps
        return ([Turn(self.active, self.student_loss)] if self.moved else []) + critic

    @property
    def length(self) -> int:
        """Steps from the start of a fake score to its end."""
        return self.config.steps

    @property
    def active(self) -> str:
        """Name of the player that is the student at present."""
        return "student"

    @property
    def fake(self) -> str:
        """Name of the player that is the fake score at present."""
        return "critic"

    @property
    def target(self) -> Denoiser:
        """What the student is compared with: the teacher, or a score that is asked as the fake."""
        return self.teacher

    @abstractmethod
    def generate(self, batch: Batch, rng: Rng, *, exact: bool) -> Sample:
        """A sample of the student; ``exact`` asks for the one that inference would make."""

    @abstractmethod
    def compare(self, made: Sample, batch: Batch, rng: Rng) -> Loss:
        """The student's loss on its sample."""

    # The student's turn -----------------------------------------------------------------------

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        """Generate with a graph, compare, and leave the sample for the fake score."""
        if self.config.recompute:
            return self.recomputed(batch, rng)
        made = self.generate(batch, rng, exact=False)
        self.shared = self.hand_over(made)
        return self.with_terms(self.compare(made, batch, rng), made, batch)

    def recomputed(self, batch: Batch, rng: Rng) -> Loss:
        """The same loss in two stages: its gradient in the sample, then the sample once more."""
        with torch.no_grad():
            seen = self.generate(batch, rng, exact=False)
        self.shared = self.hand_over(seen)
        leaf = seen.x.detach().requires_grad_()
        made = replace(seen, x=leaf)
        loss = self.with_terms(self.compare(made, batch, rng), made, batch)
        (push,) = torch.autograd.grad(loss.value, leaf)
        made = self.generate(batch, rng, exact=False)
        return Loss((made.x * push).sum(), loss.logs)

    def with_terms(self, loss: Loss, made: Sample, batch: Batch) -> Loss:
        """A comparison's loss, and the config's terms on the clean sample."""
        x = made.reference if made.level else made.x
        value, logs = added(self.config.terms, x, batch.cond.label)
        return Loss(loss.value + value, loss.logs | logs) if logs else loss

    @property
    def whole(self) -> bool:
        """Whether the fake score trains on samples as inference makes them, and not at exits."""
        return False

    def hand_over(self, made: Sample) -> Sample | None:
        """The student's sample as the fake score may train on it, or None to make another."""
        if self.whole:
            return None
        return replace(made, x=made.x.detach(), reference=made.reference.detach())

    def ask(self, x_t: Tensor, t: Tensor, batch: Batch, rng: Rng, *, graph: bool) -> Asked:
        """Ask fake score and teacher about x_t [B, ...] at times t [B], each in one pass.

        With ``graph``, gradients flow through both to x_t; without, through the discriminator's
        features alone.
        """
        c, cond = self.config, batch.cond
        real, fake = c.guide.scales(c.guidance, lambda: rng.uniform("guide", batch.index))
        if self.target is not self.teacher:
            real = fake
        own, theirs = self.taps()
        found = []
        for den, scale, taps in (
            (self.denoiser(self.fake), fake, own),
            (self.target, real, theirs),
        ):
            with nullcontext() if graph or taps else torch.no_grad():
                tail: Literal["whole", "frozen"] = "whole" if graph else "frozen"
                found.append(guided(den, x_t, t, cond, scale, taps=taps, tail=tail))
        features: Sequence[Tensor] = ()
        if self.adversary and self.opposed:
            features = self.adversary.read(x_t, t, *(pred.features for pred in found))
        return Asked(found[0], found[1], features)

    def taps(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Modules of fake score and teacher that the discriminator reads at present."""
        return self.adversary.taps() if self.adversary and self.opposed else ((), ())

    # The fake score's turn --------------------------------------------------------------------

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        """Denoising score matching on the student's samples."""
        c, made, self.shared = self.config, self.shared, None
        critic = self.denoiser(self.fake)
        if self.moved and c.critic_follows:
            self.players[self.fake].follow(self.players[self.active], c.critic_follows)
        self.moved = False
        if made is None:
            with torch.no_grad():
                made = self.generate(batch, rng, exact=self.whole)
        t = self.times(c.critic_t, made.level, batch, rng)
        kernel = self.kernel(made.x, made.level, t)
        e = self.z(batch, rng, "critic-e")
        x_t, cond = kernel.state(made.x, e), self.dropped(batch, rng)
        pred = guided(critic, x_t, t, cond, c.guide.trained(), taps=self.taps()[0])
        target = kernel.target(critic.head, made.x, e, self.process.sigma_data)
        error = kernel.weight(c.critic_weight) * (pred.h - target) ** 2
        loss = error.mean()
        logs = {"loss": loss}
        if self.adversary and self.opposed:
            told = replace(batch, cond=cond)
            against = self.adversary.discriminate(x_t, e, t, pred.features, critic, told, rng)
            logs["discriminator"] = against
            loss = loss + self.adversary.config.critic * against
        return Loss(loss, logs)

    def dropped(self, batch: Batch, rng: Rng) -> Cond:
        """The batch's condition, with a share of the labels turned to "no class"."""
        c, null = self.config, self.teacher.null_label
        drop = (NULL_SHARE if c.guides_fake else 0.0) if c.critic_drop is None else c.critic_drop
        if not drop or null is None:
            return batch.cond
        lost = rng.uniform("drop", batch.index) < drop
        return batch.cond.map(lambda label: label.masked_fill(lost, null))

    # Shared pieces ----------------------------------------------------------------------------

    def vitals(
        self, made: Sample, fake: Tensor, real: Tensor, t: Tensor, e: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What tells whether the run is well, from the estimates that a comparison has anyway.

        Args:
            made: the student's sample.
            fake: the fake score's clean estimate at times t, of the sample noised by e.
            real: the teacher's.
            t: times [B].
            e: the noise; a clean sample needs none.
        """
        x, weight = made.x.detach(), None
        if made.level > 0 and e is not None:
            kernel = self.kernel(x, made.level, t)
            x, weight = kernel.target(HEADS["x0"], x, e), kernel.weight("ratio")
        return gap_parts(fake, real, x, made.reference, weight) | sample_parts(made.reference)

    def times(self, density: Density, level: float, batch: Batch, rng: Rng) -> Tensor:
        """Times [B] from a density, moved into the range from the sample's level to the top."""
        return self.placed(density, rng.uniform("t", batch.index), level)

    def placed(self, density: Density, u: Tensor, level: float) -> Tensor:
        """See :meth:`times`, from uniforms u [B]."""
        t = self.drawn(density, u)
        return raised(t, level, self.top, self.process) if level else t

    def kernel(self, x: Tensor, level: float, t: Tensor) -> Renoise:
        """The way from a sample's level up to times t [B]."""
        at_s = self.process.coefs(full(x, level)).expand(x)
        return Renoise(at_s, self.process.coefs(t).expand(x))

    # Cost -------------------------------------------------------------------------------------

    @property
    def rollout(self) -> tuple[float, float]:
        """Forwards before a sample's pass with a graph; those of one for the fake score alone."""
        return 0.0, 1.0

    def passes(self) -> list[Pass]:
        """Those of steps in which the student has a turn: sample, comparison, and fake score."""
        c = self.config
        fakes = 2 if c.guide.on_fake(c.guidance) else 1
        trained = 1 if c.guide.trained() == 1 else 2
        asked = [
            Pass("critic", "forward", 1, fakes),
            Pass("teacher", "forward", 1, 2 if c.guided else 1),
        ]
        walk, fresh = self.rollout
        forwards = walk + (walk + 1 if c.recompute else 0)
        forwards += (c.critic_steps - (0 if self.whole else 1)) * fresh
        more = [Pass("student", "forward", forwards)] if forwards else []
        more = [Pass("critic", "train", c.critic_steps, trained), *more]
        if self.adversary and self.opposed:
            asked, own = self.adversary.passes(asked, c.critic_steps)
            more += own
        return [Pass("student", "train"), *asked, *more]
