"""Stock pipelines of text-to-image models draw what our sampler draws with the family's adapter."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import VP, expand
from stepdistill.diffusion.sampler import first_state, full, move, sample
from stepdistill.diffusion.timesteps import Grid
from tests.helpers import noise
from tests.image_families import FAMILIES, Family

STEPS = 4
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def stable(prediction: str) -> Callable[[], Any]:
    """Stable Diffusion's scheduler: a step by DDIM ends at the table's first entry, not at 0."""
    return lambda: diffusers.DDIMScheduler(
        **SCALED,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def first_order() -> Any:
    """PixArt's scheduler in steps of the first order, which are DDIM's."""
    return diffusers.DPMSolverMultistepScheduler(**LINEAR, solver_order=1)


def euler(**config: Any) -> Callable[[], Any]:
    return lambda: diffusers.FlowMatchEulerDiscreteScheduler(**config)


def plain(cond: Cond, null: Cond, scale: float) -> dict[str, Any]:
    return {
        "prompt_embeds": cond.text,
        "negative_prompt_embeds": null.text,
        "guidance_scale": scale,
    }


def pooled(cond: Cond, null: Cond, scale: float) -> dict[str, Any]:
    more = {"pooled_prompt_embeds": cond.pooled, "negative_pooled_prompt_embeds": null.pooled}
    return {**plain(cond, null, scale), **more}


def sized(cond: Cond, null: Cond, scale: float) -> dict[str, Any]:
    assert cond.sizes is not None
    numbers = [int(v) for v in cond.sizes[0].tolist()]
    names = ("original_size", "crops_coords_top_left", "target_size")
    pairs = {name: tuple(numbers[2 * k : 2 * k + 2]) for k, name in enumerate(names)}
    return {**pooled(cond, null, scale), **pairs}


def masked(cond: Cond, null: Cond, scale: float) -> dict[str, Any]:
    return {
        **plain(cond, null, scale),
        "prompt_attention_mask": cond.mask,
        "negative_prompt_attention_mask": null.mask,
        "negative_prompt": None,
        "use_resolution_binning": False,
    }


def aura(cond: Cond, null: Cond, scale: float) -> dict[str, Any]:
    masks = {f"{name}_attention_mask": torch.ones(2, 5) for name in ("prompt", "negative_prompt")}
    return {**plain(cond, null, scale), **masks}


def flux(cond: Cond, null: Cond, scale: float) -> dict[str, Any]:
    told = 1.0 if cond.guidance is None else float(cond.guidance[0])
    return {**pooled(cond, null, scale), "true_cfg_scale": scale, "guidance_scale": told}


def flux2(cond: Cond, null: Cond, scale: float) -> dict[str, Any]:
    assert cond.guidance is not None
    return {"prompt_embeds": cond.text, "guidance_scale": float(cond.guidance[0])}


def qwen(cond: Cond, null: Cond, scale: float) -> dict[str, Any]:
    return {"prompt_embeds": cond.text, "prompt_embeds_mask": cond.mask}


def lcm(cond: Cond, null: Cond, scale: float) -> dict[str, Any]:
    assert cond.guidance is not None
    return {"prompt_embeds": cond.text, "guidance_scale": float(cond.guidance[0])}


@dataclass(frozen=True)
class Stock:
    """How a stock pipeline is asked.

    Args:
        cls: the pipeline's class.
        scheduler: makes its scheduler.
        asked: its arguments by condition, negative condition and guidance.
        parts: further parts of the pipeline.
        ratio: pixels of a side by latents.
        packs: whether latents go in and come out as rows of tokens.
        scales: guidance, by a negative prompt.
    """

    cls: str
    scheduler: Callable[[], Any]
    asked: Callable[[Cond, Cond, float], dict[str, Any]]
    parts: dict[str, Any]
    ratio: int = 8
    packs: bool = False
    scales: tuple[float, ...] = (1.0, 3.0)


SD = {"requires_safety_checker": False}
DYNAMIC = euler(use_dynamic_shifting=True)
STOCKS = {
    "sd1": Stock("StableDiffusionPipeline", stable("epsilon"), plain, SD),
    "sd2": Stock("StableDiffusionPipeline", stable("v_prediction"), plain, SD),
    "lcm": Stock("StableDiffusionPipeline", stable("epsilon"), lcm, SD, scales=(1.0,)),
    "sdxl": Stock("StableDiffusionXLPipeline", stable("epsilon"), sized, {}),
    "pixart-alpha": Stock("PixArtAlphaPipeline", first_order, masked, {}),
    "pixart-sigma": Stock("PixArtSigmaPipeline", first_order, masked, {}),
    "sd3": Stock("StableDiffusion3Pipeline", euler(shift=3.0), pooled, {}),
    "sana": Stock("SanaPipeline", euler(shift=3.0), masked, {}, ratio=32),
    "auraflow": Stock("AuraFlowPipeline", euler(shift=1.73), aura, {}),
    "flux-schnell": Stock("FluxPipeline", euler(), flux, {}, packs=True),
    "flux-dev": Stock("FluxPipeline", DYNAMIC, flux, {}, packs=True),
    "flux2": Stock("Flux2Pipeline", DYNAMIC, flux2, {}, scales=(1.0,)),
    "qwen-image": Stock("QwenImagePipeline", DYNAMIC, qwen, {}, packs=True, scales=(1.0,)),
}


def pipeline(cls: str, **parts: Any) -> Any:
    """A stock pipeline of these parts and no others."""
    kind = getattr(diffusers, cls)
    needed = inspect.signature(kind.__init__).parameters.values()
    none = {p.name: None for p in needed if p.default is p.empty and p.name != "self"}
    made = kind(**{**none, **parts})
    made.set_progress_bar_config(disable=True)
    return made


def images(stock: Stock, pipe: Any, x: Tensor, asked: dict[str, Any]) -> Tensor:
    """What a stock pipeline draws from latents [B, C, H, W], of the same shape."""
    height, width = (size * stock.ratio for size in x.shape[2:])
    given = pipe._pack_latents(x, *x.shape) if stock.packs else x
    found = pipe(
        **asked,
        latents=given.clone(),
        num_inference_steps=STEPS,
        output_type="latent",
        height=height,
        width=width,
    ).images
    if stock.packs:
        found = pipe._unpack_latents(found, height, width, stock.ratio)
        return found[:, :, 0] if found.dim() == 5 else found
    if found.dim() == 3:
        return pipe._unpack_latents_with_ids(found, pipe._prepare_latent_ids(x))
    return found


def grid_of(scheduler: Any, den: Denoiser) -> Grid:
    """The times that a scheduler went through."""
    if not isinstance(den.process, VP):
        return tuple(scheduler.sigmas.tolist())
    times = tuple((float(k) + 1) / den.process.size for k in scheduler.timesteps)
    ends = scheduler.config.get("set_alpha_to_one", True)
    return (*times, 0.0) if ends else (*times, den.process.t_min, 0.0)


@torch.no_grad()
def walk(den: Denoiser, z: Tensor, grid: Grid, cond: Cond, null: Cond, scale: float) -> Tensor:
    """As :func:`sample`, guided away from the condition ``null``."""
    if scale == 1:
        return sample(den, z, grid, cond, stop=STEPS)
    x_t = first_state(den.process, z, grid[0])
    for now, then in zip(grid[:STEPS], grid[1 : STEPS + 1], strict=True):
        t = full(z, now)
        h, away = den.raw(x_t, t, cond), den.raw(x_t, t, null)
        c = den.process.coefs(t).expand(x_t)
        x_t = move(den.prediction(away + scale * (h - away), x_t, c), den.process, full(z, then))
    return x_t


def far(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the wanted values' size."""
    return float((found - wanted).abs().max() / wanted.abs().mean())


