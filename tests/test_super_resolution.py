"""Small pictures made large: degradations, networks that see a picture, scale distillation."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DModel
from PIL import Image
from torch import Tensor, nn

from stepdistill.adapters.base import Adapter
from stepdistill.adapters.cond import Cond
from stepdistill.commands.evaluate import evaluate, open_reference
from stepdistill.commands.export import export
from stepdistill.commands.sample import sample as draw
from stepdistill.commands.teacher import teacher
from stepdistill.commands.train import train
from stepdistill.data.degrade import DegradeConfig, lowered, raised, seen
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.process import RF
from stepdistill.eval.generate import generate, load_pipeline
from stepdistill.eval.images import load_images, save_images
from stepdistill.eval.paired import psnr
from stepdistill.pipelines.upscale import UpscalePipeline
from stepdistill.run.assets import ASSETS, load_teacher
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from tests.helpers import dit_teacher, make, same, saved, seeing_teacher

INDEX = torch.arange(6)
FOUR = {"data": {"degrade": {"factor": 4}}}


def pictures(count: int = 6, channels: int = 1, side: int = 8) -> Tensor:
    return Rng(1).normal("picture", torch.arange(count), (channels, side, side)).tanh()


# Degradations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["area", "bicubic"])
@pytest.mark.parametrize("more", [{}, {"blur": (0.3, 1.2), "noise": 0.1}])
def test_degradations_are_nested(kernel, more) -> None:
    """What is seen at 1/4 is made of what is seen at 1/2, by draws of its own."""
    config = DegradeConfig(factor=4, kernel=kernel, **more)
    x, rng = pictures(side=16), Rng(3)
    half = lowered(x, config, rng, INDEX, 2)
    whole = lowered(x, config, rng, INDEX)
    assert (half.shape, whole.shape) == ((6, 1, 8, 8), (6, 1, 4, 4))
    assert torch.equal(half, lowered(x, replace_factor(config, 2), rng, INDEX))
    if not more:
        assert torch.equal(whole, lowered(half, replace_factor(config, 2), rng, INDEX))
    other = lowered(x, config, Rng(4), INDEX)
    assert torch.equal(other, whole) is (not more)
    parts = torch.cat([lowered(x[k::2], config, rng, INDEX[k::2]) for k in (0, 1)])
    torch.testing.assert_close(parts, torch.cat([whole[0::2], whole[1::2]]))


def replace_factor(config: DegradeConfig, factor: int) -> DegradeConfig:
    return config.model_copy(update={"factor": factor})


def test_area_is_the_mean_and_a_blur_keeps_it_and_halves_the_spread() -> None:
    x = pictures(64, channels=3, side=16)
    config = DegradeConfig(factor=2)
    blocks = x.reshape(64, 3, 8, 2, 8, 2).mean(dim=(3, 5))
    torch.testing.assert_close(lowered(x, config, Rng(0), torch.arange(64)), blocks)
    soft = DegradeConfig(factor=2, blur=(1.0, 1.0))
    flat = torch.full((2, 3, 16, 16), 0.3)
    torch.testing.assert_close(lowered(flat, soft, Rng(0), torch.arange(2)), flat[..., :8, :8])
    inner = lowered(x, soft, Rng(0), torch.arange(64))[..., 2:-2, 2:-2]
    place = torch.arange(-3, 4.0)
    weights = torch.exp(-(place**2) / 2)
    weights = weights / weights.sum()
    pair = torch.nn.functional.pad(weights, (0, 1)) + torch.nn.functional.pad(weights, (1, 0))
    share = float((pair / 2).square().sum())  # of white noise's variance that is left, each way
    assert float(inner.var() / x.var()) == pytest.approx(share**2, rel=0.1)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"factor": 3}, "must be 2, 4, 8 or another power of two"),
        ({"factor": 1}, "greater than or equal to 2"),
        ({"factor": 2, "blur": (2, 1)}, "the larger last"),
    ],
)
def test_bad_degradations_are_refused(keys, line) -> None:
    with pytest.raises(ValueError, match=line):
        DegradeConfig(**keys)


def test_sides_that_cannot_be_halved_are_told() -> None:
    with pytest.raises(UserError, match="whose sides are no multiples of it; set data.size"):
        DegradeConfig(factor=8).check((1, 28, 28))
    DegradeConfig(factor=4).check((1, 28, 28))


# Networks that see a picture ----------------------------------------------------------------------


def test_a_network_is_fed_the_picture_beside_the_state() -> None:
    den = seeing_teacher()
    assert (den.beside, den.sample_shape) == (1, (1, 8, 8))
    x, image, label = pictures(), pictures().flip(0), torch.arange(6) % 3
    t = torch.full((6,), 0.5)
    both = guided(den, x, t, Cond(label, image=image), 2.0)
    assert both.x.shape == x.shape
    h = den.net(torch.cat([x, image], 1), 1000 * t, class_labels=label, return_dict=False)[0]
    assert torch.equal(den(x, t, Cond(label, image=image)).h, h)
    other = den(x, t, Cond(label, image=image + 0.5)).h
    assert not torch.allclose(other, h)
    with pytest.raises(ValueError, match="is fed an image of 1 channels, not none"):
        den(x, t, Cond(label))
    with pytest.raises(ValueError, match="is fed an image of 0 channels, not one of 1"):
        dit_teacher()(x, t, Cond(label, image=image))


def test_networks_that_give_as_much_as_they_take_see_none() -> None:
    assert dit_teacher().beside == 0
    learned = DiTTransformer2DModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        sample_size=8,
    )
    assert Denoiser(learned, RF(), "velocity").sample_shape == (4, 8, 8)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=6,
        out_channels=3,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    assert Denoiser(unet, RF(), "velocity").sample_shape == (3, 8, 8)


METHODS = ("consistency", "scm", "flow_map", "pcm", "sim", "dmd2", "ladd", "rcm")


@pytest.mark.parametrize("method", METHODS)
def test_any_method_on_data_distils_a_teacher_that_sees(method) -> None:
    """And those that take labels alone are given data for it; resumed, it ends the same."""
    made, again = (make(method, seeing_teacher(), steps=4, batch_size=4, **FOUR) for _ in range(2))
    assert made.needs == "data"
    batch = made.batch(0, pictures(4), torch.arange(4) % 3)
    assert batch.cond.image.shape == (4, 1, 8, 8)

    def steps(trainer, first, last):
        for step in range(first, last):
            trainer.prepare(step)
            trainer.step(step, trainer.batch(step, pictures(4), torch.arange(4) % 3))

    steps(made, 0, 2)
    between = saved(made)
    steps(made, 2, 4)
    again.prepare(2)
    again.load_state(2, *between)
    steps(again, 2, 4)
    same(made.state(), again.state())


def test_what_does_not_go_together_is_refused() -> None:
    for method, keys, den, line in (
        (
            "consistency",
            {},
            seeing_teacher(),
            "data.degrade: the teacher is fed an image of 1 chann",
        ),
        ("consistency", FOUR, dit_teacher(), "data.degrade: the teacher is fed no image beside"),
        ("reflow", FOUR, seeing_teacher(), "learns of pairs of noise and image alone"),
        ("yonos", FOUR | {"teacher_factor": 4}, seeing_teacher(), "teacher_factor=4: pictures are"),
        (
            "yonos",
            FOUR | {"teacher_factor": 3},
            seeing_teacher(),
            "set it to 2, or another power of",
        ),
    ):
        with pytest.raises(UserError, match=line):
            make(method, den, **keys)


# Scale distillation -------------------------------------------------------------------------------

COARSE, FINE, DETAIL = 0.8, 0.5, 0.4  # deviations of a picture's mean, of its quarters, of pixels


def law(count: int) -> Tensor:
    """Pictures of 4 by 4: one mean, four quarters that add up to 0, pixels that do so in each."""
    rng, index = Rng(5), torch.arange(count)
    mean = COARSE * rng.normal("mean", index, (1, 1, 1))
    quarters = rng.normal("quarters", index, (1, 2, 2))
    quarters = FINE * (quarters - quarters.mean(dim=(2, 3), keepdim=True))
    pixels = rng.normal("pixels", index, (1, 4, 4))
    pixels = DETAIL * (pixels - spread(blocks(pixels)))
    return mean + spread(quarters) + pixels


def blocks(x: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(x, 2)


def spread(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


class Known(nn.Module):
    """Means of pictures of that law from a state of rectified flow and what is seen beside it.

    ``gains`` multiply what the state adds: of pixels, and of quarters where these are not seen.
    """

    def __init__(self, small: int) -> None:
        super().__init__()
        self.small, self.gains = small, nn.Parameter(torch.ones(2))
        self.config = type("Config", (), {"in_channels": 2, "out_channels": 1})()
        eye = torch.eye(small * small).reshape(-1, 1, small, small)
        back = torch.linalg.pinv(raised(eye, (4, 4)).reshape(small * small, 16))
        self.register_buffer("back", back)

    def forward(self, both: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        x_t, image = both[:, :1], both[:, 1:]
        t = (time / 1000)[:, None, None, None]
        low = (image.flatten(1) @ self.back).reshape(-1, 1, self.small, self.small)
        pixel = (1 - t) * DETAIL**2 / ((1 - t) ** 2 * DETAIL**2 + t**2)
        mean = self.gains[0] * pixel * (x_t - spread(blocks(x_t)))
        if self.small == 2:
            return mean + spread(low)
        quarter = (1 - t) * FINE**2 / ((1 - t) ** 2 * FINE**2 + t**2 / 4)
        off = blocks(x_t) - blocks(blocks(x_t))
        return mean + spread(self.gains[1] * quarter * off) + low


class KnownAdapter(Adapter):
    def __call__(self, call, x, time, cond):
        return call(x, time, cond)

    def beside(self, net):
        return 1

    def sample_shape(self, net):
        return (1, 4, 4)


def known(small: int) -> Denoiser:
    return Denoiser(Known(small), RF(), "x0", adapter=KnownAdapter())


def test_the_student_s_best_is_the_mean_of_what_it_sees_with_a_calmer_target() -> None:
    """Spec 8: the exact network has no gradient, by the teacher's estimates or by pictures."""
    count = 40_000
    made = make("yonos", known(2), batch_size=count, **FOUR)
    student = known(1)
    made.players["student"].denoiser = student
    batch = made.batch(0, law(count))
    gradients = {}
    for scale in (1.0, 0.7):
        with torch.no_grad():
            student.net.gains.fill_(scale)
        student.net.gains.grad = None
        student.net.gains.requires_grad_(True)
        made.loss(batch, Rng(0).at(0)).value.backward()
        gradients[scale] = student.net.gains.grad.clone()
    assert (gradients[1.0].abs() < 0.02 * gradients[0.7].abs()).all()
    t = torch.full((count,), 0.6)
    x_t = made.process.noise(batch.x, Rng(2).normal("z", batch.index, (1, 4, 4)), t)
    with torch.no_grad():
        student.net.gains.fill_(1.0)
        own = student(x_t, t, batch.cond).x
        fine = made.finer(batch.cond, batch, Rng(0).at(0))
        target = made.teacher(x_t, t, fine).x
        noise = [(aim - own).square().mean() for aim in (target, batch.x)]
    quarters = FINE**2 * 3 / 4
    left = quarters * (0.36 / 4) / (0.16 * FINE**2 + 0.36 / 4)
    assert float(noise[0]) == pytest.approx(left, rel=0.03)
    pixels = DETAIL**2 * 3 / 4 * 0.36 / (0.16 * DETAIL**2 + 0.36)
    assert float(noise[1]) == pytest.approx(left + pixels, rel=0.03)


