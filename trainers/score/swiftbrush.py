"""SwiftBrush: variational score distillation of a generator, teacher and fake score guided alike.

Guided alike, both agree where the student's law is the data's own, without guidance: guidance
shapes the way there. A scale drawn anew for every sample (``guide: spread``) is SNOOPI's PG-SB. Of
v2, images are held to their conditions by ``terms: [{kind: clamped, reward: ...}]``, and two
students are merged by ``stepdistill export --merge``.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stepdistill.diffusion.timesteps import Density, Uniform
from stepdistill.losses.gap import Vsd, Weight
from stepdistill.losses.guides import Both, Guide
from stepdistill.run.plug import Plugged
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.matching import Matching, MatchingConfig
from stepdistill.trainers.score.rollout import GridConfig, GridTrainer


class SwiftBrushConfig(GridConfig, MatchingConfig):
    """Settings of ``swiftbrush``."""

    weights: tuple[Plugged[Weight], ...] = Field(
        (Vsd(),), description="factors of the direction, multiplied"
    )
    guide: Plugged[Guide] = Field(
        default_factory=Both, description="how teacher and fake score are guided"
    )
    critic_t: Density = Field(
        default_factory=lambda: Uniform(low=0.001, high=0.999),
        description="times at which the fake score trains",
    )


class SwiftBrushTrainer(Matching, GridTrainer):
    """SwiftBrush (Nguyen and Tran 2024; v2: Dao et al. 2024) and PG-SB, spec 5.2 and 5.12.

    Here: the fake score's loss in its head's own target. SNOOPI's negative attention (NASA), which
    acts when sampling, is not part of it.
    """

    Config = SwiftBrushConfig
    config: SwiftBrushConfig
    clips = True
    proofs: ClassVar = {
        "guided alike": Proof(("mixed",), {"critic_drop": 0.25, "critic_steps": 6}, effort=0.9),
        "PG-SB": Proof(
            ("mixed",),
            {
                "critic_drop": 0.25,
                "critic_steps": 6,
                "guidance": 1,
                "guide": {"kind": "spread", "low": 0.5, "high": 4.0},
            },
            effort=1.2,
        ),
    }


TRAINER = SwiftBrushTrainer
