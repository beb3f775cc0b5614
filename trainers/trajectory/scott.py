"""SCott: consistency along a stochastic solver's steps, with a discriminator on clean estimates.

The teacher takes a noisy image back by several steps of a reverse SDE, with fresh noise. A squared
distance to what the average of the student says there is least at its mean over that noise: the
more noise, the less spread the images have, down to the posterior mean. A discriminator is what
brings the spread back; without one keep ``solver.eta`` small.
"""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.timesteps import regular_start
from stepdistill.losses.consistency import One, PairWeight
from stepdistill.run.plug import Plugged
from stepdistill.run.rng import Rng
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.opponent import TeacherConfig
from stepdistill.trainers.solvers import Sde, Solved
from stepdistill.trainers.trajectory.pairs import Grid, Pairs
from stepdistill.trainers.trajectory.rival import Opposed, OpposedConfig

HIGHEST = 0.97  # where grids begin unless told: random steps keep nothing of pure noise


class ScottConfig(OpposedConfig):
    """Settings of ``scott``."""

    start: float | None = Field(
        None,
        gt=0,
        le=1,
        description="where the student's grid begins, as progress towards pure noise, 1; null: "
        "0.97, and lower for noise predictors",
    )

    pairs: Plugged[Pairs] = Field(
        default_factory=lambda: Grid(steps=40), description="which times are compared"
    )
    solver: Solved = Field(
        default_factory=lambda: Sde(substeps=3),
        description="the teacher's steps from t to r, or data",
    )
    target: Literal["stop_gradient", "ema"] = Field(
        "ema", description="whose estimate at r is the target"
    )
    weight: Plugged[PairWeight] = Field(
        default_factory=One, description="what a pair counts: one, or 1 / (t - r)"
    )
    adversary: TeacherConfig | None = Field(
        default_factory=lambda: TeacherConfig(student=0.4),
        description="a discriminator of clean estimates and data; null: none, and images that are "
        "the mean of what the solver's noise leads to",
    )


class ScottTrainer(Opposed):
    """SCott (Liu et al. 2024), spec M8, which knows it from notes by others alone.

    From these: three sub-steps, the average as target, a hinge on features of the frozen teacher at
    noised samples, weighed 0.4. Their distance, their best eta and the order of their solver are
    not verified. Here: the steps of :class:`Sde`, and heads without adapters on the teacher.
    With a discriminator no fixed point is known in closed form; the one declared is that without.
    """

    Config = ScottConfig
    config: ScottConfig
    proofs: ClassVar = {
        "half the noise": Proof(
            ("gaussian", "classes"),
            {"pairs": {"kind": "grid", "steps": 8}, "metric": "l2", "start": 0.75}
            | {"adversary": None}
            | {"solver": {"kind": "sde", "eta": 0.5, "substeps": 2}},
            batch=4,
        ),
        "all the noise": Proof(
            ("gaussian",),
            {"pairs": {"kind": "grid", "steps": 8}, "metric": "l2", "start": 0.75}
            | {"adversary": None}
            | {"solver": {"kind": "sde", "eta": 1.0}},
            batch=4,
        ),
        "none of it": Proof(
            ("gmm1d",),
            {"pairs": {"kind": "grid", "steps": 8}, "metric": "l2", "adversary": None}
            | {"start": 1.0, "solver": {"kind": "sde", "eta": 0.0}},
        ),
    }

    @cached_property
    def start(self) -> float:
        """See ``config.start``."""
        own = self.config.start
        return (
            min(HIGHEST, regular_start(self.process, self.teacher.head.name))
            if own is None
            else own
        )

    def setup(self) -> None:
        """See :meth:`ConsistencyTrainer.setup`; with the discriminator's heads."""
        super().setup()
        self.oppose(self.config.steps)

    def beside(
        self, estimate: Tensor, target: Tensor, end: Tensor, batch: Batch, rng: Rng
    ) -> dict[str, Tensor]:
        """See :meth:`ConsistencyTrainer.beside`: clean estimates against the data."""
        assert batch.x is not None
        return super().beside(estimate, batch.x, end, batch, rng)


TRAINER = ScottTrainer
