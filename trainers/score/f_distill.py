"""f-distill: DMD2 for any f-divergence, by a weight of the density ratio that its head tells.

The gradient of an f-divergence is the reverse KL's, weighted at every place by r^2 f''(r), r the
density of the data over the student's. The discriminator tells r at the very state at which both
scores are asked; it is held constant.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.process import expand
from stepdistill.losses.divergence import Divergence, JensenShannon
from stepdistill.losses.gap import Seen
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plugged
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.adversary import RatioConfig, check_ratio
from stepdistill.trainers.score.dmd2 import DMD2Config
from stepdistill.trainers.score.matching import Matching
from stepdistill.trainers.score.rollout import GridTrainer


class FDistillConfig(DMD2Config, RatioConfig):
    """Settings of ``f_distill``."""

    divergence: Plugged[Divergence] = Field(
        default_factory=JensenShannon, description="the f-divergence"
    )


class FDistillTrainer(Matching, GridTrainer):
    """f-distill (Xu et al. 2025), spec 5.8; by ``reverse_kl`` it is ``dmd2`` to the bit.

    Here: weights are divided by the weight at r = 1, a constant, where the reference code divides
    by running means over bins of t and over the batch; before the head takes part
    (``adversary.from_step``), and at the earlier exits of several steps, whose images are not those
    that the head knows, they are 1.
    """

    Config = FDistillConfig
    config: FDistillConfig
    clips = True
    proofs: ClassVar = {
        name: Proof(
            ("gaussian",),
            {
                "critic_steps": 2,
                "divergence": name,
                "adversary": {"features": "state", "head": "mlp"},
            },
            effort=0.8,
        )
        for name in ("jensen_shannon", "forward_kl")
    }

    def setup(self) -> None:
        """See :meth:`ScoreTrainer.setup`.

        Raises:
            UserError: no head that tells the density ratio.
        """
        head = self.config.adversary
        if head is None:
            raise UserError(
                "adversary: f_distill takes the density ratio from the adversarial head; set "
                "adversary={} (divergence=reverse_kl without a head is dmd)"
            )
        check_ratio(head, "f_distill")
        super().setup()

    def direction(self, seen: Seen) -> Tensor:
        """The direction of ``dmd2``, weighted by the divergence."""
        plain = super().direction(seen)
        if seen.ratio is None:
            return plain
        c = self.config
        r = seen.ratio.clamp(c.least_ratio, c.greatest_ratio)
        weight = c.divergence.weight(r) / c.divergence.weight(r.new_ones(()))
        return expand(weight, plain) * plain


TRAINER = FDistillTrainer
