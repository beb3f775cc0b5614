"""VDOT: distribution matching along entropic optimal transport, with a relativistic head.

Between the clean estimates of fake score and teacher, positions are matched by transport before
they are compared; the plain gap is added, and a discriminator compares samples with data.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stepdistill.losses.adversarial import AdversarialLoss, Relativistic
from stepdistill.losses.transport import Entropic, Transport
from stepdistill.run.plug import Plugged
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.adversary import AdversaryConfig
from stepdistill.trainers.score.matching import Matching, MatchingConfig
from stepdistill.trainers.score.rollout import GridConfig, GridTrainer


class VDOTAdversary(AdversaryConfig):
    """The adversarial head of ``vdot``."""

    loss: Plugged[AdversarialLoss] = Field(
        default_factory=Relativistic, description="what its logits cost both sides"
    )


class VDOTConfig(GridConfig, MatchingConfig):
    """Settings of ``vdot``."""

    transport: Plugged[Transport] = Field(
        default_factory=Entropic, description="from the two clean estimates to a direction"
    )
    adversary: VDOTAdversary | None = Field(
        default_factory=VDOTAdversary,
        description="the adversarial head; null: none, and no data",
    )


class VDOTTrainer(Matching, GridTrainer):
    """VDOT, spec 5.15; with ``transport: plain`` and no head it is ``dmd`` to the bit.

    Here: transport, gap and head in every update, DMD's normaliser on the first two together, heads
    and taps of the engine; the blur, the iterations, the gap's share and one fake-score update a
    student's are ours.
    """

    Config = VDOTConfig
    config: VDOTConfig
    clips = True
    proofs: ClassVar = {
        "transport": Proof(
            ("gaussian",),
            {
                "critic_steps": 2,
                "adversary": {"features": "state", "head": "mlp", "loss": "relativistic"},
            },
            effort=0.8,
        ),
    }


TRAINER = VDOTTrainer
