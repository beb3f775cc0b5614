"""Uni-Instruct: any f-divergence of the clean laws, as a sum over noise levels of score gaps.

Along diffusion an f-divergence falls at the rate E[r^2 f''(r) ||s_p - s_q||^2], r the density of
the data over the student's, which an adversarial head tells. With the reverse KL it is SiD at
alpha = 1/2, with the forward KL SIM weighted by r.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from stepdistill.losses.divergence import Divergence, ForwardKl, ReverseKl
from stepdistill.losses.gap import MeanAbs, Seen, Weight
from stepdistill.losses.implicit import Ratio, uni_loss
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plugged
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.adversary import AdversaryConfig, RatioConfig, check_ratio
from stepdistill.trainers.score.implicit import Implicit, ImplicitConfig
from stepdistill.trainers.score.rollout import GridConfig, GridTrainer

STATE = {"adversary": {"features": "state", "head": "mlp"}}


class UniAdversary(AdversaryConfig):
    """The adversarial head of ``uni_instruct``."""

    student: float = Field(1e-4, ge=0, description="weight in the student's loss, for each entry")


class UniInstructConfig(GridConfig, ImplicitConfig, RatioConfig):
    """Settings of ``uni_instruct``."""

    divergence: Plugged[Divergence] = Field(
        default_factory=ForwardKl, description="the f-divergence"
    )
    ratio: Ratio = Field(
        "exact", description="exact: the gradient goes through the ratio too; stopped: it is held"
    )
    weights: tuple[Plugged[Weight], ...] = Field(
        (MeanAbs(floor=1e-5),),
        description="factors of each sample's loss, multiplied and held constant; none: 1",
    )
    adversary: UniAdversary | None = Field(
        default_factory=UniAdversary,
        description="the head that tells the ratio; null: none, for the reverse KL alone",
    )


class UniInstructTrainer(Implicit, GridTrainer):
    """Uni-Instruct (Wang et al. 2025), spec 5.9; the gradient is derived there.

    Here: the ratio is each sample's own, from the head's logits, without a mean over the batch,
    and 1 until the head takes part, as it is at the earlier exits of several steps, whose images
    are not those that the head knows; the adversarial loss has no normaliser, where SiDA's has;
    heads are of the config's kind, where SiDA's is a mean of channels; there is no warm-up; and
    SiD's normaliser stands for the exact weight, which is ``weights: [likelihood]``. A guided
    teacher's score is no longer that of the data which the head sees, so ``exact`` is exact
    without guidance only.
    """

    Config = UniInstructConfig
    config: UniInstructConfig
    covers = True
    clips = True
    proofs: ClassVar = {
        "forward KL": Proof(("gmm2d",), STATE, effort=0.65),
        "Jensen-Shannon": Proof(
            ("gaussian",), {**STATE, "divergence": "jensen_shannon"}, effort=0.5
        ),
    }

    def setup(self) -> None:
        """See :meth:`ScoreTrainer.setup`.

        Raises:
            UserError: no head that tells the density ratio, for a divergence that needs one.
        """
        c = self.config
        if c.adversary is None and not isinstance(c.divergence, ReverseKl):
            raise UserError(
                f"adversary: {c.divergence.kind} takes the density ratio from the adversarial "
                "head; set adversary={}, or divergence=reverse_kl, which needs none"
            )
        if c.adversary is not None:
            check_ratio(c.adversary, "uni_instruct")
        super().setup()

    def cost(self, seen: Seen) -> Tensor:
        """See :meth:`Implicit.cost`."""
        c = self.config
        known = seen.ratio is not None
        return uni_loss(
            seen.x,
            seen.fake,
            seen.real,
            seen.x_t,
            seen.coefs,
            seen.ratio if seen.ratio is not None else seen.t.new_ones(seen.t.shape),
            divergence=c.divergence,
            ratio=c.ratio if known else "stopped",
            bounds=(c.least_ratio, c.greatest_ratio),
        )


TRAINER = UniInstructTrainer
