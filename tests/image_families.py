"""Tiny networks of every family of text-to-image models, and conditions and pipelines for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import RF, VP, Process
from tests.helpers import noise, scaled_linear

WIDTH, TOKENS, POOLED = 16, 5, 12  # of text embeddings, and of pooled ones

UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + POOLED,
}
PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "cross_attention_dim": 24,
    "caption_channels": WIDTH,
    "sample_size": 8,
}
SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": WIDTH,
    "sample_size": 8,
}
SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": POOLED,
    "pos_embed_max_size": 8,
}
AURA = {
    "sample_size": 8,
    "num_mmdit_layers": 2,
    "num_single_dit_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 16,
    "pos_embed_max_size": 64,
}
FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": POOLED,
    "axes_dims_rope": (4, 2, 2),
}
FLUX2 = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (2, 2, 2, 2),
}
QWEN = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 2, 2),
}


@dataclass(frozen=True)
class Family:
    """A tiny network of a family.

    Args:
        kind: its class.
        config: its config.
        shape: of a sample.
        told: what it is told beside text, names of :class:`Cond`'s parts.
        head: what it puts out; flows are on RF, the rest on VP.
        usual: the shape of samples by its config alone, where that is another.
    """

    kind: str
    config: dict[str, Any]
    shape: tuple[int, ...] = (4, 8, 12)
    told: tuple[str, ...] = ()
    head: str = "velocity"
    usual: tuple[int, ...] | None = None

    @property
    def process(self) -> Process:
        """The process that its networks are trained on."""
        return RF() if self.head == "velocity" else VP(scaled_linear())

    def net(self) -> Any:
        """A seeded network whose output is not 0."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = getattr(diffusers, self.kind)(**self.config)
            stir(net)
        return net.eval()

    def denoiser(self) -> Denoiser:
        """Its denoiser."""
        return Denoiser(self.net(), self.process, self.head)

    def cond(self, size: int = 2, seed: int = 1) -> Cond:
        """The conditions of a batch."""
        parts: dict[str, Callable[[], Tensor]] = {
            "mask": lambda: (torch.arange(TOKENS) < 3 + torch.arange(size)[:, None]).long(),
            "pooled": lambda: noise(seed + 1, (size, POOLED)),
            "sizes": lambda: torch.tensor([[64.0, 80.0, 0.0, 8.0, 64.0, 64.0]]).repeat(size, 1),
            "height": lambda: torch.tensor([[64.0, 80.0]]).repeat(size, 1),
            "guidance": lambda: torch.full((size,), 3.5),
        }
        given = {("sizes" if k == "height" else k): parts[k]() for k in self.told}
        return Cond(text=noise(seed, (size, TOKENS, WIDTH)), **given)


def stir(net: nn.Module) -> None:
    """Give parameters that begin as one number other values, and matrices larger ones."""
    with torch.no_grad():
        for param in net.parameters():
            if float((param - param.mean()).abs().max()) < 1e-6:
                param.add_(0.2 * torch.randn(param.shape))
            elif param.dim() == 2:
                param.mul_(2)


FAMILIES = {
    "sd1": Family("UNet2DConditionModel", UNET, head="eps"),
    "sd2": Family("UNet2DConditionModel", {**UNET, "use_linear_projection": True}, head="v"),
    "sdxl": Family("UNet2DConditionModel", {**UNET, **XL}, told=("pooled", "sizes"), head="eps"),
    "lcm": Family(
        "UNet2DConditionModel", {**UNET, "time_cond_proj_dim": 8}, told=("guidance",), head="eps"
    ),
    "pixart-alpha": Family(
        "PixArtTransformer2DModel",
        {**PIXART, "sample_size": 128, "use_additional_conditions": True},
        told=("mask", "height"),
        head="eps",
        usual=(4, 128, 128),
    ),
    "pixart-sigma": Family("PixArtTransformer2DModel", PIXART, told=("mask",), head="eps"),
    "sd3": Family("SD3Transformer2DModel", SD3, told=("pooled",)),
    "sana": Family("SanaTransformer2DModel", {**SANA, "timestep_scale": 0.5}, told=("mask",)),
    "sana-sprint": Family(
        "SanaTransformer2DModel", {**SANA, "guidance_embeds": True}, told=("mask", "guidance")
    ),
    "flux-schnell": Family("FluxTransformer2DModel", FLUX, told=("pooled",), usual=(4, 128, 128)),
    "flux-dev": Family(
        "FluxTransformer2DModel",
        {**FLUX, "guidance_embeds": True},
        told=("pooled", "guidance"),
        usual=(4, 128, 128),
    ),
    "flux2": Family(
        "Flux2Transformer2DModel", FLUX2, (16, 4, 6), told=("guidance",), usual=(16, 64, 64)
    ),
    "flux2-klein": Family(
        "Flux2Transformer2DModel",
        {**FLUX2, "guidance_embeds": False},
        (16, 4, 6),
        usual=(16, 64, 64),
    ),
    "qwen-image": Family("QwenImageTransformer2DModel", QWEN, told=("mask",), usual=(4, 128, 128)),
    "auraflow": Family("AuraFlowTransformer2DModel", AURA),
}
"""By a model's name: one tiny network of each kind of conditions that stock pipelines give."""
