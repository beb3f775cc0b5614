"""Guidance policies of score distillation: the scales at which teacher and fake score are asked.

A new one is a subclass with ``scales``; a config names it by ``guide: {kind: FILE.py:CLASS}``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from stepdistill.run.plug import Plug

Scale = float | Tensor
Draw = Callable[[], Tensor]


class Guide(Plug):
    """A guidance policy.

    ``fakes`` tells whether the fake score is guided too; it then trains without a class at times.
    ``own_scale`` tells that the config's key ``guidance`` plays no part.
    """

    fakes: ClassVar[bool] = False
    own_scale: ClassVar[bool] = False

    def on(self, scale: float) -> bool:
        """Whether the teacher is guided, where ``scale`` is the config's key ``guidance``."""
        return scale != 1

    def on_fake(self, scale: float) -> bool:
        """Whether the fake score is guided when it is asked."""
        return self.fakes and self.on(scale)

    def trained(self) -> float:
        """The scale at which the fake score itself is trained; 1 is none."""
        return 1.0

    @property
    def leads(self) -> bool:
        """Whether the student rests at the guided teacher's law, or else at the data's own."""
        return not self.fakes

    @abstractmethod
    def scales(self, scale: float, draw: Draw) -> tuple[Scale, Scale]:
        """Scales of teacher and fake score, one number or one a sample.

        Args:
            scale: the config's ``guidance``.
            draw: gives uniforms [B] in (0, 1); a policy that draws nothing does not call it.
        """


class Teacher(Guide):
    """The teacher alone, by ``guidance``."""

    def scales(self, scale: float, draw: Draw) -> tuple[Scale, Scale]:
        """See :meth:`Guide.scales`."""
        return scale, 1.0


class Both(Guide):
    """Teacher and fake score alike, by ``guidance`` (SwiftBrush)."""

    fakes = True

    def scales(self, scale: float, draw: Draw) -> tuple[Scale, Scale]:
        """See :meth:`Guide.scales`."""
        return scale, scale


class Spread(Guide):
    """Both alike, by a scale drawn for every sample (SNOOPI's PG-SB, Nguyen et al. 2024)."""

    fakes = True
    own_scale = True
    low: float = Field(0.5, ge=0, description="least scale")
    high: float = Field(4.0, ge=0, validate_default=True, description="greatest scale")

    @field_validator("high")
    @classmethod
    def _ordered(cls, high: float, info: ValidationInfo) -> float:
        if high < info.data.get("low", 0.0):
            raise PydanticCustomError("order", f"must not be below low={info.data['low']}")
        return high

    def on(self, scale: float) -> bool:
        """Always."""
        return True

    def scales(self, scale: float, draw: Draw) -> tuple[Scale, Scale]:
        """See :meth:`Guide.scales`."""
        drawn = self.low + draw() * (self.high - self.low)
        return drawn, drawn


class LongShort(Guide):
    """The teacher by ``guidance``, the fake score by scales of its own (SiD-LSG, Zhou et al. 2024).

    ``train`` and ``fake`` equal to ``guidance`` are its long and short guidance alike. Then the
    fake score's guided estimate is what it was trained to be, the plain estimate of the student's
    images, so the student rests at the guided teacher's law. Greater ones of ``train`` alone
    shorten what is asked of the fake score, which lengthens what the student learns.
    """

    fakes = True
    train: float = Field(1.0, ge=0, description="scale at which the fake score is trained")
    fake: float = Field(1.0, ge=0, description="scale at which it is asked")

    def on_fake(self, scale: float) -> bool:
        """See :meth:`Guide.on_fake`; the config's ``guidance`` plays no part."""
        return self.fake != 1

    @property
    def leads(self) -> bool:
        """See :attr:`Guide.leads`."""
        return True

    def trained(self) -> float:
        """See :meth:`Guide.trained`."""
        return self.train

    def scales(self, scale: float, draw: Draw) -> tuple[Scale, Scale]:
        """See :meth:`Guide.scales`."""
        return scale, self.fake
