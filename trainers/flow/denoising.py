"""Train a teacher from scratch: 1-rectified flow, VP with any output, or EDM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from stepdistill.adapters import ADAPTERS, adapter_for
from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import EDM, RF, VP, Process
from stepdistill.diffusion.timesteps import Density, LogitNormal
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng, seeded
from stepdistill.trainers.base import Loss, Pass, Trainer, Turn
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.settings import Section, TrainConfig

REFUSALS = (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RuntimeError)
"""What constructors of networks raise for arguments that make no sense."""


class NetworkConfig(Section):
    """The network to train."""

    type: str = Field(description="a diffusers class that has an adapter")
    config: dict[str, Any] = Field(default_factory=dict, description="its constructor's arguments")


class DenoisingConfig(TrainConfig):
    """Settings of ``denoising``, the method of ``stepdistill teacher``."""

    method: str = Field("denoising", description="denoising")
    teacher: str = Field("", description="unused: the network starts from scratch")
    network: NetworkConfig = Field(description="what is trained")
    head: Literal["velocity", "eps", "v", "x0", "edm-f"] = Field(
        "velocity",
        description="what it predicts; velocity is rectified flow, edm-f is EDM's raw output, the "
        "rest are VP",
    )
    start: float | None = Field(
        1.0, gt=0, le=1, description="where its grid begins, as progress towards pure noise"
    )
    t: Density = Field(default_factory=LogitNormal, description="density of training times")
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of labels replaced by none")


class DenoisingTrainer(Trainer):
    """Mean squared error of the raw output (flow matching; DDPM; EDM), spec 4's 1-RF.

    EDM's weight of noise levels is the raw output's own; its density is ``t: {kind: logit_normal,
    mean: -1.2, std: 1.2}``.
    """

    Config = DenoisingConfig
    config: DenoisingConfig
    shortens = False
    needs = "data"
    sizes = (1, 2, 4, 8, 16, 32)
    proofs: ClassVar = {
        "flow": Proof(
            ("gaussian", "gmm2d"), {"network": {"type": "none"}, "t": {"kind": "uniform"}}
        )
    }

    def setup(self) -> None:
        """The "teacher" handed over is the fresh network itself, and is trained in place.

        Raises:
            UserError: guidance, which is the business of distillation.
        """
        c = self.config
        if c.guided:
            raise UserError(
                f"guidance={c.guidance:g}: a teacher is trained without; set it where the teacher "
                "is distilled"
            )
        self.add_player("student", self.teacher, c.optim, ema=True, total=c.steps, copy=False)

    @property
    def fixed_point(self) -> FixedPoint:
        """The exact denoiser, with the loss that noise leaves in it."""
        return FixedPoint("field")

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Squared error against the output of a network that knew x and z."""
        assert batch.x is not None
        den = self.denoiser("student")
        t = self.config.t.sample(rng.uniform("t", batch.index), self.process)
        z = self.z(batch, rng)
        cond = batch.cond
        if den.null_label is not None:
            drop = rng.uniform("drop", batch.index) < self.config.label_dropout
            cond = cond.unlabelled(drop, den.null_label)
        pred = den(self.process.noise(batch.x, z, t), t, cond)
        target = den.head.output(batch.x, z, pred.c, self.process.sigma_data)
        loss = (pred.h - target).square().mean()
        return Loss(loss, {"loss": loss})

    def passes(self) -> list[Pass]:
        """The network alone."""
        return [Pass("student", "train")]


def fresh_network(config: DenoisingConfig, classes: tuple[str, ...]) -> Denoiser:
    """A newly initialised network (torch's generator seeded by ``config.seed``).

    Raises:
        UserError: an unknown class, or arguments that it refuses or that do not fit the classes.
    """
    with building(config.network, config.seed) as made:
        net = made()
        if adapter_for(net).reads_text:
            raise UserError(
                f"network.type={config.network.type}: reads prompts, and is trained from scratch "
                "by no command here; take UNet2DModel or DiTTransformer2DModel"
            )
        return wrap_network(net, config, classes)


@contextmanager
def building(network: NetworkConfig, seed: int) -> Iterator[Callable[[], nn.Module]]:
    """A context whose value makes a network anew, by torch's generator at ``seed``.

    Raises:
        UserError: an unknown class, or arguments that it refuses, there or as they are used.
    """
    import diffusers

    kind = network.type
    cls = getattr(diffusers, kind, None)
    if cls is None:
        raise UserError(f"network.type: diffusers has no class {kind}")
    if kind not in ADAPTERS:
        raise UserError(f"network.type={kind} has no adapter; known are {', '.join(ADAPTERS)}")
    with seeded(seed):
        try:
            yield lambda: cls(**network.config)
        except UserError:
            raise
        except REFUSALS as error:
            raise UserError(f"network.config: {kind} refuses it: {error}") from error


def load_student(config: DenoisingConfig, folder: Path, classes: tuple[str, ...]) -> Denoiser:
    """The trained network of a finished run."""
    import diffusers

    cls = getattr(diffusers, config.network.type)
    return wrap_network(cls.from_pretrained(folder, use_safetensors=True), config, classes)


def wrap_network(net: nn.Module, config: DenoisingConfig, classes: tuple[str, ...]) -> Denoiser:
    """A network with the process and head of a config; the label after the classes is "none".

    Raises:
        UserError: the network's label table does not fit the classes.
    """
    names = known_classes(net, classes)
    return Denoiser(
        net,
        schedule(config.head),
        config.head,
        classes=names,
        null_label=len(names) if names else None,
    )


def known_classes(net: nn.Module, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes that a network can be told: the data's, or none where it takes no labels.

    Raises:
        UserError: its label table has not one row for each class and one for none.
    """
    adapter, count, kind = adapter_for(net), len(classes), type(net).__name__
    rows, spare = adapter.label_rows(net), adapter.null_label(net) is not None
    if rows and not classes:
        raise UserError(
            f"network.config: {kind} takes class labels, and the data has none; sort the images "
            "into class folders, or use a UNet2DModel without num_class_embeds"
        )
    need = count if spare else count + 1
    if rows and (rows < need if spare else rows != need):
        raise UserError(
            f"network.config: {adapter.label_key}={rows} does not fit {count} classes"
            f"{'' if spare else ' and one row for none'}; set it to {need}"
        )
    return classes if rows else ()


def schedule(head: str) -> Process:
    """Rectified flow, EDM, or for the other heads DDPM's linear schedule of 1,000 levels."""
    if head == "velocity":
        return RF()
    if head == "edm-f":
        return EDM()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return VP(torch.cumprod(1 - betas, dim=0))


TRAINER = DenoisingTrainer
