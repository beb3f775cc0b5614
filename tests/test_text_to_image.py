"""Text-to-image models: from a pipeline's folder and captioned pictures to a student that loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from stepdistill.adapters.cond import Cond
from stepdistill.commands.equip import captions_of, teacher_of
from stepdistill.commands.export import export, finished
from stepdistill.commands.read import read_config
from stepdistill.commands.sample import sample as draw
from stepdistill.commands.train import train
from stepdistill.data.images import DataConfig, open_data
from stepdistill.diffusion.codec import Codec
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.process import RF
from stepdistill.diffusion.prompts import Prompts
from stepdistill.diffusion.sampler import sample
from stepdistill.diffusion.saved import absent
from stepdistill.diffusion.text import encode_prompts, joined
from stepdistill.eval.generate import generate
from stepdistill.eval.images import load_images
from stepdistill.run.errors import UserError
from tests.children import stepdistill
from tests.helpers import dit_teacher
from tests.prompted import quiet
from tests.text_models import (
    noise,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)

CAPTIONS = ("a cat", "a dog", "a red hat")
QUICK = ["steps=3", "batch_size=4", "log.tensorboard=false", "device=cpu", "optim.warmup_steps=0"]
QUICK += ["eval.every_steps=3", "eval.num=64", "eval.features=pixels"]
QUICK += ["clip=null", "sample.every_steps=3", "sample.num=4", "sample.teacher_steps=2"]
TRUSTED: dict = {"trust_remote_code": True}
LABEL = Cond(torch.tensor([0]))
MADE = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl, "sd3": stable_diffusion_3}
every = pytest.mark.parametrize("name", MADE)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Both pipelines, and twelve captioned pictures of 16 by 16 pixels."""
    folder = tmp_path_factory.mktemp("text")
    for name, make in MADE.items():
        make().save_pretrained(folder / name)
    pictures = folder / "pictures"
    pictures.mkdir()
    generator = torch.Generator().manual_seed(0)
    with (pictures / "metadata.jsonl").open("w") as table:
        for k in range(12):
            pixels = (torch.rand(16, 16, 3, generator=generator) * 255).byte().numpy()
            Image.fromarray(pixels).save(pictures / f"{k}.png")
            table.write(json.dumps({"file_name": f"{k}.png", "text": CAPTIONS[k % 3]}) + "\n")
    (folder / "prompts.txt").write_text("a cat\n\na dog\na cat\na red hat\n")
    return folder


def keys_of(world: Path, name: str, *more: str) -> list[str]:
    return [f"teacher={world / name}", f"data.source={world / 'pictures'}", *QUICK, *more]


# The teacher --------------------------------------------------------------------------------------


