"""Trajectory-backward consistency: sCM without data, on the teacher's own paths from noise.

Each walk of the teacher from pure noise passes through as many states as there are points, at
times drawn one an interval; the velocity that took it on from there is the one that the tangent
needs, so that the teacher is asked nothing more.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.sampler import first_state, full, move
from stepdistill.diffusion.timesteps import uniform_grid
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Pass
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.trajectory.scm import CALM, PLAIN, SCMConfig, SCMTrainer

EXACTLY = {"derivative": "jvp", "warmup": 0}


class TBCMConfig(SCMConfig):
    """Settings of ``tbcm``."""

    t: None = Field(None, description="always null: times are drawn one an interval of the walk")
    velocity: None = Field(None, description="always null: the path is the teacher's")  # type: ignore[assignment]
    points: int = Field(
        16, ge=1, description="states of a walk that are trained on, neighbours in the batch"
    )
    calm_from: int | None = Field(
        None, ge=0, description="step from which the derivative counts less again; null: none"
    )
    calm_steps: int = Field(2000, ge=1, description="steps over which it calms down")
    calm_to: float = Field(
        0.75, gt=0, le=1, description="its weight then; below 1 the student rests beside the flow"
    )


class TBCMTrainer(SCMTrainer):
    """TBCM, spec M11, from its published code and abstract.

    Here: a batch holds ``batch_size / points`` walks, all of the step's own, and none is filtered;
    the published 15 points are 16. The first state is pure noise, where the paper's tangent is 0,
    and is not trained on.
    """

    Config = TBCMConfig
    config: TBCMConfig
    needs = "labels"
    proofs: ClassVar = {
        "walks": Proof(("gaussian",), {"points": 4, "optim": CALM} | EXACTLY, effort=0.8),
        "plain tangent": Proof(
            ("gmm1d",), PLAIN | {"points": 8, "optim": CALM} | EXACTLY, effort=0.8, batch=2
        ),
    }

    def setup(self) -> None:
        """See :meth:`SCMTrainer.setup`.

        Raises:
            UserError: a calm that begins before the derivative has its whole weight, or never.
        """
        c = self.config
        self.group = c.points
        super().setup()
        if c.calm_from is not None and not self.warmup <= c.calm_from < c.steps:
            raise UserError(
                f"calm_from={c.calm_from}: the derivative has its whole weight from "
                f"warmup={self.warmup} to steps={c.steps}; choose a step in between"
            )
        self.route = torch.tensor(
            uniform_grid(self.process, c.points, self.start), device=self.device
        )

    def warmth(self, step: int) -> float:
        """See :meth:`SCMTrainer.warmth`; less again where it calms down."""
        c = self.config
        if c.calm_from is None or step < c.calm_from:
            return super().warmth(step)
        done = min(1.0, (step - c.calm_from) / c.calm_steps)
        return 1 - (1 - c.calm_to) * done

    @torch.no_grad()
    def states(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :meth:`SCMTrainer.states`: of walks, the points of each side by side."""
        points, scale = self.config.points, self.scale(batch, rng)
        walks, index = slice(0, None, points), batch.index
        if isinstance(scale, Tensor):
            scale = scale[walks]
        times = self.between(rng.uniform("t", index)).unflatten(0, (-1, points))
        cond = batch.cond.rows(walks)
        z = rng.normal("z", index[walks], self.teacher.sample_shape)
        t, x_t = full(z, self.top), first_state(self.process, z, self.top)
        found = []
        for place in range(points + 1):
            pred = guided(self.teacher, x_t, t, cond, scale)
            if place:
                found.append((x_t, t, pred.x, pred.z))
            if place < points:
                t = times[:, place]
                x_t = move(pred, self.process, t)
        x_t, t, x, z = (torch.stack(part, dim=1).flatten(0, 1) for part in zip(*found, strict=True))
        return x_t, t, x, z

    def scale(self, batch: Batch, rng: Rng) -> float | Tensor:
        """See :meth:`Scales.scale`: that of a walk, for all of its points."""
        found, points = super().scale(batch, rng), self.config.points
        if not isinstance(found, Tensor):
            return found
        return found[::points].repeat_interleave(points)

    def between(self, u: Tensor) -> Tensor:
        """Times from uniforms u [B]: that of a walk's k-th point lies in the k-th interval."""
        place = torch.arange(len(u), device=u.device) % self.config.points
        high, low = self.route[place], self.route[place + 1].clamp_min(self.process.t_min)
        return high + u * (low - high)

    def passes(self) -> list[Pass]:
        """The walks, the derivative, and the student."""
        c = self.config
        own = [item for item in super().passes() if item.role != "teacher"]
        walk = Pass("teacher", "forward", c.points + 1, (2 if c.guided else 1) / c.points)
        return [walk, *own]


TRAINER = TBCMTrainer
