"""CogVideoX against the stock pipelines, and all that adapters promise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.process import VP, Process
from stepdistill.diffusion.saved import read_scheduler
from stepdistill.run.rng import seeded
from tests.helpers import noise, start_scale
from tests.prompted import CHECKS, ENGINES, Family, difference, quiet, states, train, walk

COG_SCHEDULER = {
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "snr_shift_scale": 3.0,
    "clip_sample": False,
}


def cog_scheduler(**config: Any) -> Any:
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(**COG_SCHEDULER | config)


def cog_process() -> Process:
    return VP(cog_scheduler().alphas_cumprod)


COG = Family(
    "CogVideoXTransformer3DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 12,
        "num_layers": 3,
        "sample_width": 10,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": 5,
        "use_rotary_positional_embeddings": True,
    },
    shape=(4, 3, 4, 6),
    cond={"text": (5, 12)},
    whole=(4, 3, 8, 10),
    told=lambda t: 1000 * t - 1,
    packed=lambda h: h.transpose(1, 2),
    process=cog_process,
    head="v",
)
COG_PLAIN = replace(COG, config=COG.config | {"use_rotary_positional_embeddings": False})
COG_DEEP = replace(
    COG,
    config=COG.config | {"patch_size_t": 2, "patch_bias": False},
    shape=(4, 4, 4, 6),
    whole=(4, 4, 8, 10),
)
COG_IMAGE = replace(
    COG_DEEP,
    config=COG_DEEP.config | {"in_channels": 8, "ofs_embed_dim": 8},
    cond=COG.cond | {"image": (4, 4, 4, 6)},
)
FAMILIES = {"rotary": COG, "plain": COG_PLAIN, "deep": COG_DEEP, "image": COG_IMAGE}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("check", CHECKS)
def test_adapter(family: Family, check: Any) -> None:
    check(family)


@pytest.mark.parametrize("name", ["rotary", "plain", "deep"])
@pytest.mark.parametrize("method", ENGINES)
def test_steps_of_training(name: str, method: str) -> None:
    train(FAMILIES[name], method)


def cog(
    scheduler: Any, net: Any, z: Tensor, cond: Cond, null: Cond, scale: float
) -> tuple[Any, Any]:
    """A pipeline and what it draws, channels first."""
    from diffusers import CogVideoXPipeline

    pipe = quiet(CogVideoXPipeline(None, None, None, net, scheduler))
    videos = pipe(
        height=8 * z.shape[3],
        width=8 * z.shape[4],
        num_frames=4 * z.shape[2] - 3,
        num_inference_steps=4,
        guidance_scale=scale,
        latents=z.transpose(1, 2),
        prompt_embeds=cond.text,
        negative_prompt_embeds=null.text,
        output_type="latent",
    ).frames
    return pipe, videos.transpose(1, 2)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, size) for name in FAMILIES if name != "image" for size in ((4, 6), (8, 10))),
        *((name, (10, 4)) for name in ("rotary", "plain")),  # beyond the size of training
    ],
)
def test_draws_the_same(name: str, scale: float, size: tuple[int, int]) -> None:
    family = replace(FAMILIES[name], shape=(*FAMILIES[name].shape[:2], *size))
    net, z, cond, null = (
        family.net(),
        family.noise(),
        family.conditions(),
        family.conditions(seed=9),
    )
    pipe, theirs = cog(cog_scheduler(), net, z, cond, null, scale)
    grid = (*((pipe.scheduler.timesteps + 1) / 1000).tolist(), 0.0)
    z = z / start_scale(family.process())  # stock pipelines begin with unit variance
    ours = walk(family.denoiser(net), z, grid, cond, null if scale > 1 else None, scale)
    found = difference(ours, theirs)
    print(f"{name} at {scale} of {size}: {found:.1e}")
    assert found < 1e-4


def test_from_pure_noise_draws_nearly_the_same() -> None:
    """Its last entry is 0, which a VP process takes for 2^-24 as other schedulers do: a share of
    2^-12 of the image is read into the first state."""
    scheduler = cog_scheduler(rescale_betas_zero_snr=True)
    family = replace(COG, process=lambda: VP(scheduler.alphas_cumprod))
    net, z, cond = family.net(), family.noise(), family.conditions()
    _, theirs = cog(scheduler, net, z, cond, cond, 1.0)
    found = difference(walk(family.denoiser(net), z, (1, 0.75, 0.5, 0.25, 0), cond), theirs)
    print(f"from pure noise: {found:.1e}")
    assert found < 2e-3


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_scheduler_is_read_with_its_shift(tmp_path: Path, shift: float) -> None:
    config = COG_SCHEDULER | {"snr_shift_scale": shift}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    process, head = read_scheduler(tmp_path, "CogVideoXDDIMScheduler")
    assert head == "v" and isinstance(process, VP)
    plain = VP(cog_scheduler(snr_shift_scale=1.0).alphas_cumprod)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    ratio = (plain.log_snr(t) - process.log_snr(t)).exp()
    torch.testing.assert_close(ratio, torch.full_like(t, shift), rtol=1e-4, atol=0)


def test_from_an_image_draws_the_same() -> None:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXImageToVideoPipeline

    net, z, cond = COG_IMAGE.net(), COG_IMAGE.noise(), COG_IMAGE.conditions()
    with seeded(0):
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        )
    pipe = quiet(CogVideoXImageToVideoPipeline(None, None, vae, net, cog_scheduler()))
    fed = states(net)
    theirs = pipe(
        image=noise(5, (2, 3, 32, 48)).tanh() / 2 + 0.5,
        height=32,
        width=48,
        num_frames=13,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=z.transpose(1, 2),
        prompt_embeds=cond.text,
        output_type="latent",
    ).frames.transpose(1, 2)
    told = replace(cond, image=fed[0].transpose(1, 2)[:, 4:])
    z = z / start_scale(COG_IMAGE.process())
    ours = walk(COG_IMAGE.denoiser(net), z, (1, 0.75, 0.5, 0.25, 0), told)
    found = difference(ours, theirs)
    print(f"from an image: {found:.1e}")
    assert found < 1e-4
