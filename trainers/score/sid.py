"""SiD: score identity distillation; SIM's squared distance with a share alpha and a normaliser.

The loss of two scores whose gradient flows through both. A share alpha above 1 makes up for a fake
score that lags behind the student. Guided as ``guide: {kind: long_short, ...}`` it is SiD-LSG.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from stepdistill.losses.gap import MeanAbs, Seen, Weight
from stepdistill.losses.implicit import sid_loss
from stepdistill.run.plug import Plugged
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.implicit import Implicit, ImplicitConfig
from stepdistill.trainers.score.rollout import GridConfig, GridTrainer


class SiDConfig(GridConfig, ImplicitConfig):
    """Settings of ``sid``."""

    alpha: float = Field(
        1.2, ge=0, description="1: SIM's gradient; 0.5: the exact one; above 1: past the lag"
    )
    weights: tuple[Plugged[Weight], ...] = Field(
        (MeanAbs(floor=1e-5),),
        description="factors of each sample's loss, multiplied and held constant; none: 1",
    )


class SiDTrainer(Implicit, GridTrainer):
    """SiD (Zhou et al. 2024), spec 5.7; and, by its guide, SiD-LSG.

    Here: the student's turn comes first, times are those of the family and not EDM's grid below
    u = 0.8, the student starts at pure noise and not at sigma = 2.5, and the loss is a mean over
    samples without the factor 100, which Adam does not see but for its clip.
    """

    Config = SiDConfig
    config: SiDConfig
    covers = True
    clips = True
    proofs: ClassVar = {
        "alpha 1.2": Proof(("gaussian",)),
        "long and short guidance": Proof(
            ("classes",),
            {"alpha": 1.0, "guide": {"kind": "long_short", "train": 2.0, "fake": 2.0}},
            effort=1.2,
        ),
    }

    def cost(self, seen: Seen) -> Tensor:
        """See :meth:`Implicit.cost`."""
        return sid_loss(seen.x, seen.fake, seen.real, self.config.alpha)


TRAINER = SiDTrainer
