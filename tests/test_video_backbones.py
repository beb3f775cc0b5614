"""Networks of videos against the stock pipelines, and all that adapters promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.adapters.video import LTXAdapter
from stepdistill.diffusion.denoiser import Experts
from stepdistill.run.rng import seeded
from tests.helpers import noise
from tests.prompted import (
    CHECKS,
    ENGINES,
    Family,
    difference,
    from_stock,
    quiet,
    sigmas,
    states,
    train,
    walk,
)

WAN = Family(
    "WanTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 12,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    },
    shape=(4, 3, 4, 6),
    cond={"text": (5, 12), "mask": (5,)},
    whole=(4, 21, 60, 104),
)
WAN_IMAGE = replace(
    WAN,
    config=WAN.config | {"in_channels": 12, "image_dim": 10, "added_kv_proj_dim": 24},
    cond=WAN.cond | {"second": (3, 10), "image": (8, 3, 4, 6)},
)
LTX = Family(
    "LTXVideoTransformer3DModel",
    {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "num_layers": 3,
        "caption_channels": 12,
    },
    shape=(8, 3, 2, 4),
    cond={"text": (5, 12), "mask": (5,)},
    whole=(8, 21, 16, 22),
    packed=lambda h: h.flatten(2).transpose(1, 2),
)
HUNYUAN = Family(
    "HunyuanVideoTransformer3DModel",
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 12,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 4, 4),
    },
    shape=(4, 3, 4, 6),
    cond={"text": (5, 12), "mask": (5,), "pooled": (8,), "guidance": ()},
    whole=(4, 33, 90, 160),
    needs=("text", "pooled"),
)
HUNYUAN_PLAIN = replace(
    HUNYUAN,
    config=HUNYUAN.config | {"guidance_embeds": False},
    cond={k: v for k, v in HUNYUAN.cond.items() if k != "guidance"},
)
FAMILIES = {
    "wan": WAN,
    "wan-image": WAN_IMAGE,
    "ltx": LTX,
    "hunyuan": HUNYUAN,
    "hunyuan-plain": HUNYUAN_PLAIN,
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("check", CHECKS)
def test_adapter(family: Family, check: Any) -> None:
    check(family)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.endswith("-image")])
@pytest.mark.parametrize("method", ENGINES)
def test_steps_of_training(name: str, method: str) -> None:
    train(FAMILIES[name], method)


def flow(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def filled(cond: Cond) -> Tensor:
    """A prompt's embeddings with zeros for what is no token."""
    return cond.text * cond.mask[:, :, None]


def wan(net: Any, z: Tensor, cond: Cond, null: Cond, scale: float, **more: Any) -> tuple[Any, Any]:
    """A pipeline and what it draws; ``more`` is the pipeline's."""
    from diffusers import WanPipeline

    pipe = quiet(WanPipeline(None, None, None, flow(shift=3.0), net, **more))
    videos = pipe(
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=scale,
        latents=z,
        prompt_embeds=filled(cond),
        negative_prompt_embeds=filled(null),
        output_type="latent",
    ).frames
    return pipe, videos


def ltx(net: Any, z: Tensor, cond: Cond, null: Cond, scale: float) -> tuple[Any, Any]:
    """A pipeline and what it draws, unpacked by its own hand."""
    from diffusers import LTXPipeline

    pipe = quiet(LTXPipeline(flow(use_dynamic_shifting=True), None, None, None, net))
    rate = 25 if cond.sizes is None else int(cond.sizes[0])
    tokens = pipe(
        height=64,
        width=128,
        num_frames=17,
        frame_rate=rate,
        num_inference_steps=4,
        guidance_scale=scale,
        latents=pipe._pack_latents(z),
        prompt_embeds=cond.text,
        prompt_attention_mask=cond.mask,
        negative_prompt_embeds=null.text,
        negative_prompt_attention_mask=null.mask,
        output_type="latent",
    ).frames
    return pipe, pipe._unpack_latents(tokens, 3, 2, 4)


