"""GDD: innate one-step generators, adversarial training alone with most of the network frozen.

A diffusion network makes whole images in one step almost as it is: it needs a discriminator on
projected features, no distillation, and (GDD-I) its convolutions may stay what they were. The
teacher gives the first weights only.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.sampler import full
from stepdistill.losses.adversarial import AdversarialLoss, NonSaturating
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plugged
from stepdistill.run.rng import Rng
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.score.opponent import PictureConfig, PictureOpponent
from stepdistill.trainers.score.opposing import OpposingConfig, OpposingTrainer


class ProjectedConfig(PictureConfig):
    """A discriminator on randomly projected features, as of Projected GANs."""

    loss: Plugged[AdversarialLoss] = Field(
        default_factory=NonSaturating, description="what its logits cost both sides"
    )
    project: int | None = Field(
        64, ge=1, description="channels of a random projection of the features; null: none"
    )
    r1: float = Field(5e-3, ge=0, description="weight of the approximate R1 penalty; 0: none")


class GDDConfig(OpposingConfig):
    """Settings of ``gdd``."""

    freeze: tuple[str, ...] | None = Field(
        None,
        description="patterns for names of the student's parameters that stay as they are, such as "
        "*.conv1.*; []: none, which is GDD; null: GDD-I, by the network's family",
    )
    adversary: ProjectedConfig = Field(
        default_factory=ProjectedConfig, description="the discriminator, on pictures"
    )


class GDDTrainer(OpposingTrainer):
    """GDD and GDD-I (Zheng and Yang 2024), spec 5.11.

    GDD-I's rule is for UNets: convolutions of the blocks and attention's output projections stay
    frozen; normalisation, embeddings, queries, keys, values and shortcuts are trained. The paper
    has none for transformers. Here: for DiT the outputs of attention and the feed-forward layers
    stay frozen, and a UNet's resampling convolutions as well. Also ours: R1 is the approximate
    one in every update, weighed to equal the paper's; heads are told the class beside the features
    and not by a projection; and these are of whatever frozen network the config names.
    """

    Config = GDDConfig
    config: GDDConfig
    proofs: ClassVar = {
        "all trained": Proof(
            ("gaussian",),
            {
                "freeze": (),
                "adversary": {
                    "features": {"kind": "random_conv", "widths": (16,)},
                    "head": "mlp",
                    "project": None,
                    "r1": 10.0,
                },
            },
            effort=0.8,
            batch=4,
        ),
    }

    @property
    def fixed_point(self) -> FixedPoint:
        """The data's law, to which the discriminator alone holds the student."""
        return FixedPoint("law")

    def opposed(self) -> PictureOpponent:
        """See :meth:`OpposingTrainer.opposed`."""
        return PictureOpponent(self.config.adversary, self.teacher, self.config.seed)

    def fixed(self) -> list[str]:
        """See :meth:`OpposingTrainer.fixed`.

        Raises:
            UserError: a family without a rule, a pattern that no parameter has, nothing left to
                train, or adapters.
        """
        patterns, net = self.config.freeze, self.initial.net
        if patterns is None:
            patterns = self.initial.adapter.innate
            if not patterns:
                raise UserError(
                    f"freeze: no rule of GDD-I is known for {type(net).__name__}; name patterns, "
                    "or set freeze=[] to train all of it"
                )
        if patterns and self.config.lora is not None:
            raise UserError("freeze: adapters leave the network as it is; set lora=null, or []")
        names = [name for name, _ in net.named_parameters()]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                if self.config.freeze is None:
                    continue  # a rule of a family covers layers that a network need not have
                raise UserError(
                    f"freeze: no parameter of {type(net).__name__} is named like {pattern}; "
                    f"there are {', '.join(names[:3])}, ..."
                )
        found = [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)]
        if len(found) == len(names):
            raise UserError("freeze: nothing is left to train; name fewer parameters")
        return found

    def generate(self, batch: Batch, rng: Rng) -> Tensor:
        """One step from noise, as inference takes it."""
        z = self.z(batch, rng)
        t = full(z, self.top)
        x_t = self.process.noise(z.new_zeros(z.shape), z, t)
        return self.shown(self.denoiser("student")(x_t, t, batch.cond).x)


TRAINER = GDDTrainer
