"""The autoencoder of a latent model: pictures to latents as its network takes them, and back.

Shapes: B batch, C channels of pixels and c of latents, *S pixels and *s latent cells.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

AT_ONCE = 8  # pictures, of which large ones take much memory


class Codec:
    """A frozen autoencoder of diffusers, with its latents' scale and shift; it goes to the device
    of what it is given.

    Args:
        vae: an AutoencoderKL, AutoencoderDC, AutoencoderTiny, or one of videos.

    Raises:
        ValueError: an autoencoder whose latents' scale is not known.
    """

    def __init__(self, vae: nn.Module) -> None:
        self.vae = vae.eval().requires_grad_(False)
        config: Any = vae.config
        self.mean, self.std = _moments(vae, config)
        self.scale = float(getattr(config, "scaling_factor", None) or 1.0)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)
        if hasattr(vae, "bn"):
            raise ValueError(f"{type(vae).__name__}: the scale of its latents is not known here")

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents [B, c, *s] fp32 of pictures [B, C, *S] in [-1, 1]: the posterior's mode."""
        return torch.cat([self._encoded(part) for part in x.split(AT_ONCE)])

    def _encoded(self, x: Tensor) -> Tensor:
        net: Any = self.vae.to(x.device)
        made = net.encode(x.to(self.dtype))
        if hasattr(made, "latent_dist"):
            latents = made.latent_dist.mode()
        else:
            latents = made.latent if hasattr(made, "latent") else made.latents
        return self._normal(latents.float())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, C, *S] fp32, about in [-1, 1], of latents [B, c, *s]."""
        net: Any = self.vae.to(latents.device)
        parts = [
            net.decode(self._raw(part.float()).to(self.dtype), return_dict=False)[0].float()
            for part in latents.split(AT_ONCE)
        ]
        return torch.cat(parts)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the latents of a picture (C, *S), found by coding one."""
        found = self.encode(torch.zeros(1, *shape, device=next(self.vae.parameters()).device))
        return tuple(found.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.vae.parameters()).dtype

    def _normal(self, raw: Tensor) -> Tensor:
        if self.mean is None:
            return (raw - self.shift) * self.scale
        mean, std = (_along(value, raw) for value in (self.mean, self.std))
        return (raw - mean) * self.scale / std

    def _raw(self, latents: Tensor) -> Tensor:
        if self.mean is None:
            return latents / self.scale + self.shift
        mean, std = (_along(value, latents) for value in (self.mean, self.std))
        return latents * std / self.scale + mean


def _moments(vae: Any, config: Any) -> tuple[Tensor | None, Tensor | None]:
    """Mean and deviation of the latents' channels, where an autoencoder tells them."""
    found = []
    for name in ("latents_mean", "latents_std"):
        value = getattr(config, name, None)
        value = dict(vae.named_buffers()).get(name) if value is None else value
        found.append(None if value is None else torch.as_tensor(value, dtype=torch.float32))
    mean, std = found
    known = mean is not None and std is not None and math.prod(mean.shape) > 0
    return (mean, std) if known else (None, None)


def _along(value: Tensor | None, like: Tensor) -> Tensor:
    """Numbers a channel [c] along latents [B, c, *s]."""
    assert value is not None
    return value.to(like.device).reshape(1, -1, *(1,) * (like.dim() - 2))
