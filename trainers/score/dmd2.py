"""DMD2: distribution matching on two time scales, with an adversarial head and real images.

The fake score is updated several times for each update of the student, and carries a
discriminator on its own features (or the teacher's) which pulls the student to the data itself,
past what the teacher knows.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.adversary import AdversaryConfig
from stepdistill.trainers.score.matching import Matching, MatchingConfig
from stepdistill.trainers.score.rollout import GridConfig, GridTrainer


class DMD2Config(GridConfig, MatchingConfig):
    """Settings of ``dmd2``."""

    critic_steps: int = Field(5, ge=1, description="fake-score updates a student update")
    adversary: AdversaryConfig | None = Field(
        default_factory=AdversaryConfig, description="the adversarial head; null: none, and no data"
    )


class DMD2Trainer(Matching, GridTrainer):
    """DMD2 (Yin et al. 2024), spec 5.4.

    Here: in several steps the fake score learns what the sampler makes, where the paper's learns
    the images predicted at drawn exits (``critic_rollout: false``), which spread too widely; the
    student's head reads the very states at which the scores are compared, all fake-score updates
    of a step see the same images of the data, noised anew, and their times are logit-normal unless
    ``critic_t`` says otherwise.
    """

    Config = DMD2Config
    config: DMD2Config
    clips = True
    proofs: ClassVar = {
        "adversarial": Proof(
            ("gaussian", "gmm2d"),
            {"critic_steps": 2, "adversary": {"features": "state", "head": "mlp"}},
            effort=0.8,
        ),
    }


TRAINER = DMD2Trainer
