"""DMD: distribution matching distillation, the score part of DMD2 with backward simulation.

Each update draws an exit j of the student's grid, walks there as inference would (without a
graph), predicts the clean image with a graph, and moves it along the gap between a fake score,
trained online on the student's images, and the teacher's. With ``regression`` it is the first DMD:
a one-step student is also held to the images that the teacher's own walk makes of given noise.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from stepdistill.data.batch import Batch
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.sampler import full
from stepdistill.losses.distance import L2, Distance
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plugged, a_sample
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.score.matching import Matching, MatchingConfig
from stepdistill.trainers.score.rollout import GridConfig, GridTrainer
from stepdistill.trainers.settings import PairsConfig, Section


class RegressionConfig(Section):
    """DMD's regression on pairs of noise and the teacher's image of it."""

    weight: float = Field(0.25, gt=0, description="weight beside the matching")
    metric: Plugged[Distance] = Field(
        default_factory=L2, description="distance of the student's image to the pair's"
    )
    pairs: PairsConfig = Field(default_factory=PairsConfig, description="noise and its images")

    @field_validator("metric", mode="before")
    @classmethod
    def _no_lpips(cls, value: Any) -> Any:
        if (value.get("kind") if isinstance(value, dict) else value) == "lpips":
            raise PydanticCustomError(
                "lpips",
                "needs a pretrained network, which is not part of stepdistill; take l2 or "
                "pseudo_huber",
            )
        return value


class DMDConfig(GridConfig, MatchingConfig):
    """Settings of ``dmd``."""

    regression: RegressionConfig | None = Field(
        None, description="regression on the teacher's pairs, for one-step students; null: none"
    )

    @property
    def pair_store(self) -> PairsConfig | None:
        """See :attr:`TrainConfig.pair_store`."""
        return self.regression.pairs if self.regression else None


class DMDTrainer(Matching, GridTrainer):
    """The score part of DMD2 (Yin et al. 2024), spec 5.4; ``dmd2`` adds the adversarial part.

    The regression is that of DMD (Yin et al. 2023), spec 5.3. Here: its distance is taken in
    pixels, where the paper has LPIPS, which needs a pretrained network; the fake score's times are
    logit-normal unless ``critic_t`` says otherwise; the normaliser is DMD2's, without the factor
    alpha that DMD's text has besides, which is not verified; and matching and regression see one
    batch of labels, the pairs', where the paper draws a smaller one for it.
    """

    Config = DMDConfig
    config: DMDConfig
    clips = True
    proofs: ClassVar = {
        "one step": Proof(("gaussian", "classes")),
        "two steps": Proof(("gaussian",), {"student_steps": 2}),
        "rewarded": Proof(
            ("gaussian",),
            {"weights": ("vsd", {"kind": "reward", "reward": "brightness", "beta": 2.0})},
        ),
        "regression": Proof(
            ("gaussian",),
            {"regression": {"pairs": {"num": 4096, "steps": 128, "batch_size": 4096}}},
            effort=0.5,
        ),
    }

    def setup(self) -> None:
        """See :meth:`GridTrainer.setup`.

        Raises:
            UserError: regression of a student that is not one step from pure noise, beside
                an adversarial head, or to another law than the matching's.
        """
        super().setup()
        c = self.config
        if c.regression is None:
            return
        if c.student_steps > 1:
            raise UserError(
                f"student_steps={c.student_steps}: regression is for one-step students; set "
                "student_steps=1 or regression=null"
            )
        if self.start != 1:
            raise UserError(
                f"start={self.start:g}: regression is on pairs from pure noise; set start=1, or "
                "regression=null"
            )
        if c.guidance != 1 and not c.guide.leads:
            raise UserError(
                f"guidance={c.guidance:g}: pairs are of the guided law, and with "
                f"guide={c.guide.kind} the matching is to the unguided; set guide=teacher, or "
                "guidance=1"
            )
        if c.adversary is not None:
            raise UserError(
                "adversary: a batch holds data or pairs, not both; set adversary=null or "
                "regression=null"
            )
        self.needs = "pairs"

    def student_loss(self, batch: Batch, rng: Rng) -> Loss:
        """The matching and, on top, the regression on the batch's pairs."""
        matched, regression = super().student_loss(batch, rng), self.config.regression
        if regression is None:
            return matched
        assert batch.x is not None and batch.z is not None
        top = full(batch.z, self.top)
        x_t = expand(self.process.coefs(top).sigma, batch.z) * batch.z
        x = self.shown(self.denoiser("student")(x_t, top, batch.cond).x)
        each = regression.metric(x - batch.x)
        distance = a_sample(regression.metric, "regression.metric", each, len(x)).mean()
        value = matched.value + regression.weight * distance
        return Loss(value, matched.logs | {"regression": distance})

    def passes(self) -> list[Pass]:
        """Those of the grid, and one of the student on the pairs."""
        more = [Pass("student", "train")] if self.config.regression else []
        return super().passes() + more


TRAINER = DMDTrainer