@every
def test_embeddings_are_the_pipeline_s_own(name) -> None:
    pipe = MADE[name]()
    prompts = encode_prompts(pipe, CAPTIONS, batch_size=2)
    more = {"sd": (), "sdxl": ("prompt_2",), "sd3": ("prompt_2", "prompt_3")}[name]
    found = pipe.encode_prompt(
        **{"prompt": "a dog", "device": "cpu", "num_images_per_prompt": 1},
        **dict.fromkeys(more, "a dog"),
        do_classifier_free_guidance=True,
    )
    text, none = found[0], found[1]
    assert prompts.captions == CAPTIONS and prompts.rows.text is not None
    torch.testing.assert_close(prompts.rows.text[1], text[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(prompts.rows.text[prompts.null], none[0], atol=1e-6, rtol=0)
    assert (prompts.rows.sizes is not None) is (name == "sdxl")
    if name != "sd":
        torch.testing.assert_close(prompts.rows.pooled[1], found[2][0], atol=1e-6, rtol=0)
        torch.testing.assert_close(prompts.rows.pooled[3], found[3][0], atol=1e-6, rtol=0)


@every
def test_the_teacher_draws_what_its_pipeline_does_under_guidance(name, world) -> None:
    """Labels are prompts, latents are scaled as the pipeline's, guidance is by no prompt."""
    pipe = quiet(DiffusionPipeline.from_pretrained(world / name, **absent(world / name)))
    config = read_config("consistency-digits", keys_of(world, name, "run=r"))[1]
    den = teacher_of(config)
    assert den.classes == CAPTIONS and den.null_label == 3 and den.codec is not None
    z = noise(1, (2, 4, 8, 8))
    made = pipe(
        ["a dog", "a cat"],
        latents=z,
        num_inference_steps=1,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    pipe.scheduler.set_timesteps(1)
    time = float(pipe.scheduler.timesteps[0])
    t = torch.full((2,), time / 1000 if name == "sd3" else (time + 1) / 1000)
    with torch.no_grad():
        pred = guided(den, z, t, Cond(torch.tensor([1, 0])), 3.0)
    mine = (den.codec.decode(pred.x) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(mine, made, atol=2e-5, rtol=0)


@every
def test_pictures_come_back_from_their_latents_as_the_autoencoder_gives_them(name) -> None:
    pipe = MADE[name]()
    den = Denoiser(pipe.transformer if name == "sd3" else pipe.unet, RF(), "velocity")
    codec = Codec(pipe.vae)
    x = noise(0, (2, 3, 16, 16)).tanh()
    latents = codec.encode(x)
    assert latents.shape[1:] == den.sample_shape == codec.shape((3, 16, 16))
    with torch.no_grad():
        raw = pipe.vae.encode(x).latent_dist.mode()
        back = pipe.vae.decode(raw).sample
    torch.testing.assert_close(codec.decode(latents), back, atol=1e-5, rtol=0)


def test_joined_rows_are_filled_up_where_a_mask_shows_it() -> None:
    short, long = (Cond(text=torch.ones(1, k, 2), mask=torch.ones(1, k)) for k in (2, 3))
    both_rows = joined([short, long])
    assert both_rows.mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    bare = joined([replace(short, mask=None), long])  # all of its entries are tokens
    assert bare.mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    with pytest.raises(ValueError, match="embeddings of several lengths, and no mask"):
        joined([Cond(text=short.text), Cond(text=long.text)])


# Captions -----------------------------------------------------------------------------------------


def test_captions_of_pictures_and_of_a_file(world, tmp_path) -> None:
    assert captions_of(DataConfig(source=str(world / "pictures"))) == CAPTIONS
    assert captions_of(DataConfig(source=str(world / "prompts.txt"))) == CAPTIONS
    (tmp_path / "empty.txt").write_text("\n \n")
    for source, line in (
        (tmp_path / "empty.txt", "holds no prompts; write one a line"),
        (tmp_path / "none.txt", "cannot be read"),
    ):
        with pytest.raises(UserError, match=line):
            captions_of(DataConfig(source=str(source)))
    with pytest.raises(
        UserError, match="prompts.txt holds prompts alone, and a folder of images is"
    ):
        open_data(DataConfig(source=str(world / "prompts.txt")))
    loose = tmp_path / "loose"
    loose.mkdir()
    Image.new("RGB", (16, 16)).save(loose / "0.png")
    keys = keys_of(world, "sd", f"run={tmp_path / 'r'}", f"data.source={loose}")
    with pytest.raises(UserError, match="has no captions, and the teacher reads prompts"):
        train("dmd2-digits", keys)
    for key, line in (
        ("clip=1", "clip=1: bounds pixels, and the teacher's are latents"),
        ("data.degrade.factor=2", "a model of latents that is fed a picture beside its state"),
    ):
        with pytest.raises(UserError, match=line):
            train("dmd2-digits", keys_of(world, "sd", f"run={tmp_path / 'r'}", key))


def test_latents_without_prompts_are_refused_before_the_training(world, tmp_path) -> None:
    shutil.copytree(world / "sd", tmp_path / "dit")
    net = dit_teacher().net
    shutil.rmtree(tmp_path / "dit" / "unet")
    net.save_pretrained(tmp_path / "dit" / "transformer")
    index = json.loads((tmp_path / "dit" / "model_index.json").read_text())
    index |= {"unet": [None, None], "transformer": ["diffusers", "DiTTransformer2DModel"]}
    (tmp_path / "dit" / "model_index.json").write_text(json.dumps(index))
    keys = keys_of(world, "sd", f"teacher={tmp_path / 'dit'}", f"run={tmp_path / 'r'}")
    with pytest.raises(UserError, match="a model of latents that reads no prompts"):
        train("dmd2-digits", keys)


# Training and export ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def students(world) -> dict[str, Path]:
    """Runs: on pictures, on prompts alone under guidance, on pairs, and an adapter."""
    prompts = f"data.source={world / 'prompts.txt'}"
    blind = [prompts, "eval.every_steps=0", "guidance=3"]
    runs = {
        "sd-consistency": ("consistency-digits", "sd", ["guidance=3"]),
        "sd-dmd2": ("dmd2-digits", "sd", ["student_steps=2", "adversary=null", *blind]),
        "sdxl-dmd": ("dmd-digits", "sdxl", [*blind, "student_steps=4", "lora={rank: 2}"]),
        "sd3-sid": ("sid-digits", "sd3", blind),
        "sd3-reflow": ("reflow-digits", "sd3", ["pairs.num=8", "pairs.steps=2", *blind]),
        "sd3-lora": ("consistency-digits", "sd3", ["lora={rank: 2}"]),
    }
    return {
        name: train(config, keys_of(world, teacher, f"run={world / name}", *more))
        for name, (config, teacher, more) in runs.items()
    }


def test_runs_write_pictures_and_figures_of_pixels(students) -> None:
    log = (students["sd-consistency"] / "log.jsonl").read_text()
    assert '"fd-pixels/1"' in log
    with Image.open(students["sd-consistency"] / "samples" / "step-0000003.png") as grid:
        assert grid.size[0] >= 16 and grid.mode == "RGB"
    assert '"fd-pixels' not in (students["sd3-sid"] / "log.jsonl").read_text()


@pytest.mark.parametrize(
    "name", ["sd-consistency", "sd-dmd2", "sdxl-dmd", "sd3-sid", "sd3-reflow", "sd3-lora"]
)
def test_students_are_the_teacher_s_own_pipeline_in_fewer_steps(name, students, tmp_path) -> None:
    """In a clean interpreter, from prompts to pictures, on every grid; fresh noise too."""
    out = tmp_path / "out"
    assert export(students[name], out) < 1e-5
    pipe = quiet(DiffusionPipeline.from_pretrained(out, trust_remote_code=True, **absent(out)))
    assert type(pipe) is type(MADE[name.partition("-")[0]]())
    steps = max(finished(students[name]).grids())
    made = pipe("a red hat", num_inference_steps=steps, guidance_scale=1.0, output_type="pt").images
    assert made.shape == (1, 3, 16, 16) and bool(made.isfinite().all())
    card = (out / "README.md").read_text()
    assert 'pipe("a cat", num_inference_steps=' in card and "guidance_scale=1).images" in card
    for folder in ("drawn", "again"):
        draw(str(out), tmp_path / folder, steps=steps, num=3, prompts=CAPTIONS, **TRUSTED)
    images = load_images(tmp_path / "drawn")
    assert images.shape == (3, 3, 16, 16)  # without guidance, and by the samples' own seeds
    assert torch.equal(images, load_images(tmp_path / "again"))
    alone = generate(pipe, [2], seed=0, steps=steps, prompts=CAPTIONS)
    torch.testing.assert_close(images[2:], alone, atol=0.01, rtol=0)
    half = pipe.to(torch.bfloat16)("a cat", num_inference_steps=steps, output_type="pt").images
    assert bool(half.isfinite().all())


def test_figures_are_of_the_reference_s_captions(students, world, tmp_path) -> None:
    export(students["sd3-sid"], tmp_path / "out")
    args = ["eval", "out", "--reference", str(world / "pictures"), "--steps", "1", "--num", "12"]
    args += ["--guidance", "1", "--metrics", "fd,diversity", "--trust-remote-code"]
    done = stepdistill(*args, "--teacher-steps", "2", folder=tmp_path)
    assert done.code == 0, done.err
    assert "pixels" in done.out and "teacher" in done.out
    args[args.index(str(world / "pictures"))] = str(tmp_path / "loose")
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "loose" / "0.png")
    done = stepdistill(*args, folder=tmp_path)
    assert done.code == 2 and "has no captions, and StableDiffusion3Pipeline reads" in done.err


def test_pairs_of_other_prompts_are_other_pairs(world, tmp_path) -> None:
    """A store made of some prompts is not taken for one of as many others."""
    (tmp_path / "others.txt").write_text("a cat\na dog\na blue hat\n")
    few = ["pairs.num=8", "pairs.steps=2", "eval.every_steps=0", f"pairs.path={tmp_path / 'p'}"]
    own = f"data.source={world / 'prompts.txt'}"
    train("reflow-digits", keys_of(world, "sd3", own, *few, f"run={tmp_path / 'one'}"))
    other = f"data.source={tmp_path / 'others.txt'}"
    with pytest.raises(UserError, match="pairs of another plan"):
        train("reflow-digits", keys_of(world, "sd3", other, *few, f"run={tmp_path / 'two'}"))


def test_flows_go_to_stock_schedulers_and_others_are_told_why_not(students, tmp_path) -> None:
    assert export(students["sd3-reflow"], tmp_path / "stock", stock=True) < 1e-5
    export(students["sd3-reflow"], tmp_path / "own")
    card = (tmp_path / "stock" / "README.md").read_text()
    assert "sigmas=[" in card and "trust_remote_code" not in card
    pipe = quiet(
        DiffusionPipeline.from_pretrained(tmp_path / "stock", **absent(tmp_path / "stock"))
    )
    pipe("a cat", num_inference_steps=2, guidance_scale=1.0, sigmas=[1.0, 0.75])
    with pytest.raises(UserError, match="--stock: stock pipelines of prompts begin with noise"):
        export(students["sd-consistency"], tmp_path / "no", stock=True)
    assert not (tmp_path / "no").exists()


def test_readme_s_commands_for_stable_diffusion(world, tmp_path) -> None:
    """As README has them, in small: from captioned pictures to pictures of a prompt."""
    few = ["steps=2", "batch_size=2", "data.size=16", "precision=fp32", "log.tensorboard=false"]
    few += ["sample.every_steps=2", "sample.num=4", "sample.teacher_steps=2", "device=cpu"]
    own = [f"teacher={world / 'sd'}", f"data.source={world / 'pictures'}", "run=runs/sd"]
    commands = [
        ["train", "consistency-sd", *own, *few],
        ["export", "runs/sd", "--out", "out/sd"],
        ["sample", "out/sd", "--prompt", "a red hat", "--steps", "4", "--guidance", "1"],
    ]
    commands[-1] += ["--out", "drawn", "--trust-remote-code"]
    for command in commands:
        done = stepdistill(*command, folder=tmp_path)
        assert done.code == 0, done.err
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == 16


@pytest.mark.parametrize(
    ("config", "keys", "line"),
    [
        ("lcm-digits", [], "a stock pipeline tells a network its time alone"),
        ("phased_dmd-digits", ["adversary=null"], "a stock pipeline holds one network of a kind"),
        ("reflow-digits", ["pairs.invert=true"], "pairs.invert: pairs of pictures are of pixels"),
    ],
)
def test_what_cannot_be_exported_is_not_trained(config, keys, line, world, tmp_path) -> None:
    with pytest.raises(UserError, match=line):
        train(config, keys_of(world, "sd", f"run={tmp_path / 'run'}", *keys))


def test_a_run_keeps_its_prompts(world, tmp_path) -> None:
    """What is exported, or goes on, has the embeddings of its beginning, and no others."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    keys = keys_of(world, "sd", f"data.source={prompts}", "eval.every_steps=0", "adversary=null")
    run = train("dmd2-digits", [*keys, f"run={tmp_path / 'run'}"])
    kept = Prompts.load(run / "prompts.safetensors")
    assert kept.captions == ("a cat", "a dog")
    assert torch.equal(finished(run).teacher.prompts.rows.text, kept.rows.text)
    prompts.write_text("a cat\na cow\n")
    with pytest.raises(UserError, match="^data.source=.*has other captions than when .* began"):
        export(run, tmp_path / "out")


def test_a_safety_checker_is_left_out_and_pickles_are_not_read(world, tmp_path) -> None:
    """Stable Diffusion's own index names a checker of a library that is diffusers' pipeline's."""
    folder = tmp_path / "sd"
    shutil.copytree(world / "sd", folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    keys = keys_of(world, "sd", f"teacher={folder}", "run=r")
    assert teacher_of(read_config("consistency-digits", keys)[1]).classes == CAPTIONS
    weights = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(UserError, match="its text_encoder cannot be loaded"):
        teacher_of(read_config("consistency-digits", keys)[1])
    shutil.rmtree(folder / "text_encoder")
    index["text_encoder"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="its prompts cannot be read"):
        teacher_of(read_config("consistency-digits", keys)[1])


def test_an_exported_flow_is_the_teacher_of_the_next_round(students, world, tmp_path) -> None:
    export(students["sd3-reflow"], tmp_path / "flow")
    keys = keys_of(world, "sd3", f"teacher={tmp_path / 'flow'}", "pairs.num=8", "pairs.steps=2")
    run = train("kd-digits", [*keys, f"run={tmp_path / 'second'}", "eval.every_steps=0"])
    assert sample(finished(run).best(), noise(2, (1, 4, 8, 8)), (1.0, 0.0), LABEL).isfinite().all()
