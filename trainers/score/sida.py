"""SiDA: adversarial score identity distillation; SiD and a head on the fake score's features.

The head is the mean of the features' channels, without weights of its own: the fake score's first
half learns to tell data from samples while the whole of it learns the samples' score.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from stepdistill.losses.gap import Seen
from stepdistill.losses.heads import ChannelMean, HeadPlug
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plugged
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.adversary import AdversaryConfig
from stepdistill.trainers.score.sid import SiDConfig, SiDTrainer


class SiDAAdversary(AdversaryConfig):
    """The adversarial head of ``sida``."""

    head: Plugged[HeadPlug] = Field(
        default_factory=ChannelMean, description="the head on each feature"
    )
    student: float = Field(1e-4, ge=0, description="weight in the student's loss, for each entry")
    from_step: int = Field(100, ge=0, description="step from which it takes part")
    same_noise: bool = Field(True, description="noise data and samples by the same noise")


class SiDAConfig(SiDConfig):
    """Settings of ``sida``."""

    alpha: float = Field(
        1.0, ge=0, description="1: SIM's gradient; 0.5: the exact one; above 1: past the lag"
    )
    adversary: SiDAAdversary | None = Field(
        default_factory=SiDAAdversary, description="the adversarial head; it needs data"
    )


class SiDATrainer(SiDTrainer):
    """SiDA (Zhou et al. 2024), spec 5.7; before ``adversary.from_step`` it is ``sid``.

    The adversarial loss has the scores' normaliser, as in its code. Here: the discriminator's
    loss is not weighted by the noise level, its weights are set by the config and not by the
    number of pixels, and the fake score has no warm-up unless ``critic_first`` gives it one.
    """

    Config = SiDAConfig
    config: SiDAConfig
    proofs: ClassVar = {
        "adversarial": Proof(
            ("gaussian",),
            {
                "adversary": {
                    "features": "state",
                    "head": "mlp",
                    "from_step": 5,
                    "student": 1e-3,
                }
            },
        ),
    }

    def setup(self) -> None:
        """See :meth:`ScoreTrainer.setup`.

        Raises:
            UserError: no adversarial head.
        """
        if self.config.adversary is None:
            raise UserError("adversary: without a head sida is sid; set method=sid")
        super().setup()

    def push(self, seen: Seen) -> Tensor | None:
        """See :meth:`Implicit.push`: the weights of the scores' loss."""
        return self.weight(seen)[0]


TRAINER = SiDATrainer
