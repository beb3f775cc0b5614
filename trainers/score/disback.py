"""DisBack: distribution backtracking, dmd against scores on the way back from student to teacher.

First, degradation recording: the student stays what it was at the start, and the fake score learns
its samples; of its weights on the way from the teacher to there, T = F_0, F_1, ..., F_(N+1), those
in between are kept. Then backtracking: the student is matched with F_N, F_(N-1), ..., F_1 in turn,
and with the teacher last, while its fake score goes on from F_(N+1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run.errors import UserError
from stepdistill.trainers.base import Pass, Turn
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.matching import Matching, MatchingConfig
from stepdistill.trainers.score.rollout import GridConfig, GridTrainer


class DisBackConfig(GridConfig, MatchingConfig):
    """Settings of ``disback``."""

    targets: int = Field(
        2,
        ge=0,
        description="recorded scores that the student is matched with before the teacher, each a "
        "network that is held until then; 0: none, which is dmd",
    )
    record_every: int | None = Field(
        None,
        ge=1,
        description="steps between records; null: so that recording takes a tenth of all steps",
    )
    interval: int | None = Field(
        None,
        ge=1,
        description="steps against each recorded score; null: so that those take a quarter of all",
    )


class DisBackTrainer(Matching, GridTrainer):
    """DisBack (Zhang et al. 2024), spec 5.10; without targets it is ``dmd`` bit for bit.

    Here: recorded scores are guided as the fake score is, of which they are earlier states; no
    adversarial part, which the authors' code has; one fake-score update a student's, where the
    paper has five; the fake score's optimizer goes on where the stages meet; and each target has a
    fixed number of steps.
    """

    Config = DisBackConfig
    config: DisBackConfig
    clips = True
    recorded = 0  # scores that were kept so far
    left = 0  # place of the one that the student is matched with; 0 is the teacher
    step_now = 0
    proofs: ClassVar = {"two targets": Proof(("gaussian",), {"targets": 2}, effort=1.25)}

    def setup(self) -> None:
        """See :meth:`GridTrainer.setup`.

        Raises:
            UserError: an adversarial head, or no step left against the teacher.
        """
        super().setup()
        c = self.config
        if c.adversary is not None:
            raise UserError("adversary: disback records scores alone; set adversary=null")
        count = max(1, c.targets)
        self.every = c.record_every or max(1, c.steps // (10 * (count + 1)))
        self.interval = c.interval or max(1, c.steps // (4 * count))
        if c.targets and None in (c.record_every, c.interval):
            self.kept = ("steps",)  # by which the stages are measured
        self.recording = self.every * (c.targets + 1) if c.targets else 0
        before = self.recording + self.interval * c.targets
        if before >= c.steps:
            raise UserError(
                f"steps={c.steps}: recording and {c.targets} targets take {before}, which leaves "
                "none against the teacher; give more steps, or less targets, record_every or "
                "interval"
            )
        self.players["student"].total = c.steps - max(self.recording, c.critic_first)

    def prepare(self, step: int) -> None:
        """See :meth:`Trainer.prepare`: keep the score where that is due, drop those passed."""
        self.step_now, count = step, self.config.targets
        while self.recorded < min(step // self.every, count):
            self.recorded += 1
            name, critic = target_name(self.recorded), self.players["critic"]
            kept = self.add_player(name, self.initial, critic.config, ema=False, total=1)
            kept.load_weights(critic.denoiser)
        if count and step >= self.recording:
            self.left = max(0, count - (step - self.recording) // self.interval)
            for place in range(self.left + 1, count + 1):
                if passed := self.players.pop(target_name(place), None):
                    passed.denoiser.drop()

    def turns(self, step: int) -> list[Turn]:
        """Those of the engine; the student has none while scores are recorded."""
        turns = super().turns(step)
        if step >= self.recording:
            return turns
        self.moved = False
        return [turn for turn in turns if turn.player == self.fake]

    @property
    def target(self) -> Denoiser:
        """The recorded score of the present stage; the teacher in the last."""
        return self.denoiser(target_name(self.left)) if self.left else self.teacher

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`Trainer.step`.

        Raises:
            UserError: what is to be recorded is the teacher still.
        """
        logs, done = super().step(step, batch), step + 1
        if done <= self.recording and done % self.every == 0:
            last = self.denoiser(target_name(self.recorded)) if self.recorded else None
            if not moved(self.denoiser(self.fake), last, self.initial):
                raise UserError(
                    f"step {done}: the score to record is still the "
                    f"{'one before' if self.recorded else 'teacher'}, so it is no target of its "
                    "own; raise critic.lr or record_every"
                )
        return logs

    def passes(self) -> list[Pass]:
        """Those of the present stage: no comparison while scores are recorded."""
        passes, c = super().passes(), self.config
        if self.step_now < self.recording:
            own = [p for p in passes if (p.role, p.kind) == ("critic", "train")]
            return [*own, Pass("student", "forward", c.critic_steps * self.rollout[1])]
        if not self.left:
            return passes
        size = 2 if self.config.guide.on_fake(self.config.guidance) else 1
        return [replace(p, role="target", batch=size) if p.role == "teacher" else p for p in passes]


def target_name(place: int) -> str:
    """Player name of the recorded score F_place."""
    return f"target_{place}"


def moved(den: Denoiser, last: Denoiser | None, initial: Denoiser) -> bool:
    """Whether a player has other weights than the record before it, or than it began with."""
    if last is None and den.lora is not None:  # an adapter's product begins as 0
        return any(bool(w.any()) for name, w in den.weights().items() if ".lora_B." in name)
    begun = (last or initial).weights()
    return any(not torch.equal(w, begun[name]) for name, w in den.weights().items())


TRAINER = DisBackTrainer