def conditions(name: str, family: Family, x: Tensor) -> tuple[Cond, Cond]:
    """A condition and a negative one, which the pipeline is told the same sizes with."""
    cond, null = family.cond(), family.cond(seed=9)
    if "height" in family.told:
        sizes = torch.tensor([[8.0 * x.shape[2], 8.0 * x.shape[3]]]).repeat(2, 1)
        return replace(cond, sizes=sizes), replace(null, sizes=sizes)
    return cond, null


CASES = [(name, scale) for name, stock in STOCKS.items() for scale in stock.scales]


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_the_stock_pipeline_draws_the_same(name, scale) -> None:
    family, stock = FAMILIES[name], STOCKS[name]
    den, scheduler = family.denoiser(), stock.scheduler()
    if isinstance(den.process, VP):
        den = Denoiser(den.net, VP(scheduler.alphas_cumprod), family.head)
    key = "unet" if family.kind.startswith("UNet") else "transformer"
    pipe = pipeline(stock.cls, scheduler=scheduler, **{key: den.net}, **stock.parts)
    x = noise(3, (2, *family.shape))
    cond, null = conditions(name, family, x)
    wanted = images(stock, pipe, x, stock.asked(cond, null, scale))
    grid = grid_of(scheduler, den)
    z = x / expand(den.process.coefs(full(x, grid[0])).sigma, x)
    assert far(walk(den, z, grid, cond, null, scale), wanted) < 5e-5
    others = [replace(cond, text=-cond.text)]
    others += [replace(cond, pooled=-cond.pooled)] if cond.pooled is not None else []
    others += [replace(cond, sizes=2 * cond.sizes)] if cond.sizes is not None else []
    others += [replace(cond, mask=1 - cond.mask)] if cond.mask is not None else []
    others += [replace(cond, guidance=cond.guidance + 1)] if cond.guidance is not None else []
    for other in others:  # what it is told is heeded, so that the equality says something
        assert far(walk(den, z, grid, other, null, scale), wanted) > 0.05


