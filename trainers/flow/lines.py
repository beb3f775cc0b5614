"""What methods on pairs of noise and image share: the lines between them, and distances of images.

Every process and head will do: a line is straight in rectified flow's coordinates, begins where
the student's sampler does, and its velocity is the difference of the student's two estimates.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Prediction
from stepdistill.diffusion.sampler import full
from stepdistill.diffusion.timesteps import uniform_grid
from stepdistill.losses.features import ImageFeatures, RandomConv, widths
from stepdistill.losses.reflow import feature_distance, line_noise
from stepdistill.losses.terms import network
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plugged
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Trainer, Turn
from stepdistill.trainers.fixed_point import FixedPoint
from stepdistill.trainers.settings import PairsConfig, Section, TrainConfig


class PerceptualConfig(Section):
    """LPIPS's distance of the clean estimate to the image, by a frozen network that is at hand."""

    features: Plugged[ImageFeatures] = Field(
        default_factory=RandomConv,
        description="the frozen network; LPIPS itself has VGG and learned weights of channels, "
        "which are not part of stepdistill",
    )
    weight: float = Field(1.0, gt=0, description="weight beside the metric")


def refuse_singular(trainer: Trainer) -> None:
    """Refuse a teacher whose velocity is singular at the clean end.

    Raises:
        UserError: it predicts clean images.
    """
    if trainer.teacher.head.name == "x0":
        raise UserError(
            f"teacher: {trainer.config.method} regresses velocities, and that of a network which "
            "predicts clean images divides by the noise, 0 at the clean end; use a teacher that "
            "predicts the velocity, v or the noise"
        )


class LineConfig(TrainConfig):
    """Settings of methods on pairs."""

    pairs: PairsConfig = Field(default_factory=PairsConfig, description="noise and its images")

    @property
    def pair_store(self) -> PairsConfig:
        """See :attr:`TrainConfig.pair_store`."""
        return self.pairs


class LineTrainer(Trainer):
    """One student on pairs; a subclass says at which states, and against what."""

    Config = LineConfig
    config: LineConfig
    needs = "pairs"

    def setup(self) -> None:
        """The student starts as the teacher, its estimates as they are: no weight is changed.

        Raises:
            UserError: an output whose velocity is singular at the clean end.
        """
        refuse_singular(self)
        total = self.config.steps
        self.add_player("student", self.initial, self.config.optim, ema=True, total=total)

    @property
    def fixed_point(self) -> FixedPoint:
        """The end of the teacher's own walk, with which the pairs were made, from every noise."""
        steps, solver = self.config.pairs.steps, self.config.pairs.walk
        grid = uniform_grid(self.process, steps)
        if solver is None:
            return FixedPoint("map", follow=lambda t: grid, straight=self.flows)
        whole = solver.model_copy(update={"substeps": steps})
        ends = (grid[0], grid[-1])  # of one walk: some solvers remember the step before
        return FixedPoint("map", follow=lambda t: ends, solver=whole, straight=self.flows)

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        return [Turn("student", self.loss)]

    @abstractmethod
    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """What the student is held to."""

    def look(self, config: PerceptualConfig | None) -> Perceptual | None:
        """The distance by a frozen network that a config asks for, if it does."""
        return None if config is None else Perceptual(config, self.teacher.sample_shape)

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Image and noise [B, *S] of the batch."""
        assert batch.x is not None and batch.z is not None
        return batch.x, batch.z

    def line(self, x: Tensor, z: Tensor) -> Tensor:
        """The noise whose line to x begins at the sampler's first state of z; see the loss."""
        return line_noise(x, z, self.process.coefs(full(x, self.top)).expand(x))

    def velocity(self, pred: Prediction) -> Tensor:
        """The velocity [B, *S] along lines: the raw output itself where it is that."""
        plain = self.process.name == "rf" and self.teacher.head.name == "velocity"
        return pred.h if plain else pred.drift


class Perceptual:
    """The frozen network of a config, and the distance by it.

    Args:
        config: which network, and how much it counts.
        shape: of one sample.

    Raises:
        UserError: features of a single channel, which have no direction.
    """

    def __init__(self, config: PerceptualConfig, shape: tuple[int, ...]) -> None:
        self.config, self.shape = config, shape
        with torch.no_grad():
            found = network(config.features, shape, "cpu")(torch.zeros(2, *shape))
        if min(widths(found)) < 2:
            raise UserError(
                f"perceptual.features: a level of kind={config.features.kind} has one channel, and "
                "LPIPS compares directions of channels; use random_conv or timm"
            )

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The weighted distance [B] of samples [B, *S]; no gradient flows to b."""
        net = network(self.config.features, self.shape, str(a.device))
        with torch.no_grad():
            goal = net(b.float())
        return self.config.weight * feature_distance(net(a.float()), goal)
