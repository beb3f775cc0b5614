"""Phased consistency: the student's jumps agree along the teacher's path inside each segment.

The path is cut into as many segments as the student takes steps. From any state the student jumps
to the lower end of its segment, where the state that one teacher step leads to must jump as well;
so that steps without fresh noise walk the teacher's whole path.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Prediction
from stepdistill.diffusion.sampler import NoiseSource
from stepdistill.diffusion.timesteps import Grid as Times
from stepdistill.losses.consistency import One, PairWeight
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plugged
from stepdistill.run.rng import Rng
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.trajectory.consistency import ConsistencyConfig, ConsistencyTrainer
from stepdistill.trainers.trajectory.pairs import Grid, Pairs

NEAR = 1e-6  # relative: times that are one and the same


class PCMConfig(ConsistencyConfig):
    """Settings of ``pcm``."""

    pairs: Plugged[Pairs] = Field(
        default_factory=Grid, description="which times are compared; a grid that holds all borders"
    )
    weight: Plugged[PairWeight] = Field(
        default_factory=One, description="what a pair counts: one, or 1 / (t - r)"
    )
    student_steps: int = Field(4, ge=1, description="segments, and steps of the student")


class PCMTrainer(ConsistencyTrainer):
    """Phased consistency models (Wang et al. 2024) and multistep consistency (Heek et al. 2024).

    Spec M6. Here: pairs end at the segment's lower end; the loss of a jump to a noisy end keeps
    the factor by which the estimate enters; ``clip`` is the student's alone; no discriminator.
    """

    Config = PCMConfig
    config: PCMConfig
    noise: NoiseSource = "predicted"
    proofs: ClassVar = {
        "two segments": Proof(
            ("gaussian", "gmm1d"),
            {"student_steps": 2, "pairs": {"kind": "grid", "steps": 8}, "metric": "l2"},
        ),
        "four segments, heun": Proof(
            ("gaussian",),
            {"student_steps": 4, "pairs": {"kind": "grid", "steps": 8}, "solver": "heun"}
            | {"metric": "l2"},
        ),
    }

    def setup(self) -> None:
        """See :meth:`ConsistencyTrainer.setup`.

        Raises:
            UserError: the student's steps begin at times that the pairs never have.
        """
        self.sizes = (self.config.student_steps,)
        super().setup()
        self.milestones = self.span.grid(self.config.student_steps)
        self.fit("student_steps", self.config.student_steps)

    def fit(self, key: str, segments: int) -> None:
        """See that so many segments begin at times that the pairs have.

        Raises:
            UserError: they do not; it names the config's key that says how many there are.
        """
        grid = self.config.pairs.grid(self.span)
        if grid is not None and (len(grid) - 1) % segments:
            raise UserError(
                f"{key}={segments}: its steps begin at times that are not among "
                f"the pairs' {len(grid) - 1} intervals; make these a multiple of it"
            )

    def end(self, t: Tensor) -> Tensor:
        """The milestone below times t [B]: the lower end of their segments."""
        return self.milestones[self.above(t)]

    def above(self, t: Tensor) -> Tensor:
        """Segments [B] from the noisiest down to that of times t [B]."""
        place = torch.searchsorted(-self.milestones, -t * (1 - NEAR))
        return place.clamp_max(len(self.milestones) - 1)

    def times(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """The pair (t, r) of every sample [B], r no lower than the end of t's segment."""
        t, r = super().times(batch, rng)
        end = self.end(t)
        return t, torch.where(r > end * (1 + NEAR), r, end)

    def chain(self, t: float) -> Times:
        """Times from t to the end of its segment, each the partner of the one before."""
        end = float(self.end(torch.tensor([t], device=self.device)))
        inside = [time for time in super().chain(t) if time > end * (1 + NEAR) or time == t]
        return (*inside, end)

    def landed(self, pred: Prediction, end: Tensor) -> Tensor:
        """The state at ``end`` that a step of the sampler leads to."""
        c = self.process.coefs(end).expand(pred.x_t)
        return c.alpha * self.shown(pred.x) + c.sigma * pred.z


TRAINER = PCMTrainer