def test_teacher_and_student_see_one_picture_by_one_draw() -> None:
    degrade = {"factor": 4, "blur": (0.2, 1.0), "noise": 0.2}
    made = make("yonos", seeing_teacher(), batch_size=6, data={"degrade": degrade})
    batch = made.batch(2, pictures(), torch.zeros(6, dtype=torch.long))
    config, rng = DegradeConfig(**degrade), Rng(made.config.seed).at(2)
    fine = made.finer(batch.cond, batch, Rng(made.config.seed).at(2))
    assert torch.equal(fine.image, seen(batch.x, config, rng, batch.index, 2))
    assert torch.equal(batch.cond.image, seen(batch.x, config, rng, batch.index))
    one = lowered(lowered(batch.x, config, rng, batch.index, 2), config, rng, batch.index, 1)
    assert torch.equal(raised(one, (8, 8)), fine.image)


def test_yonos_drops_labels_for_both() -> None:
    made = make("yonos", seeing_teacher(), batch_size=512, label_dropout=0.25, **FOUR)
    index = torch.arange(512)
    cond = made.dropped(Cond(torch.zeros(512, dtype=torch.long)), index, Rng(0).at(1))
    assert 0.15 < float((cond.label == 3).float().mean()) < 0.35


# The whole way ------------------------------------------------------------------------------------

