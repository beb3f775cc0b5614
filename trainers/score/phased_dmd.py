"""Phased DMD: distribution matching in phases of noise level, one expert a phase.

The levels l_0 > l_1 > ... > l_K = 0 cut the noise axis, l_0 where the student's grid begins.
Expert k maps samples at l_(k-1) to samples at l_k in a few Euler steps and matches their
distribution at the noisier levels above l_k, where both they and the data can be noised further.
The fake score of such intermediate samples learns from an unbiased target
(:class:`stepdistill.losses.distribution.Renoise`) and starts anew from the teacher in every phase.

A teacher may be a mixture of two experts itself, split at a border of the phases. Then student and
fake score of a phase begin as the expert that owns the phase's levels, and each comparison draws
its times on one side of the border, by the share that the side has of all times, and asks the
expert that owns them. Here: the fake score of the cleaner phases is one network for all times above
its level, and the noisier side's are new to it. LightX2V's training of both regions at once, its
diversity loss and its term on real data are left out.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from torch import Tensor

from stepdistill.adapters.recompute import can_recompute
from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser, Experts
from stepdistill.diffusion.sampler import first_state, full, move
from stepdistill.diffusion.split import Split
from stepdistill.diffusion.timesteps import Density, Grid, grid_between, share_below
from stepdistill.run.assets import load_teacher
from stepdistill.run.errors import UserError
from stepdistill.run.player import Player
from stepdistill.run.rng import Rng
from stepdistill.run.xformers import enable_xformers
from stepdistill.trainers.base import Loss
from stepdistill.trainers.beginning import recomputed
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.score.adversary import Adversary
from stepdistill.trainers.score.engine import Sample
from stepdistill.trainers.score.matching import Matching, MatchingConfig

MOST_PHASES = 4  # an exported pipeline holds as many networks
WHOLE = (0.0, 1.0)  # of a density's uniform numbers


def _falling(levels: tuple[float, ...]) -> tuple[float, ...]:
    falling = all(a > b for a, b in zip(levels, levels[1:], strict=False))
    if not falling or levels[-1:] != (0,):
        raise PydanticCustomError("order", "must fall from pure noise to 0")
    if not 1 < len(levels) <= MOST_PHASES + 1:
        raise PydanticCustomError("count", f"must bound 1 to {MOST_PHASES} phases")
    return levels


Levels = Annotated[tuple[float, ...], AfterValidator(_falling)]


class PhasedDMDConfig(MatchingConfig):
    """Settings of ``phased_dmd``."""

    levels: Levels = Field((1.0, 0.6, 0.0), description="bounds of the phases, from noise to clean")
    phase_steps: int = Field(2, ge=1, description="Euler steps inside a phase")
    critic_rollout: bool = Field(
        True, description="train the fake score on whole rollouts, not on the truncated ones"
    )
    margin: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the times above a phase's lower level, where it is not clean, that "
        "student and fake score keep off it; beside critic_weight, against targets of noise alone",
    )
    teacher_low: str | None = Field(
        None,
        description="the teacher of the levels up to teacher_boundary, where it is another "
        "network; named as teacher is",
    )
    teacher_boundary: float | None = Field(
        None, gt=0, description="the level above which teacher is asked; a border of the phases"
    )


class PhasedDMDTrainer(Matching):
    """Phased DMD (spec 5.5); with one phase of one step it is ``dmd`` bit for bit.

    Here: one fake-score update a student's unless ``critic_steps`` says more, where the paper has
    five; a head, which it has none of, goes on from phase to phase.
    """

    Config = PhasedDMDConfig
    config: PhasedDMDConfig
    phase = 0
    part = WHOLE
    proofs: ClassVar = {
        "two phases": Proof(("gaussian", "gmm2d", "classes"), {"phase_steps": 1}, effort=1.5),
        "three phases": Proof(
            ("gaussian",), {"levels": (1.0, 0.7, 0.35, 0.0), "phase_steps": 1}, effort=1.5
        ),
    }

    @property
    def fixed_point(self) -> FixedPoint:
        """The data's law, and that of the noised data at every border of the phases."""
        leads = self.config.guide.leads
        return FixedPoint("law", levels=self.config.levels[1:-1], guided=leads)

    def setup(self) -> None:
        """The first expert and its fake score.

        Raises:
            UserError: levels that do not begin at the start, a phase without a step, or a second
                teacher that does not fit.
        """
        self.lower: dict[float, float] = {}
        self._split_teacher()
        super().setup()
        levels = self.config.levels
        if abs(levels[0] / self.top - 1) > 1e-6:
            where = "pure noise" if self.start == 1 else f"where students start={self.start:g}"
            raise UserError(
                f"levels={list(levels)} must fall from {self.top:.7g}, {where}, to 0; write "
                f"{self.top:.7g} first"
            )
        if self.count > 1 and self.config.critic_weight == "none" and not self.config.margin:
            raise UserError(
                "critic_weight=none: the fake score's targets near a phase's level are noise "
                "alone; set a margin, such as 0.02, or critic_weight=ratio"
            )
        if self.adversary and isinstance(self.teacher, Split):
            low = Adversary(self.adversary.config, self.teacher, self.teacher.part(1), 0)
            read = ((a.names, [w.shape for w in a.net.parameters()]) for a in (low, self.adversary))
            if next(read) != next(read):
                raise UserError(
                    "adversary: teacher_low has features at other modules or of other widths than "
                    "the teacher, and one head reads both; set adversary=null"
                )
        least = self.config.steps - self.length * (self.count - 1)  # steps of the last phase
        if least <= self.config.critic_first:
            raise UserError(
                f"steps={self.config.steps} leaves one of {self.count} phases without a step of "
                "the student; give more steps, fewer levels, or a smaller critic_first"
            )

    def _split_teacher(self) -> None:
        """Join the teacher and ``teacher_low``, if there is one, to one that knows both's levels.

        Raises:
            UserError: one of its keys alone, no such teacher, or one that does not fit.
        """
        c = self.config
        if (c.teacher_low is None) != (c.teacher_boundary is None):
            raise UserError("teacher_low and teacher_boundary go together; set both, or neither")
        if c.teacher_low is None or c.teacher_boundary is None:
            return
        if all(abs(level - c.teacher_boundary) > 1e-6 for level in c.levels[1:-1]):
            raise UserError(
                f"levels={list(c.levels)} has no border at teacher_boundary={c.teacher_boundary:g}:"
                " a phase on both sides would have two experts to begin as; put it among the levels"
            )
        if c.adversary is not None and c.adversary.features == "teacher":
            raise UserError(
                "adversary.features: with teacher_low the teacher has two networks to read; set "
                "adversary.features=critic"
            )
        low = load_teacher(c.teacher_low, self.device, key="teacher_low")
        low.read(self.teacher.prompts)
        low.requires_grad_(False)
        if c.gradient_checkpointing and can_recompute(low.net):
            recomputed(low)
        if c.xformers:
            enable_xformers(low.net, self.device)
        try:
            self.teacher = Split(self.teacher, low, c.teacher_boundary)
        except ValueError as error:
            raise UserError(f"teacher_low={c.teacher_low}: {error}") from error

    def owner(self, phase: int) -> Denoiser:
        """What the players of a phase begin as: the teacher, or its expert for their levels."""
        first = self.initial
        if isinstance(self.teacher, Split) and self.config.levels[phase] <= self.teacher.boundary:
            first = self.teacher.part(1)
        return first

    @property
    def count(self) -> int:
        """How many phases there are."""
        return len(self.config.levels) - 1

    @property
    def length(self) -> int:
        """See :attr:`ScoreTrainer.length`: steps of a phase; the last may have less."""
        return -(-self.config.steps // self.count)

    @property
    def active(self) -> str:
        """The expert of the present phase."""
        return expert_name(self.phase)

    def prepare(self, step: int) -> None:
        """See :meth:`Trainer.prepare`: enter the phase of ``step``."""
        while self.phase < min(step // self.length, self.count - 1):
            self._next_phase()

    def _next_phase(self) -> None:
        """Freeze the expert at its averaged weights; a new one and the fake score start over."""
        self.players[self.active].retire()
        before, first = self.owner(self.phase), self.owner(self.phase + 1)
        self.phase += 1
        total = self.length - self.config.critic_first
        self.add_player(self.active, first, self.config.optim, ema=True, total=total)
        critic = self.players["critic"]
        if first is before:
            critic.load_weights(first)
            critic.reset_optimizer()
        else:  # another network, perhaps of another kind
            critic.denoiser.drop()
            self.add_player(
                "critic",
                first,
                critic.config,
                ema=False,
                total=critic.total,
                extra=critic.extra,
                pace=critic.pace,
            )

    @cached_property
    def sub_grids(self) -> list[Grid]:
        """Times inside each phase, its end included."""
        levels, steps = self.config.levels, self.config.phase_steps
        ends = zip(levels, levels[1:], strict=False)
        return [grid_between(high, low, steps, self.process) for high, low in ends]

    def grids(self) -> dict[int, Grid]:
        """All steps of all phases."""
        times = [t for part in self.sub_grids for t in part[:-1]]
        return {len(times): (*times, 0.0)}

    def students(self) -> list[Player]:
        """See :meth:`Trainer.students`: one a phase so far."""
        return [self.players[expert_name(k)] for k in range(self.phase + 1)]

    def best(self) -> Denoiser | Experts:
        """All experts; levels whose phase is still to come are the teacher's."""
        made: list[Denoiser] = [player.best for player in self.students()]
        made += [self.teacher.at(level) for level in self.config.levels[len(made) : -1]]
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
        x = first_state(self.process, z, c.levels[0])
        times = self.sub_grids[self.phase]
        last = c.phase_steps - 1
        exit_at = last if exact else rng.integer("exit", c.phase_steps)
        student = self.denoiser(self.active)
        with torch.no_grad():
            for k in range(self.phase):
                expert = self.denoiser(expert_name(k))
                x = self.walk(expert, x, self.sub_grids[k], batch)
            x = self.walk(student, x, times[: exit_at + 1], batch)
        pred = student(x, full(x, times[exit_at]), batch.cond)
        level = times[-1]
        x_s = pred.x if level == 0 else move(pred, self.process, full(x, level))
        return Sample(x_s, level, pred.x)

    def compare(self, made: Sample, batch: Batch, rng: Rng) -> Loss:
        """See :meth:`Matching.compare`; of a split teacher, at times that one expert owns."""
        if not isinstance(self.teacher, Split):
            return super().compare(made, batch, rng)
        share = self.cleaner_share(made.level)
        low = rng.integer("expert", 1 << 24) < share * (1 << 24)  # the same on every process
        self.part = (0.0, share) if low else (share, 1.0)
        try:
            with self.teacher.only(int(low)):
                return super().compare(made, batch, rng)
        finally:
            self.part = WHOLE

    def times(self, density: Density, level: float, batch: Batch, rng: Rng) -> Tensor:
        """See :meth:`ScoreTrainer.times`; within a comparison, times on one side alone."""
        low, high = self.part
        u = low + (high - low) * rng.uniform("t", batch.index)
        t = self.placed(density, u, level)
        if self.part == WHOLE or not isinstance(self.teacher, Split):
            return t
        edge = self.teacher.boundary  # which rounding may not cross
        return t.clamp_max(edge) if low == 0 < high < 1 else t.clamp_min(edge)

    def placed(self, density: Density, u: Tensor, level: float) -> Tensor:
        """Times from uniforms [B], moved into the range from a margin above the level to the top.

        Clean samples need no margin, as their targets do not grow.
        """
        bottom = level + self.config.margin * (self.top - level) if level else 0.0
        return super().placed(density, u, bottom)

    def cleaner_share(self, level: float) -> float:
        """Share of the times of comparison above ``level`` that the cleaner expert owns."""
        assert isinstance(self.teacher, Split)
        if level not in self.lower:
            placed = partial(self.placed, self.config.student_t, level=level)
            self.lower[level] = share_below(placed, self.teacher.boundary)
        return self.lower[level]

    @property
    def whole(self) -> bool:
        """See :attr:`ScoreTrainer.whole`."""
        return self.config.critic_rollout and self.config.phase_steps > 1

    def members(self) -> list[tuple[str, Denoiser]]:
        """See :meth:`Trainer.members`; of a split teacher both parts."""
        own = super().members()
        if not isinstance(self.teacher, Split):
            return own
        parts = [("teacher", self.teacher.part(place)) for place in (0, 1)]
        return parts + [(role, den) for role, den in own if den is not self.teacher]

    @property
    def finished(self) -> list[Denoiser]:
        """See :attr:`Trainer.finished`: the experts of earlier phases."""
        return [player.denoiser for player in self.students()[: self.phase]]

    @property
    def rollout(self) -> tuple[float, float]:
        """See :attr:`ScoreTrainer.rollout`; phases before are walked whole."""
        before, steps = self.phase * self.config.phase_steps, self.config.phase_steps
        return before + (steps - 1) / 2, before + (steps if self.whole else (steps + 1) / 2)


def expert_name(phase: int) -> str:
    """Player name of a phase's expert: student, student_2, ..."""
    return "student" if phase == 0 else f"student_{phase + 1}"


TRAINER = PhasedDMDTrainer
