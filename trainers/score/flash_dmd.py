"""Flash-DMD: distribution matching where steps are noisy, a discriminator on pictures where not.

Exits of the student's grid at high noise match distributions; those at low noise are held to the
data by a discriminator on pictures, from a finished walk noised again. A preference stage may
join in: of several continuations of one noisy state, the better by a reward becomes likelier.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.sampler import full
from stepdistill.losses.adversarial import AdversarialLoss, NonSaturating
from stepdistill.losses.preference import preference_loss
from stepdistill.losses.reward import Reward, rewards
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plugged
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Turn
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.engine import Sample
from stepdistill.trainers.score.matching import Matching, MatchingConfig
from stepdistill.trainers.score.opponent import DiscriminatorOptim, PictureConfig, PictureOpponent
from stepdistill.trainers.score.rollout import GridConfig, GridTrainer
from stepdistill.trainers.settings import Section


class PreferenceConfig(Section):
    """Preferences among the continuations of a noisy state."""

    reward: Plugged[Reward] = Field(description="what says which clean estimate is better")
    candidates: int = Field(4, ge=2, description="continuations of one state")
    beta: float = Field(1.0, gt=0, description="how sharply a preference counts")
    weight: float = Field(1.0, gt=0, description="weight of its loss")
    updates: int = Field(5, ge=1, description="updates of the student by preferences a step")
    from_step: int = Field(0, ge=0, description="step from which they take part")


class FlashOpponent(PictureConfig):
    """The discriminator of ``flash_dmd``."""

    loss: Plugged[AdversarialLoss] = Field(
        default_factory=NonSaturating,
        description="what its logits cost both sides, added over the heads",
    )


class FlashDMDConfig(GridConfig, MatchingConfig):
    """Settings of ``flash_dmd``."""

    student_steps: int = Field(4, ge=2, description="steps of the student's grid")
    matched_steps: int = Field(
        2, ge=1, description="of these, the noisiest, whose exits match distributions"
    )
    adversarial_every: int = Field(
        2, ge=2, description="one student update in so many is adversarial, the others match"
    )
    critic_follows: float = Field(
        0.03, ge=0, lt=1, description="share by which the fake score moves to the student's weights"
    )
    critic_rollout: Literal[False] = Field(
        False, description="always false: the fake score learns the samples of matched exits"
    )
    adversary: None = Field(None, description="always null: the fake score carries no head")
    opponent: FlashOpponent = Field(
        default_factory=FlashOpponent, description="the discriminator on pictures"
    )
    discriminator: DiscriminatorOptim = Field(
        default_factory=DiscriminatorOptim, description="the discriminator's optimizer"
    )
    preference: PreferenceConfig | None = Field(
        None, description="preferences by a reward beside the rest; null: none"
    )


class FlashDMDTrainer(Matching, GridTrainer):
    """Flash-DMD, spec 5.14, as a third party's notes describe it; no code of it was read.

    Here: matching and adversarial updates alternate in a fixed order, the fake score learns the
    samples of matched exits alone, the fake score's share, beta and the number of candidates are
    ours, rewards read clean estimates, and the student's own average is the preferences'
    reference; heads read any frozen features of pictures, where the notes have SAM's.
    ``recompute`` is for matching updates; the others hold one network's graph anyway.
    """

    Config = FlashDMDConfig
    config: FlashDMDConfig
    clips = True
    needs = "data"
    low = False  # whether the present step's student update is adversarial
    made: Tensor | None = None
    proofs: ClassVar = {
        "two steps": Proof(
            ("gaussian",),
            {
                "student_steps": 2,
                "matched_steps": 1,
                "noise": "fresh",
                "critic_follows": 0.0,
                "opponent": {"features": "pixels", "head": "quadratic", "r1": 10.0},
            },
        ),
    }

    @property
    def exits(self) -> int:
        """See :attr:`GridTrainer.exits`: of the fake score and what it is compared on."""
        return self.config.matched_steps

    def setup(self) -> None:
        """Student, fake score and a discriminator.

        Raises:
            UserError: no step is left to the discriminator or to preferences, or these have no
                fresh noise.
        """
        c = self.config
        if c.matched_steps >= c.student_steps:
            raise UserError(
                f"matched_steps={c.matched_steps} leaves none of student_steps={c.student_steps} "
                "to the discriminator; lower it"
            )
        if c.preference is not None and c.noise != "fresh":
            raise UserError("preference: steps without fresh noise lead to one state; noise=fresh")
        super().setup()
        if c.preference is not None:
            left = c.steps - max(c.preference.from_step, c.critic_first)
            if left <= 0:
                raise UserError(
                    f"preference.from_step={c.preference.from_step}: preferences would take part "
                    f"in none of steps={c.steps}; lower it, or set preference=null"
                )
            self.players["student"].total += c.preference.updates * left
        self.opponent = PictureOpponent(c.opponent, self.teacher, c.seed)
        heads, base = self.opponent.net, self.teacher
        self.add_player(
            "discriminator",
            base,
            c.discriminator,
            ema=False,
            total=c.steps,
            extra=heads,
            frozen=True,
        )

    def turns(self, step: int) -> list[Turn]:
        """As the engine's, then preferences, then the discriminator."""
        wanted, self.made = self.config.preference, None
        self.low = step % self.config.adversarial_every == 1
        turns = [*super().turns(step)]
        if wanted is not None and self.moved and step >= wanted.from_step:
            turns += [Turn("student", self.preference_loss)] * wanted.updates
        return [*turns, Turn("discriminator", self.discriminator_loss)]

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        """Match distributions at a noisy exit, or face the discriminator at another."""
        if not self.low:
            return super().student_loss(batch, rng)
        x = self.refined(batch, rng)
        self.made, self.shared = x.detach(), None
        loss = self.opponent.against(x, batch, rng).mean()
        made = Sample(x, 0.0, x)
        return self.with_terms(Loss(loss, {"adversarial": loss}), made, batch)

    def refined(self, batch: Batch, rng: Rng) -> Tensor:
        """Clean samples predicted at a low exit from a whole walk, noised again to its level.

        The walk has no graph.
        """
        c, student = self.config, self.denoiser("student")
        (grid,) = self.grids().values()
        place = c.matched_steps + rng.integer("low", c.student_steps - c.matched_steps)
        with torch.no_grad():
            x = self.walk(batch, rng, None)
            t = full(x, grid[place])
            x_t = self.process.noise(x, self.z(batch, rng, "again"), t)
        return self.shown(student(x_t, t, batch.cond).x)

    def discriminator_loss(self, batch: Batch, rng: Rng) -> Loss:
        """Tell samples of low exits from the data: the student's own, or fresh ones."""
        made = self.made
        if made is None:
            with torch.no_grad():
                made = self.refined(batch, rng)
        parts = self.opponent.loss(made, batch, rng)
        return Loss(parts["loss"], parts)

    def preference_loss(self, batch: Batch, rng: Rng) -> Loss:
        """The better of several continuations of a noisy state against the worst."""
        c = self.config.preference
        assert c is not None
        student, (grid,) = self.players["student"], self.grids().values()
        place = rng.integer("exit", self.config.matched_steps)
        with torch.no_grad():
            x_t = self.walk(batch, rng, place)
        t, after = full(x_t, grid[place]), full(x_t, grid[place + 1])
        to = self.process.coefs(after)
        k = to.expand(x_t)
        mean = k.alpha * self.shown(student.denoiser(x_t, t, batch.cond).x)
        with torch.no_grad():
            reference = k.alpha * self.shown(student.best(x_t, t, batch.cond).x)
            ends, liked = [], []
            for i in range(c.candidates):
                ends.append(mean + k.sigma * self.z(batch, rng, f"candidate-{i}"))
                clean = self.shown(student.denoiser(ends[-1], after, batch.cond).x)
                liked.append(rewards(c.reward, clean, batch.cond.label))
            found, every = torch.stack(liked), torch.arange(len(x_t), device=x_t.device)
            states = torch.stack(ends)
            best, worst = (states[i, every] for i in (found.argmax(0), found.argmin(0)))
        loss = preference_loss(best, worst, mean, reference, to.sigma, c.beta).mean()
        return Loss(c.weight * loss, {"preference": loss, "reward": found.mean()})

    def passes(self) -> list[Pass]:
        """Those of the engine in matching updates, and the walks and steps of the others."""
        c = self.config
        low = 1 / c.adversarial_every
        asked = ("teacher", "forward"), ("critic", "forward")
        own = [
            replace(item, count=item.count * (1 - low)) if (item.role, item.kind) in asked else item
            for item in super().passes()
            if (item.role, item.kind) != ("student", "forward")
        ]
        exit_at, steps = (c.matched_steps - 1) / 2, c.student_steps
        matching = exit_at + (c.critic_steps - 1 + c.recompute) * (exit_at + 1) + steps + 1
        walks = (1 - low) * matching + low * (steps + c.critic_steps * (exit_at + 1))
        if c.preference is not None:
            n = c.preference.updates
            own += [Pass("student", "train", n), Pass("average", "forward", n)]
            walks += n * (exit_at + c.preference.candidates)
        return [*own, Pass("student", "forward", walks)]


TRAINER = FlashDMDTrainer
