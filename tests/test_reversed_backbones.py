"""Lumina 2, Z-Image and HiDream against the stock pipelines, and all that adapters promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from tests.prompted import CHECKS, ENGINES, Family, from_stock, quiet, train

LUMINA2 = Family(
    "Lumina2Transformer2DModel",
    {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 3,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (32, 16, 16),
        "cap_feat_dim": 12,
    },
    shape=(4, 4, 6),
    cond={"text": (5, 12), "mask": (5,)},
    whole=(4, 8, 8),
    told=lambda t: 1 - t,
    packed=lambda h: -h,
)
Z_IMAGE = Family(
    "ZImageTransformer2DModel",
    {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 12,
        "axes_dims": [4, 6, 6],
        "axes_lens": [80, 16, 16],
    },
    shape=(4, 4, 6),
    cond={"text": (5, 12), "mask": (5,)},
    whole=(4, 128, 128),
    told=lambda t: 1 - t,
    packed=lambda h: list((-h).unsqueeze(2)),
)
HIDREAM = Family(
    "HiDreamImageTransformer2DModel",
    {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_channels": [12, 10],
        "text_emb_dim": 6,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (8, 8),
        "llama_layers": [0, 1, 1],
    },
    shape=(4, 8, 8),
    cond={"text": (5, 12), "second": (2, 3, 10), "pooled": (6,)},
    whole=(4, 8, 8),
    packed=lambda h: -h,
    needs=("text", "second", "pooled"),
    smooth={"num_activated_experts": 4},  # which of them are asked changes by jumps
)
HIDREAM_WIDE = replace(HIDREAM, shape=(4, 4, 16))  # what is not square takes a way of its own
FAMILIES = {family.name: family for family in (LUMINA2, Z_IMAGE, HIDREAM)}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("check", CHECKS)
def test_adapter(family: Family, check: Any) -> None:
    check(family)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("method", ENGINES)
def test_steps_of_training(family: Family, method: str) -> None:
    train(family, method)


def scheduler(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def lumina2(net: Any, z: Tensor, cond: Cond, null: Cond, scale: float) -> tuple[Any, Tensor]:
    """A pipeline and what it draws."""
    from diffusers import Lumina2Pipeline

    pipe = quiet(Lumina2Pipeline(net, scheduler(shift=6.0), None, None, None))
    images = pipe(
        height=32,
        width=48,
        num_inference_steps=4,
        guidance_scale=scale,
        cfg_normalization=False,
        latents=z,
        prompt_embeds=cond.text,
        prompt_attention_mask=cond.mask,
        negative_prompt_embeds=null.text,
        negative_prompt_attention_mask=null.mask,
        output_type="latent",
    ).images
    return pipe, images


def z_image(net: Any, z: Tensor, cond: Cond, null: Cond, scale: float) -> tuple[Any, Tensor]:
    """A pipeline and what it draws; its scale is one less, and its texts have no filling."""
    from diffusers import ZImagePipeline

    pipe = quiet(ZImagePipeline(scheduler(shift=3.0), None, None, None, net))
    texts, others = (
        [row[own.bool()] for row, own in zip(c.text, c.mask, strict=True)] for c in (cond, null)
    )
    images = pipe(
        height=32,
        width=48,
        num_inference_steps=4,
        guidance_scale=scale - 1,
        latents=z,
        prompt_embeds=texts,
        negative_prompt_embeds=others,
        output_type="latent",
    ).images
    return pipe, images


def hidream(net: Any, z: Tensor, cond: Cond, null: Cond, scale: float) -> tuple[Any, Tensor]:
    """A pipeline and what it draws, at its own size."""
    from diffusers import HiDreamImagePipeline

    pipe = quiet(HiDreamImagePipeline(scheduler(shift=3.0), None, *[None] * 8, net))
    pipe.default_sample_size = 8
    images = pipe(
        height=8 * z.shape[2],
        width=8 * z.shape[3],
        num_inference_steps=4,
        guidance_scale=scale,
        latents=z,
        prompt_embeds_t5=cond.text,
        prompt_embeds_llama3=cond.second.transpose(0, 1),
        pooled_prompt_embeds=cond.pooled,
        negative_prompt_embeds_t5=null.text,
        negative_prompt_embeds_llama3=null.second.transpose(0, 1),
        negative_pooled_prompt_embeds=null.pooled,
        output_type="latent",
    ).images
    return pipe, images


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("family", "stock"),
    [(LUMINA2, lumina2), (Z_IMAGE, z_image), (HIDREAM, hidream), (HIDREAM_WIDE, hidream)],
)
def test_the_stock_pipeline_draws_the_same(family: Family, stock: Any, scale: float) -> None:
    assert from_stock(family, stock, scale) < 1e-4


def test_hidream_trains_its_routed_experts() -> None:
    den, cond = HIDREAM.denoiser(), HIDREAM.conditions()
    den(HIDREAM.noise(), torch.tensor([0.3, 0.9]), cond).x.square().mean().backward()
    routed = [
        p for n, p in den.net.named_parameters() if ".experts." in n or n.endswith("gate.weight")
    ]
    assert routed and all(p.grad is not None and p.grad.abs().max() > 0 for p in routed)
    assert not den.net.training