QUICK = ["steps=3", "batch_size=8", "optim.warmup_steps=0", "log.tensorboard=false"]
QUICK += ["eval.every_steps=3", "eval.num=64", "eval.steps=1", "sample.every_steps=3"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """A teacher that halves, its student for quarters, and the student's export."""
    folder = tmp_path_factory.mktemp("chain")
    teacher("teacher-digits-sr", [f"run={folder / 'teacher'}", *QUICK])
    keys = [f"run={folder / 'run'}", f"teacher={folder / 'teacher' / 'pipeline'}", *QUICK]
    export(train("yonos-digits", keys), folder / "student")
    return folder


def test_an_export_makes_small_pictures_large(chain) -> None:
    pipe = DiffusionPipeline.from_pretrained(chain / "student", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.degrade == {"factor": 4, "kernel": "area", "blur": None, "noise": 0.0}
    low = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    z = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"latents": z, "output_type": "pt", "num_inference_steps": 1}
    images = pipe(low, **call).images
    den = Denoiser.from_pipeline(chain / "student")
    label = torch.full((5,), den.null_label)
    cond = Cond(label, image=raised(low * 2 - 1, (8, 8)))
    with torch.no_grad():
        expected = den(z, torch.ones(5), cond).x
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    named = pipe(low, class_labels=["0"] * 5, **call).images
    assert not torch.allclose(named, images, atol=1e-6)
    grey = [Image.fromarray((one[0] * 255).round().byte().numpy()) for one in low]
    near = pipe(grey, **call).images
    assert (near - images).abs().max() < 0.05
    assert len(pipe(grey[0], num_inference_steps=1).images) == 1
    for bad, line in (
        (torch.rand(1, 1, 4, 4), r"image is \[4, 4\], and this model takes \[2, 2\]"),
        (torch.rand(1, 3, 2, 2), "image has 3 channels, this model takes 1"),
        ([grey[0], Image.new("L", (4, 4))], "pictures of one call have one size"),
    ):
        with pytest.raises(ValueError, match=line):
            pipe(bad)


def test_small_pictures_of_a_folder_are_enlarged(chain, tmp_path) -> None:
    """In their order, without a class, those of colour as grey ones."""
    low = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    save_images(low.expand(3, 3, 2, 2) * 2 - 1, tmp_path / "small")
    keys: dict = {"steps": 1, "images": tmp_path / "small", "trust_remote_code": True}
    draw(str(chain / "student"), tmp_path / "large", **keys)
    made = load_images(tmp_path / "large")
    assert made.shape[-2:] == (8, 8) and len(made) == 3
    pipe = load_pipeline(chain / "student", trust_remote_code=True)
    kept = load_images(tmp_path / "small", 1) / 2 + 0.5
    again = generate(pipe, 3, seed=0, steps=1, images=kept)
    torch.testing.assert_close(made[:, :1], again, atol=0.02, rtol=0)
    draw(str(chain / "student"), tmp_path / "two", num=2, **keys)
    assert len(load_images(tmp_path / "two")) == 2
    with pytest.raises(UserError, match=r"--num 4: .*small has 3 pictures"):
        draw(str(chain / "student"), tmp_path / "four", num=4, **keys)
    with pytest.raises(UserError, match="--images: ImagePipeline makes no small pictures large"):
        draw("digits-dit", tmp_path / "none", **keys)


def test_figures_hold_each_picture_against_the_real_one(chain) -> None:
    metrics = ("psnr", "feature_distance", "fd")
    reference = open_reference("digits", None, metrics, "cpu")
    (row,) = evaluate(
        chain / "student",
        reference,
        steps=[1],
        num=64,
        metrics=metrics,
        trust_remote_code=True,
    )
    assert row.psnr is not None and 0 < row.psnr < 40
    assert row.feature_distance is not None and row.feature_distance > 0
    real = reference.data.load(range(4))[0]
    assert psnr(real, real).tolist() == [100.0] * 4
    off = psnr(real + 0.2, real)
    torch.testing.assert_close(off, torch.full((4,), -20 * math.log10(0.1)))
    with pytest.raises(UserError, match="these samples stand for no real picture each"):
        evaluate("digits-dit", reference, steps=[1], num=64, metrics=["psnr"])


def test_the_run_s_figures_and_pictures_are_of_the_data(chain) -> None:
    log = (chain / "run" / "log.jsonl").read_text()
    assert '"psnr/1"' in log and '"fd-digits/1"' in log
    assert list((chain / "run" / "samples").glob("*.png"))


def test_the_next_student_of_the_chain_learns_of_this_one(chain) -> None:
    den = Denoiser.from_pipeline(chain / "student")
    made = make("yonos", den, batch_size=4, data={"degrade": {"factor": 8}})
    assert made.config.teacher_sees == 4
    for method, degrade in (
        ("yonos", {"factor": 4}),
        ("yonos", {"factor": 8, "kernel": "bicubic"}),
        ("consistency", {"factor": 2}),
    ):
        with pytest.raises(
            UserError, match=r"has learnt of pictures made small by \{factor: 4\}, and"
        ):
            make(method, den, batch_size=4, data={"degrade": degrade})
    make("consistency", den, batch_size=4, data={"degrade": {"factor": 4}})
    made.step(0, made.batch(0, pictures(4), torch.zeros(4, dtype=torch.long)))


def test_the_shipped_teacher_makes_pictures_that_are_near_the_real_ones() -> None:
    metrics = ("psnr",)
    reference = open_reference("digits", None, metrics, "cpu")
    four = evaluate("digits-sr", reference, steps=[4], num=128, metrics=metrics)[0]
    assert load_teacher("digits-sr").beside == 1
    inside = (ASSETS / "digits-sr" / "pipeline.py").read_text(encoding="utf-8")
    assert inside == UpscalePipeline.text
    x = reference.data.load(range(128))[0]
    config = DegradeConfig(factor=2)
    bicubic = psnr(seen(x, config, Rng(0), torch.arange(128)).clamp(-1, 1), x).mean()
    assert four.psnr is not None and four.psnr > float(bicubic)


def test_a_run_is_resumed_with_what_is_seen() -> None:
    keys = {"batch_size": 4, "steps": 4, **FOUR}
    made, again = (make("yonos", seeing_teacher(), **keys) for _ in range(2))
    for step in range(4):
        made.step(step, made.batch(step, pictures(4), torch.zeros(4, dtype=torch.long)))
        if step == 1:
            between = saved(made)
    again.load_state(2, *between)
    for step in (2, 3):
        again.step(step, again.batch(step, pictures(4), torch.zeros(4, dtype=torch.long)))
    same(made.state(), again.state())


def test_a_condition_s_picture_goes_with_its_rows() -> None:
    cond = Cond(torch.arange(6), image=pictures())
    assert torch.equal(cond.rows(slice(2, 4)).image, pictures()[2:4])
    both = cond.stack(replace(cond, label=torch.zeros(6, dtype=torch.long)))
    assert both.image.shape[0] == 12
