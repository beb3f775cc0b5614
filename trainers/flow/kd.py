"""Knowledge distillation on pairs: regress the teacher's image from its noise, in a step or a few.

With the student of ``reflow`` as its teacher it is InstaFlow's second stage.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.sampler import first_state
from stepdistill.diffusion.timesteps import Grid, nearest, uniform_grid
from stepdistill.losses.reflow import PairMetric, pair_distance
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.flow.lines import LineConfig, LineTrainer, PerceptualConfig
from stepdistill.trainers.solvers import Euler


class KDConfig(LineConfig):
    """Settings of ``kd``."""

    idle: ClassVar = {"states": ("student_steps=1",)}

    student_steps: int = Field(1, ge=1, le=16, description="student steps")
    states: Literal["walk"] | None = Field(
        None,
        description="of more than one step: walk, the teacher's own states on the way, which are "
        "kept with the pairs, and a sampler of fresh noise; null: those on the lines of pairs, "
        "which are those of its walk for straight flows alone",
    )
    metric: PairMetric = Field("l2", description="l2 or huber, of the images")
    perceptual: PerceptualConfig | None = Field(
        None, description="a distance of features beside it; null: none"
    )

    @property
    def kept_steps(self) -> int | None:
        """See :attr:`TrainConfig.kept_steps`."""
        return self.student_steps if self.states and self.student_steps > 1 else None


class KDTrainer(LineTrainer):
    """Direct distillation of noise to image (Luhman and Luhman 2021), spec 3; InstaFlow's, spec 5.

    A step from noise learns the image of that very noise. With several steps the states are
    (1 - s) x + s z at the grid's times, as in rectified flow's k-step distillation, and the
    student's walk goes along such a line; or, with ``states: walk``, those that the teacher passed
    by there. Here: of these the student's image is noised anew to the next time, as predicted noise
    would lead off the walk, so that several steps keep the law and not each noise's own image; and
    LPIPS is of whatever frozen network the config names.
    """

    Config = KDConfig
    config: KDConfig
    proofs: ClassVar = {
        "one step": Proof(("gaussian", "gmm1d", "classes")),
        "two steps": Proof(("gaussian",), {"student_steps": 2}, effort=0.5),
        "two steps of the walk": Proof(
            ("gaussian", "gmm1d"), {"student_steps": 2, "states": "walk"}
        ),
    }

    def setup(self) -> None:
        """See :meth:`LineTrainer.setup`; the student's grid is the one it is trained on."""
        super().setup()
        c = self.config
        self.sizes = (c.student_steps,)
        self.walked = c.kept_steps is not None
        self.noise = "fresh" if self.walked else "predicted"
        self.perceptual = self.look(c.perceptual)
        self.levels = torch.tensor(self.grid[:-1], device=self.device, dtype=torch.float32)

    @property
    def grid(self) -> Grid:
        """The student's own."""
        return uniform_grid(self.process, self.config.student_steps, self.start)

    @property
    def fixed_point(self) -> FixedPoint:
        """The end of the teacher's walk, whose line the student's own walk does not leave; of a
        kept state the end of the walk from there on."""
        if not self.walked:
            return replace(super().fixed_point, joint=True)
        part = self.config.pairs.steps // self.config.student_steps
        solver = (self.config.pairs.walk or Euler()).model_copy(update={"substeps": part})
        return FixedPoint("map", follow=self.rest, solver=solver)

    def rest(self, t: float) -> Grid:
        """The student's times from that nearest to t on, by which the teacher's walk passes."""
        return self.grid[nearest(self.grid, t) :]

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Distance of the student's clean estimate to the pair's image."""
        c = self.config
        place = rng.integers("level", batch.index, c.student_steps)
        x, x_t = (self.passed if self.walked else self.drawn_out)(batch, place)
        guess = self.denoiser("student")(x_t, self.levels[place], batch.cond).x
        loss = pair_distance(guess - x, c.metric).mean()
        if self.perceptual is None:
            return Loss(loss, {"loss": loss})
        looks = self.perceptual(guess, x).mean()
        return Loss(loss + looks, {"loss": loss + looks, "pixels": loss, "perceptual": looks})

    def drawn_out(self, batch: Batch, place: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and the states on their lines at places [B] of the grid."""
        x, z = self.pair(batch)
        return x, self.process.noise(x, self.line(x, z), self.levels[place])

    def passed(self, batch: Batch, place: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and the states that the teacher passed by at places [B] of the grid."""
        kept, z = self.pair(batch)
        rows, first = torch.arange(len(z), device=z.device), first_state(self.process, z, self.top)
        x_t = torch.where(expand(place == 0, z), first, kept[rows, place])
        return kept[:, 0], x_t

    def passes(self) -> list[Pass]:
        """The student alone."""
        return [Pass("student", "train")]


TRAINER = KDTrainer
