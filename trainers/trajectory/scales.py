"""Guidance by a scale that is drawn a sample, and told to the student where it is to heed it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.beginning import told
from stepdistill.trainers.settings import TrainConfig


def _ordered(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] > span[1]:
        raise PydanticCustomError("order", "the first must not be above the second")
    return span


Scale = Annotated[float, Field(ge=0)]
ScaleRange = Annotated[tuple[Scale, Scale], AfterValidator(_ordered)]


class ScalesConfig(TrainConfig):
    """Settings of trainers whose teacher may be asked with any guidance of a range."""

    guidance_range: ScaleRange | None = Field(
        None,
        description="guidance drawn uniformly a sample, which the student is told; `guidance` is "
        "what it samples by then",
    )

    @property
    def guided(self) -> bool:
        """See :attr:`TrainConfig.guided`; also by a range."""
        return super().guided or self.guidance_range is not None

    @property
    def tells(self) -> bool:
        """Whether the student is told its scale."""
        return self.guidance_range is not None

    def without_effect(self) -> list[str]:
        """See :meth:`TrainConfig.without_effect`; a scale beside a range that is not told."""
        untold = self.guidance_range is not None and not self.tells
        idle = untold and "guidance" in self.model_fields_set
        own = ["guidance: does nothing with a guidance_range that is not told"] if idle else []
        return own + super().without_effect()

    @property
    def guides_law(self) -> bool:
        """See :attr:`TrainConfig.guides_law`: by what the student is told."""
        return self.guidance != 1 if self.tells else self.guided


class Scales(Trainer):
    """What draws and tells scales, for trainers whose config is a :class:`ScalesConfig`."""

    config: ScalesConfig
    untold: ClassVar = "guidance_range=null"  # the key by which a student is told nothing

    def heeding(self, first: Denoiser, copy: bool = True, /, **more: str) -> tuple[Denoiser, bool]:
        """What the student begins as, and whether it is to be copied first.

        Args:
            first: what it begins as where it is told nothing.
            copy: whether that is to be copied.
            more: further numbers that it is told, each with the key by which it would not be.

        Raises:
            UserError: scales below 1 are to be told, or others than what it samples by; or adapters
                are to be told anything.
        """
        c = self.config
        if c.tells and c.guidance_range is not None:
            low, high = c.guidance_range
            if low < 1 or not low <= c.guidance <= high:
                raise UserError(
                    f"guidance={c.guidance:g}: the student is told scales of guidance_range={low:g}"
                    f",{high:g}, which must begin at 1 or more and hold it"
                )
            more["guidance"] = self.untold
        if not more:
            return first, copy
        own = told(c, first, *more, instead=next(iter(more.values())))
        own.scale = c.guidance if "guidance" in more else own.scale
        return own, False

    def scale(self, batch: Batch, rng: Rng) -> float | Tensor:
        """The guidance by which the teacher is asked: one for all, or drawn a sample [B]."""
        if batch.cond.guidance is not None:  # drawn already, to be told
            return batch.cond.guidance
        if self.config.guidance_range is None:
            return self.config.guidance
        low, high = self.config.guidance_range
        drawn: Tensor = low + (high - low) * rng.uniform("guidance", batch.index)
        return drawn

    def telling(self, batch: Batch, rng: Rng) -> Batch:
        """The batch, whose conditions tell the scales where the student is told them."""
        if not self.config.tells:
            return batch
        scale = torch.as_tensor(self.scale(batch, rng), dtype=torch.float32)
        return replace(batch, cond=replace(batch.cond, guidance=scale))
