"""Networks of text-to-image models as denoisers: inputs, features, gradients, training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from stepdistill.adapters import ADAPTERS, adapter_for, lora, mlp
from stepdistill.adapters.base import Adapter, spaced
from stepdistill.adapters.cond import Cond
from stepdistill.adapters.recompute import recompute
from stepdistill.adapters.text import unwrapped
from stepdistill.adapters.unet import guidance_waves
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.trainers.score import reading
from tests.helpers import batch_of, make, noise
from tests.image_families import FAMILIES, TOKENS, Family

TIMES = torch.tensor([0.3, 0.8])
NAMES = sorted(FAMILIES)
FED = {  # the time that a network is told, by process time
    "sd3": lambda t: 1000 * t,
    "sana": lambda t: 500 * t,  # its timestep_scale is 0.5
    **dict.fromkeys(("sd1", "sd2", "sdxl", "lcm"), lambda t: 1000 * t - 1),
    **dict.fromkeys(("pixart-alpha", "pixart-sigma"), lambda t: 1000 * t - 1),
}  # the rest: t itself
PACKED = {"flux-schnell", "flux-dev", "qwen-image"}
ROWS = {"flux2", "flux2-klein"}


def squares(x: Tensor) -> Tensor:
    """The stock packing of images [B, C, H, W]."""
    return diffusers.FluxPipeline._pack_latents(x, *x.shape)


def rows(x: Tensor) -> Tensor:
    """The stock packing of Flux.2's latents."""
    return diffusers.Flux2Pipeline._pack_latents(x)


class Stub(nn.Module):
    """Answers any call with a given tensor, and keeps what it was called with."""

    def __init__(self, config: Any, answer: Tensor) -> None:
        super().__init__()
        self.config, self.answer = config, answer
        self.fed: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, *args: Any, **keys: Any) -> tuple[Tensor]:
        self.fed = x, keys["timestep"] if "timestep" in keys else args[0]
        return (self.answer,)


