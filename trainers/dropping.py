"""Dropout of what learns by comparing two of its own estimates, the same in both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field

from stepdistill.adapters.dropout import Drop, droppers
from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.settings import TrainConfig


class DroppingConfig(TrainConfig):
    """Settings of trainers whose student may drop."""

    dropout: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share that the student's dropout layers drop in what it compares of its own, "
        "the same entries of a sample in all of these passes; null: none",
    )


class Dropping(Trainer):
    """What drops, for trainers whose config is a :class:`DroppingConfig`."""

    config: DroppingConfig

    def check_dropout(self) -> None:
        """To be called by ``setup``.

        Raises:
            UserError: no layer would drop, or a compiled or recomputed one would not.
        """
        c, net = self.config, self.initial.net
        if c.dropout is None:
            return
        if not droppers(net):
            raise UserError(
                f"dropout: {type(net).__name__} has no layers that drop; set dropout=null"
            )
        for key in ("compile", "gradient_checkpointing"):
            if getattr(c, key):
                raise UserError(
                    f"dropout: networks do not drop with {key}; set {key}=false or dropout=null"
                )

    @contextmanager
    def dropping(self, batch: Batch, rng: Rng, *networks: Denoiser | None) -> Iterator[None]:
        """Calls of these networks with the whole batch drop alike in this context.

        What is dropped is a function of the seed, the step and a sample's index, as all noise is.
        """
        if self.config.dropout is None:
            yield
            return
        drop = Drop(
            self.config.dropout,
            lambda layer, count: rng.bits(f"dropout-{layer}", batch.index, count),
        )
        found = [net for net in networks if net is not None]
        for net in found:
            net.dropout = drop
        try:
            yield
        finally:
            for net in found:
                net.dropout = None
