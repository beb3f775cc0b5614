"""Dropout of what learns by comparing two of its own estimates, the same in both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field

from stepdistill.adapters.dropout import Drop, droppers
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
        description="share that the student's dropout layers drop while it trains, the same in all "
        "passes that are compared; null: none, as the teacher",
    )


class Dropping(Trainer):
    """What drops, for trainers whose config is a :class:`DroppingConfig`."""

    config: DroppingConfig

    def check_dropout(self) -> None:
        """To be called by ``setup``.

        Raises:
            UserError: no layer would drop, or what is recomputed would not.
        """
        c = self.config
        if c.dropout and not droppers(self.teacher.net):
            raise UserError(
                f"dropout: {type(self.teacher.net).__name__} has no layers that drop; set dropout="
                "null"
            )
        if c.dropout and c.gradient_checkpointing:
            raise UserError(
                "dropout: what is computed a second time would not drop; set "
                "gradient_checkpointing=false or dropout=null"
            )

    @contextmanager
    def dropping(self, rng: Rng, *networks: Denoiser | None) -> Iterator[None]:
        """Calls of these networks in this context drop alike, anew each step and process."""
        if self.config.dropout is None:
            yield
            return
        drop = Drop(self.config.dropout, rng.integer(f"dropout-{self.rank}", 2**31))
        found = [net for net in networks if net is not None]
        for net in found:
            net.dropout = drop
        try:
            yield
        finally:
            for net in found:
                net.dropout = None