class Wrapper(nn.Module):
    """A data-parallel wrapper's shape: no config, the network as ``module``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.module = net

    def forward(self, *args: Any, **keys: Any) -> Any:
        return self.module(*args, **keys)


def case(name: str) -> tuple[Family, Denoiser, Tensor, Cond]:
    """A family, its denoiser, states and a condition."""
    family = FAMILIES[name]
    return family, family.denoiser(), noise(3, (2, *family.shape)), family.cond()


@pytest.mark.parametrize("name", NAMES)
def test_known_parts_are_read_and_times_told(name) -> None:
    """The raw output in the family's own sign and packing gives back x and z."""
    family, net = FAMILIES[name], FAMILIES[name].net()
    x, z = noise(5, (2, *family.shape)), noise(6, (2, *family.shape))
    c = family.process.coefs(TIMES).expand(x)
    h = {"velocity": z - x, "eps": z, "v": c.alpha * z - c.sigma * x}[family.head]
    if family.config.get("out_channels", 8) == 8 and name.startswith("pixart"):
        h = torch.cat([h, noise(7, h.shape)], dim=1)  # a variance, which is dropped
    packing = squares if name in PACKED else rows if name in ROWS else lambda x: x
    stub = Stub(net.config, packing(h))
    den = Denoiser(stub, family.process, family.head, adapter=adapter_for(net))
    x_t = c.alpha * x + c.sigma * z
    found = den(x_t, TIMES, family.cond())
    torch.testing.assert_close(found.x, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.z, z, rtol=0, atol=1e-5)
    assert stub.fed is not None
    assert torch.equal(stub.fed[0], packing(x_t))
    told = FED.get(name, lambda t: t)(TIMES)
    torch.testing.assert_close(stub.fed[1], told, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_state_and_parameters(name) -> None:
    family, den, x, cond = case(name)
    assert den.sample_shape == (family.usual or (family.shape[0], 8, 8))
    assert den.beside == 0 and den.adapter.label_rows(den.net) == 0
    x.requires_grad_(True)
    den(x, TIMES, cond).x.square().mean().backward()
    assert float(x.grad.abs().sum()) > 0
    reached = [p.grad is not None and bool(p.grad.any()) for p in den.net.parameters()]
    assert sum(reached) > 0.8 * len(reached)
    plain = {k: p.grad.clone() for k, p in den.net.named_parameters() if p.grad is not None}
    den.net.zero_grad()
    recompute(den.net)
    den(x.detach(), TIMES, cond).x.square().mean().backward()
    for key, param in den.net.named_parameters():
        if key in plain:
            torch.testing.assert_close(param.grad, plain[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_pictures(name) -> None:
    family, den, x, cond = case(name)
    adapter, net = den.adapter, den.net
    names = adapter.blocks(net)
    assert 0 < len(names) <= 5 and set(adapter.taps(net)) <= {k for k, _ in net.named_modules()}
    for taps in (adapter.taps(net), names):
        found = den.features(x, TIMES, cond, taps)
        pred = den(x, TIMES, cond, taps=taps)
        frozen = den(x, TIMES, cond, taps=taps, tail="frozen")
        assert frozen.features[taps[0]].requires_grad and not frozen.h.requires_grad
        for tap, feature in zip(taps, found, strict=True):
            assert torch.equal(feature, pred.features[tap]) and feature.requires_grad
            if family.kind.startswith("UNet"):
                continue
            tokens = 96 if name.startswith("sana") else 24  # of 8x12, by 1 or by 2x2; or of 4x6
            if tap.startswith("single") and not name.startswith("flux-"):  # behind the prompt's
                tokens += TOKENS + (8 if name == "auraflow" else 0)  # AuraFlow has 8 of its own
            assert feature.shape[1] == tokens


@pytest.mark.parametrize("name", NAMES)
def test_further_numbers_and_adapters(name) -> None:
    _, den, x, cond = case(name)
    plain = den(x, TIMES, cond).h
    told = den.extended("end")
    here, there = cond.ending(torch.zeros(2)), cond.ending(TIMES / 2)
    assert torch.equal(told(x, TIMES, here).h, plain)
    with torch.no_grad():
        for param in told.net.extra_embedding.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(0)))
    assert not torch.allclose(told(x, TIMES, here).h, told(x, TIMES, there).h, atol=1e-5)
    branch = den.adapt("a", rank=2, alpha=2, targets=None, seed=0)
    assert lora.present(den.net, den.adapter.lora_targets) == den.adapter.lora_targets
    assert torch.equal(branch(x, TIMES, cond).h, plain)
    for param in branch.own():
        param.requires_grad_(True)
    branch(x, TIMES, cond).h.square().mean().backward()
    assert any(bool(p.grad.any()) for p in branch.own())
    with torch.no_grad():
        for param in branch.own():
            param.add_(0.1)
    assert not torch.allclose(branch(x, TIMES, cond).h, plain, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_wrappers_and_rows(name) -> None:
    _, den, x, cond = case(name)
    plain = den(x, TIMES, cond).h.detach()
    with torch.autocast("cpu", torch.bfloat16):
        rough = den(x, TIMES, cond).h.detach()
    assert rough.dtype == torch.float32 and bool(rough.isfinite().all())
    assert float((rough - plain).abs().mean() / plain.abs().mean()) < 0.5
    den.route(Wrapper(den.net))
    assert torch.equal(den(x, TIMES, cond).h, plain)
    den.route(None)
    one = den(x[1:], TIMES[1:], cond.rows(slice(1, 2))).h
    torch.testing.assert_close(one, plain[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_lacks_is_said_in_a_line(name) -> None:
    family, den, x, cond = case(name)
    parts = {"height": "sizes"}
    for told in ("text", *family.told):
        part = parts.get(told, told)
        less = replace(cond, **{part: None})
        if part in ("mask", "guidance"):
            assert bool(den(x, TIMES, less).h.isfinite().all())
        if part != "mask":
            with pytest.raises(ValueError, match=rf"^{family.kind}: every sample needs .*{part}"):
                den.adapter(den.net, x, TIMES, less)


@pytest.mark.parametrize("name", ["lcm", "flux-dev", "flux2", "sana-sprint"])
def test_a_branch_tells_the_scale_that_it_is_set_to(name) -> None:
    _, den, x, cond = case(name)
    told = den(x, TIMES, cond).h
    silent = replace(cond, guidance=None)
    assert not torch.allclose(den(x, TIMES, silent).h, told, atol=1e-4)
    den.scale = 3.5
    assert torch.equal(den(x, TIMES, silent).h, told)


@pytest.mark.parametrize("method", ["dmd2", "consistency", "reflow"])
@pytest.mark.parametrize("name", NAMES)
def test_engines_train_a_step(name, method, monkeypatch) -> None:
    family = FAMILIES[name]
    teacher = family.denoiser()
    monkeypatch.setattr(type(teacher.adapter), "sample_shape", lambda self, net: family.shape)
    monkeypatch.setattr(reading, "Cond", lambda label, image: family.cond(1))  # of its one probe
    made = make(method, teacher, batch_size=2)
    cond = replace(family.cond(), guidance=None)  # methods hold it for their teacher's guidance
    before = {k: v.clone() for k, v in made.students()[0].denoiser.weights().items()}
    for step in range(2):  # at the first one DMD's scores are one and the same
        made.prepare(step)
        logs = made.step(step, replace(batch_of(made, step), cond=cond))
        assert logs and all(bool(torch.isfinite(v).all()) for v in logs.values())
    after = made.students()[0].denoiser.weights()
    assert any(not torch.equal(v, before[k]) for k, v in after.items())


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_table_names_what_there_is(name) -> None:
    kind = getattr(diffusers, name, None) or getattr(mlp, name)
    assert issubclass(kind, nn.Module)
    adapter = adapter_for(type(name, (), {})())
    assert isinstance(adapter, Adapter) and adapter.lora_targets


def test_waves_of_a_guidance_scale_are_the_stock_ones() -> None:
    scale = torch.tensor([1.0, 3.5, 8.0])
    stock = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding
    for width in (8, 9, 256):
        wanted = stock(None, scale - 1, embedding_dim=width)
        torch.testing.assert_close(guidance_waves(scale, width), wanted, rtol=0, atol=1e-3)


def test_networks_of_other_conditions_are_refused() -> None:
    family = FAMILIES["sd1"]
    x, cond = noise(3, (2, *family.shape)), family.cond()
    for keys in ({"addition_embed_type": "image"}, {"encoder_hid_dim_type": "ip_image_proj"}):
        den = family.denoiser()
        den.net.register_to_config(**keys)
        with pytest.raises(ValueError, match=next(iter(keys.values()))):
            den(x, TIMES, cond)
    edit = replace(FAMILIES["qwen-image"], config={**FAMILIES["qwen-image"].config})
    den = edit.denoiser()
    den.net.register_to_config(zero_cond_t=True)
    with pytest.raises(ValueError, match="zero_cond_t"):
        den(x, TIMES, edit.cond())
    den = FAMILIES["flux-schnell"].denoiser()
    with pytest.raises(ValueError, match=r"\(7, 12\) must be multiples of 2"):
        den(x[:, :, :7], TIMES, FAMILIES["flux-schnell"].cond())


def test_images_beside_the_state() -> None:
    """Inpainting's extra channels follow the state's, of Flux.1 Fill square by square."""
    sd = replace(FAMILIES["sd1"], config={**FAMILIES["sd1"].config, "in_channels": 9})
    fill = replace(
        FAMILIES["flux-schnell"],
        config={**FAMILIES["flux-schnell"].config, "in_channels": 48, "out_channels": 16},
    )
    for family, beside in ((sd, 5), (fill, 8)):
        den, x = family.denoiser(), noise(3, (2, *family.shape))
        assert den.beside == beside and den.sample_shape[0] == 4
        image = noise(4, (2, beside, *family.shape[1:]))
        assert den(x, TIMES, replace(family.cond(), image=image)).h.shape == x.shape


def test_small_networks_and_names() -> None:
    bare = replace(FAMILIES["sd1"], config={**FAMILIES["sd1"].config, "mid_block_type": None})
    den = bare.denoiser()
    assert den.adapter.taps(den.net) == ("down_blocks.1",)
    for size, keys in ((64, {}), (128, {"addition_embed_type": "text_time"})):
        den.net.register_to_config(sample_size=None, **keys)
        assert den.sample_shape == (4, size, size)
    with pytest.raises(ValueError, match="no sample_size"):
        plain = diffusers.UNet2DModel(
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
        adapter_for(plain).sample_shape(plain)
    assert spaced(["a", "b"]) == ("a", "b") and spaced(list("abcdefgh")) == ("b", "d", "f", "h")
    net = nn.Linear(1, 1)
    assert unwrapped(torch.compile(net)) is net and unwrapped(Wrapper(net)) is net
