"""CRD: centred reward distillation; the student's implied reward follows the real one in a group.

How much better than an older self the student denoises an image is an implied reward of it. Among
images of one class, both rewards are centred and the first is regressed on the second, while the
field stays near the (guided) teacher's. The reward needs no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser, Prediction
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.sampler import first_state, full, heun_step, move
from stepdistill.diffusion.timesteps import Density, Uniform
from stepdistill.losses.regression import mean_square
from stepdistill.losses.reward import Brightness, Reward, rewards
from stepdistill.oracles.mixture import Mixture
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plugged
from stepdistill.run.ratios import sample_parts
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Trainer, Turn
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.settings import Section, TrainConfig

STEADY = {"lr": 1e-2, "betas": (0.9, 0.999), "decay": "cosine", "clip": None}  # of the proof
FLOOR = 1e-5  # below which an error's mean is not divided by


class OldConfig(Section):
    """The older self: an average whose decay grows, min(first + step growth, most)."""

    first: float = Field(0.25, ge=0, lt=1, description="decay at the start")
    growth: float = Field(0.005, ge=0, description="growth a step")
    most: float = Field(0.999, ge=0, lt=1, description="largest decay")

    def decay(self, step: int) -> float:
        """The decay of the average after a step."""
        return min(self.first + self.growth * step, self.most)


class CRDConfig(TrainConfig):
    """Settings of ``crd``."""

    reward: Plugged[Reward] = Field(
        default_factory=Brightness, description="what is to grow; it needs no gradient"
    )
    group_size: int = Field(8, ge=2, description="samples of one class, within which is centred")
    beta: float = Field(1.0, gt=0, description="what implied rewards are multiplied by")
    most_reward: float | None = Field(
        5.0, gt=0, description="bound of a centred reward; null: none"
    )
    reference: float = Field(
        0.1, ge=0, description="weight of the squared distance to the teacher's field"
    )
    normalise: Literal["mean_abs", "none"] = Field(
        "mean_abs", description="what an error's square is divided by: its own mean size, or 1"
    )
    student_steps: int = Field(8, ge=1, description="steps of the student's grid")
    solver: Literal["euler", "heun"] = Field(
        "euler", description="of the walks that make the samples; the export's is Euler's"
    )
    t: Density = Field(
        default_factory=lambda: Uniform(low=0.02, high=0.98), description="training times"
    )
    old: OldConfig = Field(default_factory=OldConfig, description="the older self")


class CRDTrainer(Trainer):
    """Centred reward distillation, spec 5.22.

    Here: the older self makes the samples, the loss is divided by beta once, the weight of the
    teacher's term is constant, where the released code adapts it to the reward, and rewards are
    clipped, not mapped to [0, 1].
    """

    Config = CRDConfig
    config: CRDConfig
    shortens = False
    proofs: ClassVar = {
        "tilted by a reward": Proof(
            ("gaussian",),
            {"reference": 4.0, "normalise": "none", "group_size": 4, "solver": "heun"}
            | {"old": {"growth": 0.0}, "optim": STEADY},
            effort=0.5,
        ),
    }

    def setup(self) -> None:
        """The student, and the older self.

        Raises:
            UserError: guidance of a teacher that is not asked.
        """
        c = self.config
        if c.guided and not c.reference:
            raise UserError("guidance: with reference=0 the teacher is not asked; set guidance=1")
        self.sizes, self.group = (c.student_steps,), c.group_size
        self.add_player("student", self.initial, c.optim, ema=True, total=c.steps)
        self.old = self.denoiser("student").twin("old")
        self.old_params = self.old.own()
        for param in self.old_params:
            param.requires_grad_(False)

    @property
    def fixed_point(self) -> FixedPoint:
        """The field of the teacher's law times exp(2 (1 - 1/G) R / reference), in groups of G.

        There the student is its older self: what is left of the regression, 4 / D times the
        covariance of reward and velocity target at each state, balances the teacher's term.

        Raises:
            UserError: settings for which that has no closed form.
        """
        c = self.config
        linear = isinstance(c.reward, Brightness)
        if not linear or c.normalise != "none" or not c.reference or c.guided:
            raise UserError(
                "reward: in closed form is only the law by reward=brightness, normalise=none, "
                "reference above 0 and guidance=1"
            )
        return FixedPoint("map", follow=lambda t: (t, 0.0), smooth=True, tilt=self.tilt)

    def tilt(self, law: Mixture) -> Mixture:
        """The law that the student ends with, from the data's."""
        scale = 2 * (1 - 1 / self.config.group_size) / self.config.reference
        return law.tilted(torch.full((law.dim,), scale / law.dim))

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """The regression of centred rewards, and the distance to the teacher's field."""
        c, label = self.config, batch.cond.label
        with torch.no_grad():
            x = self.walk(batch, rng)
            wanted = rewards(c.reward, x, label)
            told = self.centred(wanted)
            if c.most_reward is not None:
                told = told.clamp(-c.most_reward, c.most_reward)
        e = self.z(batch, rng, "e")
        t = self.drawn(c.t, rng.uniform("t", batch.index))
        x_t = self.process.noise(x, e, t)
        with torch.no_grad():
            old = velocity(self.old(x_t, t, batch.cond))
        own = velocity(self.denoiser("student")(x_t, t, batch.cond))
        implied = self.error(old - (e - x)) - self.error(own - (e - x))
        regression = ((c.beta * self.centred(implied) - told).square() / c.beta).mean()
        logs = {"loss": regression, "regression": regression, "reward": wanted.mean()}
        if c.reference:
            with torch.no_grad():
                real = velocity(guided(self.teacher, x_t, t, batch.cond, c.guidance))
            near = mean_square(own - real).mean()
            logs["loss"] = regression + c.reference * near
            logs |= {"reference": near, "gap": (own - real).detach().abs().mean()}
        return Loss(logs["loss"], logs | sample_parts(x))

    def walk(self, batch: Batch, rng: Rng) -> Tensor:
        """Clean samples of the older self [B, ...]."""
        (grid,) = self.grids().values()
        z = self.z(batch, rng)
        x_t = first_state(self.process, z, grid[0])
        for here, there in zip(grid, grid[1:], strict=False):
            t, r = full(z, here), full(z, there)
            if self.config.solver == "heun":
                x_t = heun_step(self.old, x_t, t, r, batch.cond)
            else:
                x_t = move(self.old(x_t, t, batch.cond), self.process, r)
        return x_t

    def error(self, gap: Tensor) -> Tensor:
        """The mean square of an error [B], over its own mean size where that is asked for."""
        size = gap.detach().abs().flatten(1).mean(dim=1).clamp_min(FLOOR)
        return mean_square(gap) / (size if self.config.normalise == "mean_abs" else 1)

    def centred(self, values: Tensor) -> Tensor:
        """Numbers [B] less the mean of their group."""
        groups: Tensor = values.unflatten(0, (-1, self.group))
        return (groups - groups.mean(dim=1, keepdim=True)).flatten()

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`Trainer.step`; then the older self follows."""
        logs = super().step(step, batch)
        weight = 1 - self.config.old.decay(step)
        torch._foreach_lerp_(self.old_params, self.players["student"].weights, weight)
        return logs

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See :meth:`Trainer.state`; with the older self."""
        return super().state() | {"old": self.old.weights()}

    def load_state(
        self, step: int, tensors: Mapping[str, dict[str, Tensor]], updates: Mapping[str, int]
    ) -> None:
        """See :meth:`Trainer.load_state`."""
        super().load_state(step, tensors, updates)
        self.old.load(tensors["old"])

    def members(self) -> list[tuple[str, Denoiser]]:
        """See :meth:`Trainer.members`; with the older self."""
        return [*super().members(), ("old", self.old)]

    def passes(self) -> list[Pass]:
        """The older self's walk and its field, counted as the student's; student and teacher."""
        calls = self.config.student_steps * (2 if self.config.solver == "heun" else 1)
        asked = [Pass("teacher", "forward", 1, 2 if self.config.guided else 1)]
        return [
            Pass("student", "train"),
            Pass("student", "forward", calls + 1),
            *(asked if self.config.reference else ()),
        ]


def velocity(pred: Prediction) -> Tensor:
    """z - x, the velocity in rectified flow's coordinates."""
    return pred.z - pred.x


TRAINER = CRDTrainer