def test_flux2_klein_draws_the_same() -> None:
    family = FAMILIES["flux2-klein"]
    den, scheduler, x = family.denoiser(), DYNAMIC(), noise(3, (2, *family.shape))
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
    )
    pipe = pipeline("Flux2KleinPipeline", scheduler=scheduler, transformer=den.net, vae=vae)
    cond, null = family.cond(), family.cond(seed=9)
    for scale in (1.0, 3.0):
        found = pipe(
            **plain(cond, null, scale),
            latents=x.clone(),
            num_inference_steps=STEPS,
            output_type="latent",
            height=8,
            width=12,
        ).images
        spread = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)[:, None, None]
        wanted = (pipe._patchify_latents(found) - vae.bn.running_mean[:, None, None]) / spread
        assert far(walk(den, x, grid_of(scheduler, den), cond, null, scale), wanted) < 5e-5


@pytest.mark.parametrize("steps", [1, 2])
def test_sana_sprint_draws_the_same(steps) -> None:
    """Its TrigFlow is rectified flow in other coordinates; what it draws between is fresh noise."""
    family = FAMILIES["sana-sprint"]
    den, cond, x = family.denoiser(), family.cond(), noise(3, (2, *family.shape))
    scheduler = diffusers.SCMScheduler()
    pipe = pipeline("SanaSprintPipeline", scheduler=scheduler, transformer=den.net)
    assert cond.guidance is not None
    wanted = pipe(
        prompt_embeds=cond.text,
        prompt_attention_mask=cond.mask,
        guidance_scale=float(cond.guidance[0]),
        intermediate_timesteps=1.3 if steps == 2 else None,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(4),
        latents=x.clone(),
        output_type="latent",
        use_resolution_binning=False,
        height=32 * x.shape[2],
        width=32 * x.shape[3],
    ).images
    t = scheduler.timesteps[:-1]
    grid = (*(torch.sin(t) / (torch.sin(t) + torch.cos(t))).tolist(), 0.0)
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found = sample(den, x, grid, cond, noise="fresh", fresh=lambda _: fresh)
    assert far(found, wanted) < 1e-4
    with torch.no_grad():
        other = replace(cond, guidance=cond.guidance + 1)
        found = sample(den, x, grid, other, noise="fresh", fresh=lambda _: fresh)
    assert far(found, wanted) > 0.05
