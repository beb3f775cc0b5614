"""SIM: score implicit matching; the gradient flows through teacher and fake score.

The fake score learns the one-step student's own distribution; the student minimises a distance
between the two scores, by the theorem that makes its gradient computable.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from stepdistill.losses.distance import Distance, PseudoHuber
from stepdistill.losses.gap import Seen
from stepdistill.losses.implicit import Form, Space, sim_loss
from stepdistill.run.plug import Plugged
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.implicit import Implicit, ImplicitConfig
from stepdistill.trainers.score.rollout import GridConfig, GridTrainer

SMOOTH = {"distance": {"kind": "pseudo_huber", "scale": 0.5}}


class SIMConfig(GridConfig, ImplicitConfig):
    """Settings of ``sim``."""

    distance: Plugged[Distance] = Field(
        default_factory=PseudoHuber, description="distance between the two scores"
    )
    space: Space = Field("x0", description="where the scores are compared")
    form: Form = Field("score", description="score: SIM; full: the total derivative")


class SIMTrainer(Implicit, GridTrainer):
    """Score implicit matching (Luo et al. 2024), spec 5.6, with a two-stage backward.

    Here: the distance is measured between clean estimates and weighted alike at all noise levels,
    with iCT's rule for its constant; the paper's own constant and weights are not public.
    """

    Config = SIMConfig
    config: SIMConfig
    covers = True
    clips = True
    proofs: ClassVar = {
        "score": Proof(("gaussian", "gmm2d", "classes"), SMOOTH),
        "full": Proof(("gaussian",), {**SMOOTH, "form": "full"}),
    }

    def cost(self, seen: Seen) -> Tensor:
        """See :meth:`Implicit.cost`."""
        c = self.config
        return sim_loss(
            seen.x,
            seen.fake,
            seen.real,
            seen.coefs,
            distance=c.distance,
            space=c.space,
            form=c.form,
        )


TRAINER = SIMTrainer
