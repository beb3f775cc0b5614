"""Phased DMD: distribution matching in phases of noise level, one expert a phase.

The levels l_0 > l_1 > ... > l_K = 0 cut the noise axis, l_0 where the student's grid begins.
Expert k maps samples at l_(k-1) to samples at l_k in a few Euler steps and matches their
distribution at the noisier levels above l_k, where both they and the data can be noised further.
The fake score of such intermediate samples learns from an unbiased target
(:class:`stepdistill.losses.distribution.Renoise`) and starts anew from the teacher in every phase.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser, Experts
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.sampler import full, move
from stepdistill.diffusion.timesteps import Grid
from stepdistill.losses.distribution import dmd_direction
from stepdistill.losses.regression import pull
from stepdistill.run.errors import UserError
from stepdistill.run.player import Player
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.score.engine import Sample, ScoreConfig, ScoreTrainer

MOST_PHASES = 4  # an exported pipeline holds as many networks


def _falling(levels: tuple[float, ...]) -> tuple[float, ...]:
    falling = all(a > b for a, b in zip(levels, levels[1:], strict=False))
    if not falling or levels[-1:] != (0,):
        raise PydanticCustomError("order", "must fall from pure noise to 0")
    if not 1 < len(levels) <= MOST_PHASES + 1:
        raise PydanticCustomError("count", f"must bound 1 to {MOST_PHASES} phases")
    return levels


Levels = Annotated[tuple[float, ...], AfterValidator(_falling)]


class PhasedDMDConfig(ScoreConfig):
    """Settings of ``phased_dmd``."""

    levels: Levels = Field((1.0, 0.6, 0.0), description="bounds of the phases, from noise to clean")
    phase_steps: int = Field(2, ge=1, description="Euler steps inside a phase")
    critic_rollout: bool = Field(
        True, description="train the fake score on whole rollouts, not on the truncated ones"
    )


class PhasedDMDTrainer(ScoreTrainer):
    """Phased DMD (spec 5.5); with one phase of one step it is ``dmd`` bit for bit."""

    Config = PhasedDMDConfig
    config: PhasedDMDConfig
    phase = 0
    proofs: ClassVar = {
        "two phases": Proof(("gaussian", "gmm2d", "classes"), {"phase_steps": 1}, effort=1.5),
        "three phases": Proof(
            ("gaussian",), {"levels": (1.0, 0.7, 0.35, 0.0), "phase_steps": 2}, effort=2.0
        ),
    }

    @property
    def fixed_point(self) -> FixedPoint:
        """The data's law, and that of the noised data at every border of the phases."""
        return FixedPoint("law", levels=self.config.levels[1:-1])

    def setup(self) -> None:
        """The first expert and its fake score.

        Raises:
            UserError: levels that do not begin at the start, or a phase without a step.
        """
        super().setup()
        levels = self.config.levels
        if abs(levels[0] / self.top - 1) > 1e-6:
            where = "pure noise" if self.start == 1 else f"where students start={self.start:g}"
            raise UserError(
                f"levels={list(levels)} must fall from {self.top:.7g}, {where}, to 0; write "
                f"{self.top:.7g} first"
            )
        self.count = len(levels) - 1
        self.phase_length = -(-self.config.steps // self.count)
        if self.phase_length * (self.count - 1) >= self.config.steps:
            raise UserError(
                f"steps={self.config.steps} leaves one of {self.count} phases without a step; "
                "give more steps, or fewer levels"
            )
        for player in self.players.values():
            player.total = player.total // self.config.steps * self.phase_length

    @property
    def active(self) -> str:
        """The expert of the present phase."""
        return expert_name(self.phase)

    def prepare(self, step: int) -> None:
        """See :meth:`Trainer.prepare`: enter the phase of ``step``."""
        while self.phase < min(step // self.phase_length, self.count - 1):
            self._next_phase()

    def _next_phase(self) -> None:
        """Freeze the expert at its averaged weights; a new one and the fake score start over."""
        self.players[self.active].retire()
        self.phase += 1
        self.add_player(
            self.active, self.initial, self.config.optim, ema=True, total=self.phase_length
        )
        critic = self.players["critic"]
        critic.load_weights(self.initial)
        critic.reset_optimizer()

    def sub_grid(self, phase: int, steps: int) -> Grid:
        """Times inside a phase, its end included."""
        top, bottom = self.config.levels[phase], self.config.levels[phase + 1]
        return tuple(top + (bottom - top) * i / steps for i in range(steps)) + (bottom,)

    def grids(self) -> dict[int, Grid]:
        """All steps of all phases."""
        steps = self.config.phase_steps
        parts = [self.sub_grid(k, steps)[:-1] for k in range(self.count)]
        return {steps * self.count: (*(t for part in parts for t in part), 0.0)}

    def students(self) -> list[Player]:
        """See :meth:`Trainer.students`: one a phase so far."""
        return [self.players[expert_name(k)] for k in range(self.phase + 1)]

    def best(self) -> Denoiser | Experts:
        """All experts; levels whose phase is still to come are the teacher's."""
        made: list[Denoiser] = [player.best for player in self.students()]
        made += [self.teacher] * (self.count - len(made))
        return Experts(made, self.config.levels[1:-1])

    def walk(self, den: Denoiser, x: Tensor, times: Grid, batch: Batch) -> Tensor:
        """Euler steps along ``times``."""
        for t, r in zip(times, times[1:], strict=False):
            x = move(den(x, full(x, t), batch.cond), self.process, full(x, r))
        return x

    def generate(self, batch: Batch, rng: Rng, *, exact: bool) -> Sample:
        """The phases before without a graph, then this one up to an exit, drawn unless exact."""
        c = self.config
        z = self.z(batch, rng)
        x = expand(self.process.coefs(full(z, c.levels[0])).sigma, z) * z
        times = self.sub_grid(self.phase, c.phase_steps)
        last = c.phase_steps - 1
        exit_at = last if exact else rng.integer("exit", c.phase_steps)
        student = self.denoiser(self.active)
        with torch.no_grad():
            for k in range(self.phase):
                expert = self.denoiser(expert_name(k))
                x = self.walk(expert, x, self.sub_grid(k, c.phase_steps), batch)
            x = self.walk(student, x, times[: exit_at + 1], batch)
        pred = student(x, full(x, times[exit_at]), batch.cond)
        level = times[-1]
        x_s = pred.x if level == 0 else move(pred, self.process, full(x, level))
        return Sample(x_s, level, pred.x)

    def hand_over(self, made: Sample) -> Sample | None:
        """None where the fake score trains on whole rollouts."""
        whole = self.config.critic_rollout and self.config.phase_steps > 1
        return None if whole else super().hand_over(made)

    def compare(self, made: Sample, batch: Batch, rng: Rng) -> Loss:
        """Pull the sample along the gap, at levels above its own."""
        t = self.times(self.config.student_t, made.level, batch, rng)
        x_s, e = made.x.detach(), self.z(batch, rng, "e")
        x_t = self.kernel(x_s, made.level, t).state(x_s, e)
        with torch.no_grad():
            fake = self.denoiser("critic")(x_t, t, batch.cond).x
            real = guided(self.teacher, x_t, t, batch.cond, self.config.guidance).x
        loss = pull(made.x, dmd_direction(fake, real, made.reference.detach())).mean()
        logs = {"gap": (fake - real).abs().mean(), "direction": loss}
        return Loss(loss, logs | self.vitals(made, fake, real, t, e))

    def held(self) -> dict[str, int]:
        """See :meth:`Trainer.held`; the experts of earlier phases are frozen."""
        return super().held() | ({"student": 1, "expert": self.phase} if self.phase else {})

    def passes(self) -> list[Pass]:
        """Those of the engine, and the walks through this phase and those before."""
        c = self.config
        before = self.phase * c.phase_steps
        rollout = before + (c.phase_steps - 1) / 2
        whole = c.critic_rollout and c.phase_steps > 1
        fresh = c.critic_steps - (0 if whole else 1)
        walks = rollout + fresh * (before + c.phase_steps)
        own = [p for p in super().passes() if (p.role, p.kind) != ("student", "forward")]
        return own + ([Pass("student", "forward", walks)] if walks else [])


def expert_name(phase: int) -> str:
    """Player name of a phase's expert: student, student_2, ..."""
    return "student" if phase == 0 else f"student_{phase + 1}"


TRAINER = PhasedDMDTrainer
