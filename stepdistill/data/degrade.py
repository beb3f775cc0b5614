"""Pictures made small, and small pictures brought back to size: what super-resolution sees.

A picture is halved again and again, each time by the same rule and with draws of its own level, so
that degradations are nested: what is seen at 1/4 is a function of what is seen at 1/2 and noise.

Shapes: B batch, C channels, H W pixels; values in [-1, 1].
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor
from torch.nn import functional

from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng

REACH = 3.0  # of a blur's kernel, in its standard deviations


class DegradeConfig(BaseModel):
    """How pictures are made small."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    factor: int = Field(2, ge=2, description="how many times smaller, each way: 2, 4, 8, ...")
    kernel: Literal["area", "bicubic"] = Field(
        "area", description="of every halving: means of four pixels, or bicubic, antialiased"
    )
    blur: tuple[float, float] | None = Field(
        None,
        description="range of a Gaussian blur's standard deviation, in pixels, before every "
        "halving, drawn for each picture; null: none",
    )
    noise: float = Field(
        0.0, ge=0, description="standard deviation of noise that every halving adds"
    )

    @field_validator("factor")
    @classmethod
    def _halvings(cls, factor: int) -> int:
        if factor & (factor - 1):
            raise PydanticCustomError("factor", "must be 2, 4, 8 or another power of two")
        return factor

    @field_validator("blur")
    @classmethod
    def _ordered(cls, blur: tuple[float, float] | None) -> tuple[float, float] | None:
        if blur is not None and not 0 <= blur[0] <= blur[1]:
            raise PydanticCustomError("order", "must be two numbers from 0 on, the larger last")
        return blur

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse pictures (C, H, W) that cannot be halved so often.

        Raises:
            UserError: a side is no multiple of the factor.
        """
        if len(shape) != 3 or any(side % self.factor for side in shape[1:]):
            raise UserError(
                f"data.degrade.factor={self.factor}: samples are {list(shape)}, whose sides are no "
                "multiples of it; set data.size to one"
            )


def lowered(
    x: Tensor, config: DegradeConfig, rng: Rng, index: Tensor, factor: int | None = None
) -> Tensor:
    """Pictures [B, C, H, W] made small: [B, C, H / factor, W / factor].

    Args:
        x: the pictures.
        config: how they are made small.
        rng: source of blurs and noise.
        index: places of the pictures in the global batch [B], keys of their randomness.
        factor: in place of the config's; of the same draws a smaller one is passed by on the way.
    """
    level, side = 0, 1
    while side < (config.factor if factor is None else factor):
        x = _halved(x, config, rng, index, level)
        level, side = level + 1, 2 * side
    return x


def raised(low: Tensor, size: tuple[int, int]) -> Tensor:
    """Small pictures [B, C, h, w] brought to a size (H, W), bicubically."""
    return functional.interpolate(low, size=size, mode="bicubic", align_corners=False)


def seen(
    x: Tensor, config: DegradeConfig, rng: Rng, index: Tensor, factor: int | None = None
) -> Tensor:
    """What is seen of pictures [B, C, H, W]: made small, and brought back to their size."""
    return raised(lowered(x, config, rng, index, factor), (x.shape[-2], x.shape[-1]))


def _halved(x: Tensor, config: DegradeConfig, rng: Rng, index: Tensor, level: int) -> Tensor:
    if config.blur is not None:
        low, high = config.blur
        x = _blurred(x, low + (high - low) * rng.uniform(f"blur-{level}", index), high)
    if config.kernel == "area":
        x = functional.avg_pool2d(x, 2)
    else:
        half = (x.shape[-2] // 2, x.shape[-1] // 2)
        x = functional.interpolate(
            x, size=half, mode="bicubic", align_corners=False, antialias=True
        )
    if config.noise:
        x = x + config.noise * rng.normal(f"degrade-{level}", index, tuple(x.shape[1:])).to(x)
    return x


def _blurred(x: Tensor, std: Tensor, most: float) -> Tensor:
    """Pictures [B, C, H, W], each under a Gaussian of its own standard deviation [B]."""
    reach = min(int(REACH * most + 0.5), min(x.shape[-2:]) - 1)
    if reach < 1:
        return x
    count, channels, height, width = x.shape
    place = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-0.5 * (place / std.to(x).clamp_min(1e-3)[:, None]) ** 2)
    weights = (weights / weights.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    flat = functional.pad(x, (reach, reach, reach, reach), mode="reflect")
    flat = flat.reshape(1, count * channels, *flat.shape[-2:])
    for kernel in (weights[:, None, :, None], weights[:, None, None, :]):
        flat = functional.conv2d(flat, kernel, groups=count * channels)
    return flat.reshape(count, channels, height, width)