def hunyuan(net: Any, z: Tensor, cond: Cond, null: Cond, scale: float) -> tuple[Any, Any]:
    """A pipeline and what it draws, told a guidance of 3.5."""
    from diffusers import HunyuanVideoPipeline

    pipe = quiet(HunyuanVideoPipeline(None, None, net, None, flow(shift=7.0), None, None))
    videos = pipe(
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=3.5,
        true_cfg_scale=scale,
        latents=z,
        prompt_embeds=cond.text,
        prompt_attention_mask=cond.mask,
        pooled_prompt_embeds=cond.pooled,
        negative_prompt_embeds=null.text,
        negative_prompt_attention_mask=null.mask,
        negative_pooled_prompt_embeds=null.pooled,
        output_type="latent",
    ).frames
    return pipe, videos


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "stock"),
    [("wan", wan), ("ltx", ltx), ("hunyuan", hunyuan), ("hunyuan-plain", hunyuan)],
)
def test_the_stock_pipeline_of_a_flow_draws_the_same(name: str, stock: Any, scale: float) -> None:
    assert from_stock(FAMILIES[name], stock, scale) < 1e-4


def test_ltx_is_told_the_frames_a_second() -> None:
    net, z, cond = LTX.net(), LTX.noise(), LTX.conditions()
    slow = replace(cond, sizes=torch.full((2, 1), 12.0))
    pipe, theirs = ltx(net, z, slow, cond, 1.0)
    ours = [walk(LTX.denoiser(net), z, sigmas(pipe), c, None) for c in (slow, cond)]
    assert difference(ours[0], theirs) < 1e-4 < difference(ours[1], theirs)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_wan_of_two_experts_draws_the_same(scale: float) -> None:
    nets, z = [WAN.net(), WAN.net(seed=1)], WAN.noise()
    cond, null = WAN.conditions(), WAN.conditions(seed=9)
    pipe, theirs = wan(nets[0], z, cond, null, scale, transformer_2=nets[1], boundary_ratio=0.8)
    both = Experts([WAN.denoiser(net) for net in nets], [0.8])
    grid = sigmas(pipe)
    assert [both.index_at(level) for level in grid[:-1]] == [0, 0, 1, 1]
    ours = walk(both, z, grid, cond, null if scale > 1 else None, scale)
    found = difference(ours, theirs)
    print(f"two experts at {scale}: {found:.1e}")
    assert found < 1e-4


def test_wan_with_a_time_for_every_token_draws_the_same() -> None:
    """Wan 2.2's small network: where no frame is given, all tokens' times are one."""
    net, z, cond, null = WAN.net(), WAN.noise(), WAN.conditions(), WAN.conditions(seed=9)
    pipe, theirs = wan(net, z, cond, null, 1.0, expand_timesteps=True)
    assert difference(walk(WAN.denoiser(net), z, sigmas(pipe), cond), theirs) < 1e-4


def test_wan_from_an_image_draws_the_same() -> None:
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline

    net, z, cond = WAN_IMAGE.net(), WAN_IMAGE.noise(), WAN_IMAGE.conditions()
    with seeded(0):
        vae = AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    pipe = quiet(WanImageToVideoPipeline(None, None, vae, flow(shift=3.0), transformer=net))
    pipe.encode_image = lambda image, device: cond.second[:1]
    fed = states(net)
    theirs = pipe(
        image=noise(5, (1, 3, 32, 48)).tanh() / 2 + 0.5,
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=z,
        prompt_embeds=filled(cond),
        output_type="latent",
    ).frames
    told = replace(cond, image=fed[0][:, 4:], second=cond.second[:1].repeat(2, 1, 1))
    found = difference(walk(WAN_IMAGE.denoiser(net), z, sigmas(pipe), told), theirs)
    print(f"wan from an image: {found:.1e}")
    assert found < 1e-4


def test_a_network_that_is_told_guidance_hears_the_branch_s_own() -> None:
    den, cond = HUNYUAN.denoiser(), HUNYUAN.conditions()
    x_t, t = HUNYUAN.noise(), torch.tensor([0.3, 0.9])
    told = den(x_t, t, cond).h
    silent = replace(cond, guidance=None)
    assert difference(den(x_t, t, silent).h, told) > 1e-5  # hears 1
    den.scale = 3.5
    assert torch.equal(den(x_t, t, silent).h, told)
    with pytest.raises(ValueError, match=r"needs the guidance scale .*\(cond.guidance\)"):
        den.adapter(den.net, x_t, 1000 * t, silent)


def test_what_is_not_known_is_refused_in_a_line() -> None:
    family = replace(HUNYUAN, config=HUNYUAN.config | {"image_condition_type": "token_replace"})
    with pytest.raises(ValueError, match="image_condition_type=token_replace"):
        family.denoiser()(family.noise(), torch.tensor([0.3, 0.9]), family.conditions())
    with pytest.raises(ValueError, match="patch_size=1"):
        LTXAdapter().sample_shape(replace(LTX, config=LTX.config | {"patch_size": 2}).net())
