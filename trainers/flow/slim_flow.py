"""SlimFlow: reflow into a smaller student by annealing its noise, then one step that it guides.

Two runs of one method: ``stage: anneal`` trains a small flow on a large teacher's pairs, and, with
the small flow as the teacher, ``stage: distil`` trains the one-step student.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.data.batch import Batch
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.sampler import first_state, full
from stepdistill.diffusion.timesteps import Density, Uniform
from stepdistill.losses.reflow import mixed_noise, velocity_loss
from stepdistill.losses.regression import mean_square
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Turn
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.flow.denoising import NetworkConfig
from stepdistill.trainers.flow.lines import (
    LineConfig,
    LineTrainer,
    PerceptualConfig,
    refuse_singular,
)
from stepdistill.trainers.smaller import smaller

SECOND = (0.2, 0.8)  # rectified flow's times of the second of two steps


class SlimFlowConfig(LineConfig):
    """Settings of ``slim_flow``."""

    stage: Literal["anneal", "distil"] = Field(
        "anneal", description="anneal: a small flow of a large teacher; distil: one step of a flow"
    )
    network: NetworkConfig | None = Field(
        None, description="the student's network; null: the teacher's, with its weights"
    )
    anneal: float = Field(
        0.375,
        ge=0,
        lt=1,
        description="share of the steps over which fresh noise gives way to the pairs'",
    )
    t: Density = Field(
        default_factory=lambda: Uniform(low=0.0, high=1.0), description="times of the small flow"
    )
    perceptual: PerceptualConfig | None = Field(
        None, description="a distance of features beside the images' in stage distil; null: none"
    )


class SlimFlowTrainer(LineTrainer):
    """SlimFlow (Zhu et al. 2024), spec 7: annealing reflow and flow-guided distillation.

    Annealing mixes the pair's noise with fresh noise whose share falls to 0, linearly, the best of
    the paper's. Distillation adds, to the regression on the small flow's pairs, that on two of its
    steps from fresh noise, the first of which is the student's own; the authors' code has it so,
    and t of (0.2, 0.8). Here: distances of images are mean squares, and LPIPS, which the authors
    have in their place, stands beside; pairs are the store's, of Euler's steps, and not of RK45's.
    """

    Config = SlimFlowConfig
    config: SlimFlowConfig
    kept = ("steps",)  # of which the annealing is a share
    proofs: ClassVar = {
        "anneal": Proof(("gaussian", "gmm1d")),
    }
    beta = 0.0  # share of fresh noise, at present

    def setup(self) -> None:
        """A small student, which begins anew, or the flow itself.

        Raises:
            UserError: keys of one stage in the other; a network that does not stand in for the
                teacher's, or that adapters are to be on.
        """
        c = self.config
        distil = c.stage == "distil"
        if distil and c.network is not None:
            raise UserError(
                "network: stage=distil begins as its teacher, the small flow; set network=null"
            )
        if not distil and c.perceptual is not None:
            raise UserError(
                "perceptual: with fresh noise only squared errors have the flow as their minimum; "
                "set perceptual=null, or stage=distil"
            )
        if c.network is not None and c.lora is not None:
            raise UserError("lora: a smaller student starts anew; set lora=null")
        refuse_singular(self)
        self.flows, self.sizes = not distil, (1,) if distil else (1, 2, 4, 8)
        source = smaller(c.network, c.seed, self.teacher) if c.network else self.initial
        self.add_player("student", source, c.optim, ema=True, total=c.steps)
        self.perceptual = self.look(c.perceptual)

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        c = self.config
        self.beta = annealed(step, c.anneal * c.steps)
        return [Turn("student", self.distil if c.stage == "distil" else self.loss)]

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Velocity against the line from the image to the pair's noise, mixed with fresh noise."""
        x, z = self.pair(batch)
        z = self.line(x, mixed_noise(z, self.z(batch, rng, "fresh"), self.beta))
        t = self.drawn(self.config.t, rng.uniform("t", batch.index))
        pred = self.denoiser("student")(self.process.noise(x, z, t), t, batch.cond)
        loss = velocity_loss(self.velocity(pred), x, z, t).mean()
        return Loss(loss, {"loss": loss})

    def distil(self, batch: Batch, rng: Rng) -> Loss:
        """One step against the pair's image, and against two steps of the flow from fresh noise."""
        x, z = self.pair(batch)
        fresh = self.z(batch, rng, "fresh")
        state = first_state(self.process, torch.cat([z, fresh]), self.top)
        twice = batch.cond.stack(batch.cond)
        own, guess = self.denoiser("student")(state, full(state, self.top), twice).x.chunk(2)
        s = SECOND[0] + (SECOND[1] - SECOND[0]) * rng.uniform("t", batch.index)
        with torch.no_grad():
            t = self.process.time_of_flow(s).clamp_max(self.top)
            target = self.second(guess, fresh, t, batch.cond)
        pairs, steps = self.distance(own, x), self.distance(guess, target)
        loss = pairs + steps
        return Loss(loss, {"loss": loss, "pairs": pairs, "two_steps": steps})

    def second(self, guess: Tensor, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Where the flow leads from states at t [B], between noise and the student's guess."""
        x_t = self.process.noise(guess, self.line(guess, z), t)
        return guided(self.teacher, x_t, t, cond, self.config.guidance).x

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean distance of images a to fixed ones b."""
        total = mean_square(a - b)
        return (total if self.perceptual is None else total + self.perceptual(a, b)).mean()

    def passes(self) -> list[Pass]:
        """The student; in distillation on a double batch, and the flow's second step."""
        c = self.config
        if c.stage == "anneal":
            return [Pass("student", "train")]
        asked = Pass("teacher", "forward", batch=2 if c.guided else 1)
        return [Pass("student", "train", batch=2), asked]


def annealed(step: int, steps: float) -> float:
    """The share of fresh noise at a step: from 1 down to 0 at ``steps``; 0 if that is 0."""
    return 1 - min(1.0, step / steps) if steps else 0.0


TRAINER = SlimFlowTrainer
