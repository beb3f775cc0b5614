"""Pipelines: the literal grid against diffusers' schedulers, and folders that strangers load."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UNet2DModel,
)
from diffusers.utils import dynamic_modules_utils

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser, Experts
from stepdistill.diffusion.process import EDM, RF, VP, Trig
from stepdistill.diffusion.sampler import sample, twice
from stepdistill.pipelines.card import model_card
from stepdistill.pipelines.folder import write_pipeline
from stepdistill.pipelines.image import ImagePipeline
from stepdistill.pipelines.literal_grid import LiteralGridScheduler
from stepdistill.pipelines.verify import (
    VerificationError,
    draw_folder,
    noise_from_seeds,
    verify_folder,
)
from stepdistill.run import files
from stepdistill.run.errors import UserError
from stepdistill.run.files import whole_folder

SHAPE = (1, 8, 8)
SEEDS = [11, 12, 13, 14]
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(autouse=True)
def own_module_cache(tmp_path, monkeypatch):
    """Keep diffusers' copies of the folders' code out of the user's cache, and apart."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def row(alpha, sigma, a, b, time=0.0, scale=1.0, expert=0):
    return dict(time=time, scale=scale, alpha=alpha, sigma=sigma, a=a, b=b, expert=expert)


def flow_grid(sigmas, expert=lambda i: 0):
    rows = [row(1 - s, s, -1.0, 1.0, 1000 * s, expert=expert(i)) for i, s in enumerate(sigmas)]
    return {str(len(rows)): rows}


def literal_rows(den, times):
    """A walk of a denoiser (or experts) written out, in the sampler's own precision."""
    rows = []
    for t in times[:-1]:
        at, owner = torch.tensor([t], dtype=torch.float32), den.at(t)
        c = den.process.coefs(at)
        a, b, _ = owner.head.weights(c, den.process.sigma_data)
        scale = den.process.scale_input(torch.ones(1, 1), at)
        parts = (c.alpha, c.sigma, a, b, den.process.network_time(at), scale)
        expert = den.index_at(t) if isinstance(den, Experts) else 0
        rows.append(row(*(float(part) for part in parts), expert=expert))
    return rows


def tiny_dit(seed=0, **config):
    torch.manual_seed(seed)
    sizes = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
    channels = dict(in_channels=1, out_channels=1, num_embeds_ada_norm=10)
    return DiTTransformer2DModel(**{**sizes, **channels, **config}).eval()


def tiny_unet(seed=0, **config):
    torch.manual_seed(seed)
    blocks = dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    channels = dict(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=11)
    return UNet2DModel(**{**blocks, **channels, **config}).eval()


def student(noise="predicted", steps=(1, 2, 4), module=None, **pipeline):
    grids = {}
    for n in steps:
        grids |= flow_grid([1 - i / n for i in range(n)])
    scheduler = LiteralGridScheduler(grids, noise, default_steps=steps[-1])
    options = dict(classes=NAMES, default_steps=steps[-1], null_label=10) | pipeline
    pipe = ImagePipeline(module or tiny_dit(), scheduler, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write(out, pipe, *more, **options):
    settings = dict(classes=NAMES, null_label=10, card="# card", dtype=None) | options
    steps = pipe.config.default_steps
    modules = [pipe.model, *more]
    return write_pipeline(out, modules, pipe.scheduler, default_steps=steps, **settings)


# The literal grid against diffusers' own schedulers


def walk(scheduler, generator=None):
    """Run a scheduler on a fixed nonlinear function of state and time; return every state."""
    x_t = normal(0, 3, *SHAPE)
    states = []
    for t in scheduler.timesteps:
        h = torch.tanh(1.3 * x_t + t / 1000) - 0.4 * x_t
        extra = {} if generator is None else {"generator": generator}
        x_t = scheduler.step(h, t, x_t, return_dict=False, **extra)[0]
        states.append(x_t)
    return torch.stack(states)


def assert_same_walk(ours, theirs, seed=None):
    """Largest difference of any state, relative to the size of the states where that is above 1."""
    generators = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
    mine, stock = walk(ours, generators[0]), walk(theirs, generators[1])
    assert len(mine) == len(stock)
    assert ((mine - stock).abs() / stock.abs().clamp_min(1)).max() < 1e-5


SIGMAS = [[1.0], [1.0, 0.5], [1.0, 0.9, 0.75, 0.5], [1 - i / 8 for i in range(8)]]


@pytest.mark.parametrize("sigmas", SIGMAS, ids=len)
@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_schedulers_walk_the_same_way(sigmas, stochastic):
    stock = FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic)
    stock.set_timesteps(sigmas=sigmas)
    ours = LiteralGridScheduler(
        flow_grid(sigmas), "fresh" if stochastic else "predicted", len(sigmas)
    )
    assert_same_walk(ours, stock, seed=5 if stochastic else None)


def vp_rows(alphas_cumprod, indices, kind):
    rows = []
    for k in indices:
        alpha, sigma = float(alphas_cumprod[k]) ** 0.5, (1 - float(alphas_cumprod[k])) ** 0.5
        a, b = {"epsilon": (0, 1), "sample": (1, 0), "v_prediction": (-sigma, alpha)}[kind]
        rows.append(row(alpha, sigma, a, b, k))
    return {str(len(rows)): rows}


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_ddim_walks_the_same_way(steps, kind):
    stock = DDIMScheduler(prediction_type=kind, timestep_spacing="trailing", clip_sample=False)
    stock.set_timesteps(steps)
    grid = vp_rows(stock.alphas_cumprod, stock.timesteps.tolist(), kind)
    assert_same_walk(LiteralGridScheduler(grid, "predicted", steps), stock)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_lcm_walks_the_same_way(kind):
    """LCM mixes the state into its estimate by c_skip, at most 4e-8 here and so under the bound."""
    stock = LCMScheduler(prediction_type=kind, clip_sample=False)
    stock.set_timesteps(4)
    assert stock.get_scalings_for_boundary_condition_discrete(stock.timesteps[-1])[0] < 4e-8
    grid = vp_rows(stock.alphas_cumprod, stock.timesteps.tolist(), kind)
    assert_same_walk(LiteralGridScheduler(grid, "fresh", 4), stock, seed=5)


HEADS = {"x0": (1, 0), "eps": (0, 1), "v": (-0.8, 0.6), "flow": (-1, 1), "any": (0.3, -2.0)}
HEADS |= {"half x0": (0.5, 0), "minus eps": (0, -1)}


@pytest.mark.parametrize("head", HEADS)
def test_a_true_output_gives_back_clean_and_noise(head):
    a, b = HEADS[head]
    grid = {"2": [row(0.6, 0.8, a, b, 7.0), row(0.9, 0.3, 1, 0, 3.0)]}
    x, z = normal(1, 3, *SHAPE), normal(2, 3, *SHAPE)
    out = LiteralGridScheduler(grid, default_steps=2).step(a * x + b * z, 7.0, 0.6 * x + 0.8 * z)
    torch.testing.assert_close(out.pred_original_sample, x, rtol=0, atol=2e-6)
    torch.testing.assert_close(out.prev_sample, 0.9 * x + 0.3 * z, rtol=0, atol=2e-6)


def test_a_clean_output_is_returned_bit_for_bit():
    x, state = normal(1, 3, *SHAPE), normal(2, 3, *SHAPE)
    scheduler = LiteralGridScheduler({"1": [row(0.6, 0.8, 1, 0)]})
    assert torch.equal(scheduler.step(x, 0.0, state).prev_sample, x)


def test_initial_noise_stays_on_the_straight_line():
    grid = {"3": [row(0.1, 0.9, 1, 0), row(0.5, 0.5, 1, 0), row(0.8, 0.2, 1, 0)]}
    scheduler = LiteralGridScheduler(grid, "initial", 3)
    z, xs = normal(0, 3, *SHAPE), [normal(i, 3, *SHAPE) for i in (1, 2, 3)]
    assert scheduler.init_noise_sigma == 0.9
    x_t = 0.9 * z
    for x, (alpha, sigma) in zip(xs, [(0.5, 0.5), (0.8, 0.2), (1.0, 0.0)], strict=True):
        x_t = scheduler.step(x, 0.0, x_t).prev_sample
        torch.testing.assert_close(x_t, alpha * x + sigma * z, rtol=0, atol=1e-6)
    heun = LiteralGridScheduler({"3": [*grid["3"][:2], grid["3"][1]]}, "heun", 3)
    for made in (scheduler, heun):
        with pytest.raises(ValueError, match="begin at row 0"):
            made.set_begin_index(1)


# The literal grid as a state machine


def test_equal_times_are_walked_by_count():
    rows = [row(0.0, 1.0, -1, 1, 500.0, expert=0), row(0.5, 0.5, -1, 1, 500.0, 2.0, expert=1)]
    scheduler = LiteralGridScheduler({"2": rows}, default_steps=2)
    x_t = normal(0, 3, *SHAPE)
    for _ in range(2):  # set_timesteps starts over
        scheduler.set_timesteps(2)
        assert (scheduler.expert, scheduler.step_index) == (0, 0)
        assert torch.equal(scheduler.scale_model_input(x_t, 500.0), x_t)
        scheduler.step(x_t, scheduler.timesteps[0], x_t)
        assert (scheduler.expert, scheduler.step_index) == (1, 1)
        assert torch.equal(scheduler.scale_model_input(x_t, 500.0), 2 * x_t)
        scheduler.step(x_t, scheduler.timesteps[1], x_t)
        with pytest.raises(ValueError, match="all 2 steps were taken"):
            scheduler.step(x_t, 500.0, x_t)


def test_begin_index_and_add_noise():
    scheduler = LiteralGridScheduler(flow_grid([1.0, 0.5]), default_steps=2)
    x, z = normal(1, 2, *SHAPE), normal(2, 2, *SHAPE)
    noisy = scheduler.add_noise(x, z, scheduler.timesteps.flip(0))
    torch.testing.assert_close(noisy, torch.stack([0.5 * x[0] + 0.5 * z[0], z[1]]))
    scheduler.set_begin_index(1)
    state = scheduler.add_noise(x, z, scheduler.timesteps[[1, 1]])
    torch.testing.assert_close(scheduler.step(z - x, 500.0, state).prev_sample, x)
    scheduler.set_timesteps(2)
    assert scheduler.begin_index == scheduler.step_index == 0
    with pytest.raises(ValueError, match=r"no row has the time 250"):
        scheduler.add_noise(x, z, torch.tensor([250.0, 500.0]))


def test_scheduler_refuses_what_it_cannot_walk():
    grids = flow_grid([1.0]) | flow_grid([1.0, 0.5])
    with pytest.raises(ValueError, match="takes 1, 2 steps, not 3: it was trained"):
        LiteralGridScheduler(grids).set_timesteps(3)
    with pytest.raises(ValueError, match="steps, not 4"):
        LiteralGridScheduler(grids, default_steps=4)
    with pytest.raises(ValueError, match="known sources are predicted, fresh, initial"):
        LiteralGridScheduler(grids, "freh")
    with pytest.raises(ValueError, match="whose rows but the first are there twice each"):
        LiteralGridScheduler(flow_grid([1.0, 0.6, 0.3]), "heun", 3)
    with pytest.raises(ValueError, match="as many as its name"):
        LiteralGridScheduler({"2": grids["1"]})
    with pytest.raises(ValueError, match="singular"):
        LiteralGridScheduler({"1": [row(0.6, 0.8, 0.6, 0.8)]})
    with pytest.raises(ValueError, match="a row is time, scale"):
        LiteralGridScheduler({"1": [{"time": 1.0}]})
    with pytest.raises(ValueError, match="not finite"):
        LiteralGridScheduler({"1": [row(float("nan"), 1.0, -1, 1)]})


def test_scheduler_config_round_trip_is_exact(tmp_path):
    grid = {"2": [row(1 / 3, 2 / 3, -1.0, 0.1, 999.0), row(0.7, 0.1 + 0.2, 0, 1, 1e-7, expert=1)]}
    scheduler = LiteralGridScheduler(grid, "fresh", 2)
    scheduler.save_pretrained(tmp_path)
    again = LiteralGridScheduler.from_pretrained(tmp_path)
    assert again.config.grids == scheduler.config.grids == grid
    assert (again.config.noise, again.config.default_steps) == ("fresh", 2)
    assert (tmp_path / "literal_grid.py").is_file()


# The pipeline and the training sampler are the same walk


PROCESSES = {"rf-velocity": RF(), "vp-eps": VP(DDIMScheduler().alphas_cumprod)}
PROCESSES |= {"vp-v": PROCESSES["vp-eps"], "edm-edm-f": EDM(), "trig-trig-f": Trig()}


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("noise", ["predicted", "fresh", "initial", "heun"])
def test_pipeline_draws_the_samplers_images(kind, noise):
    process, dit = PROCESSES[kind], tiny_dit()
    den = Denoiser(dit, process, kind.partition("-")[2])
    grids, walks = {}, {}
    for n in (1, 2, 4):
        even = torch.linspace(1, 0, n + 1)
        times = (process.warp(even[:-1])).tolist() + [0.0]
        passes, times = (2 * n - 1, twice(tuple(times))) if noise == "heun" else (n, times)
        walks[passes] = times
        grids[passes] = literal_rows(den, times)
    most = max(walks)
    pipe = ImagePipeline(dit, LiteralGridScheduler(grids, noise, most), default_steps=most)
    pipe.set_progress_bar_config(disable=True)
    labels, z = torch.tensor([3, 1, 4, 1]), noise_from_seeds(SEEDS, SHAPE, most)
    for n, times in walks.items():
        with torch.no_grad():
            x = sample(den, z[0], tuple(times), Cond(labels), noise=noise, fresh=z.__getitem__)
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        images = pipe(labels, generator=generators, num_inference_steps=n, output_type="pt").images
        assert (images - (x / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5
        assert images.std() > 0.05


def test_every_image_is_its_own_whatever_the_batch():
    pipe = student("fresh")
    seeds = range(20, 25)
    all_at_once = pipe(
        [0, 1, 2, 3, 4],
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    for i, seed in enumerate(seeds):
        alone = pipe(i, generator=torch.Generator().manual_seed(seed), output_type="pt").images
        torch.testing.assert_close(all_at_once[i : i + 1], alone, rtol=0, atol=1e-5)


# The pipeline's three kinds of scheduler, labels, guidance


def test_flow_teacher_takes_an_even_grid():
    pipe = student(module=(dit := tiny_dit()))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    times = []
    hook = dit.register_forward_pre_hook(lambda _, args: times.append(args[1][0].item()))
    images = pipe([1, 2], latents=(z := normal(0, 2, *SHAPE)), output_type="pt").images
    hook.remove()
    assert times == [1000, 750, 500, 250]
    with torch.no_grad():
        x = sample(
            Denoiser(dit, RF(), "velocity"), z, (1, 0.75, 0.5, 0.25, 0), Cond(torch.tensor([1, 2]))
        )
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_vp_teacher_walks_its_scheduler():
    unet = tiny_unet()
    stock = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    pipe = ImagePipeline(unet, stock, classes=NAMES, default_steps=4, null_label=10)
    pipe.set_progress_bar_config(disable=True)
    z, labels = normal(0, 2, *SHAPE), torch.tensor([1, 2])
    images = pipe(labels, latents=z, output_type="pt").images
    stock.set_timesteps(4)
    x_t = z
    with torch.no_grad():
        for t in stock.timesteps:
            x_t = stock.step(unet(x_t, t, class_labels=labels).sample, t, x_t).prev_sample
    torch.testing.assert_close(images, (x_t / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_guidance_is_one_call_with_the_null_label_and_learned_sigma_is_dropped():
    dit = tiny_dit(out_channels=2)
    pipe, calls = student(module=dit, steps=(1,)), []
    dit.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((kwargs["class_labels"].tolist(), out[0])),
        with_kwargs=True,
    )
    z = normal(0, 2, *SHAPE)
    images = pipe([1, 2], guidance_scale=3.0, latents=z, output_type="pt").images
    ((labels, h),) = calls
    assert labels == [10, 10, 1, 2]
    plain, labelled = h[:, :1].chunk(2)
    x = z - (plain + 3.0 * (labelled - plain))
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)


def test_labels_by_number_name_and_turn():
    pipe, seen = student(steps=(1,)), []
    pipe.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    pipe(num_images=12)
    pipe("three", num_images=2)
    pipe(["nine", 0, torch.tensor(4)])
    pipe(torch.tensor([5, 10]))
    assert seen == [[*range(10), 0, 1], [3, 3], [9, 0, 4], [5, 10]]
    with pytest.raises(ValueError, match="unknown class 'tre': did you mean 'three'"):
        pipe("tre")
    with pytest.raises(ValueError, match="label 12 is out of range: labels are 0 to 9"):
        pipe([1, 12])
    with pytest.raises(ValueError, match="num_images is 3, but 2 labels"):
        pipe([1, 2], num_images=3)
    with pytest.raises(ValueError, match="whole numbers or names"):
        pipe(torch.tensor([0.5]))


def test_pipeline_refuses_what_does_not_fit():
    pipe = student()
    with pytest.raises(ValueError, match="takes 1, 2, 4 steps, not 3: it was trained"):
        pipe(num_inference_steps=3)
    with pytest.raises(ValueError, match="at least 1 step"):
        pipe(num_inference_steps=0)
    with pytest.raises(ValueError, match="2 generators were given for 3 images"):
        pipe([1, 2, 3], generator=[torch.Generator(), torch.Generator()])
    with pytest.raises(ValueError, match=r"these images need \(1, 1, 8, 8\)"):
        pipe(1, latents=torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="known: pil, np, pt"):
        pipe(1, output_type="latent")
    with pytest.raises(ValueError, match="a name of its own"):
        student(classes=["crane", "crane"])
    with pytest.raises(ValueError, match="nothing to guide away from"):
        student(null_label=None)(1, guidance_scale=2.0)
    free = student(module=tiny_unet(num_class_embeds=None), classes=None)
    assert len(free(num_images=2).images) == 2
    with pytest.raises(ValueError, match="unconditional"):
        free(1)
    missing = student()
    missing.scheduler = LiteralGridScheduler(flow_grid([1.0], lambda i: 1))
    with pytest.raises(ValueError, match="needs model_2, which the pipeline lacks"):
        missing(1, num_inference_steps=1)


def test_networks_draw_in_eval_mode_and_are_given_back_as_they_were():
    pipe, modes = student(steps=(1,)), []
    pipe.model.train().register_forward_pre_hook(lambda m, args: modes.append(m.training))
    pipe(1)
    assert modes == [False] and pipe.model.training


def test_output_types():
    pipe, z = student(), normal(0, 2, *SHAPE)
    images = {kind: pipe([1, 2], latents=z, output_type=kind).images for kind in ("pt", "np")}
    (pil,) = pipe([1, 2], latents=z, return_dict=False)
    assert images["pt"].shape == (2, 1, 8, 8) and images["np"].shape == (2, 8, 8, 1)
    assert 0 <= images["pt"].min() and images["pt"].max() <= 1
    np.testing.assert_array_equal(images["np"][..., 0], images["pt"][:, 0].numpy())
    assert (pil[0].mode, pil[0].size) == ("L", (8, 8))
    np.testing.assert_array_equal(np.asarray(pil[1]), (images["np"][1, ..., 0] * 255).round())


# Folders


def test_a_written_folder_draws_the_same_where_only_diffusers_is(tmp_path):
    """A DiT and a UNet as experts, in half precision, with fresh noise."""
    nets = [tiny_dit(), tiny_unet()]
    for weight in (weight for net in nets for weight in net.parameters()):
        weight.data = weight.half().float()  # as a file in half precision holds it
    experts = Experts([Denoiser(net, RF(), "velocity") for net in nets], [0.6])
    walks = {1: (1.0, 0.0), 4: (1.0, 0.8, 0.6, 0.3, 0.0)}
    grids = {n: literal_rows(experts, times) for n, times in walks.items()}
    assert [r["expert"] for r in grids[4]] == [0, 0, 1, 1]
    pipe = ImagePipeline(nets[0], LiteralGridScheduler(grids, "fresh", 4), default_steps=4)
    with pytest.raises(UserError, match="calls 2 networks, but 1 were given"):
        write(tmp_path / "few", pipe)
    out = write(tmp_path / "experts", pipe, nets[1], dtype=torch.float16)
    parts = {"README.md", "model", "model_2", "model_index.json", "pipeline.py", "scheduler"}
    assert {path.name for path in out.iterdir()} == parts
    labels, noise = [3, 1, 4, 1], noise_from_seeds(SEEDS, SHAPE, 4)
    cond = Cond(torch.tensor(labels))
    with torch.no_grad():
        expected = {
            n: sample(experts, noise[0], times, cond, noise="fresh", fresh=noise.__getitem__)
            for n, times in walks.items()
        }
    assert verify_folder(out, expected, labels, SEEDS) < 1e-5
    with pytest.raises(UserError, match="differ in number"):
        verify_folder(out, expected, labels[:3], SEEDS)


def test_verification_tells_what_is_wrong(tmp_path, monkeypatch):
    drawn = {1: torch.full((2, *SHAPE), 0.5), 4: torch.full((2, *SHAPE), 0.5)}
    monkeypatch.setattr("stepdistill.pipelines.verify.draw_folder", lambda *args, **keys: drawn)
    expected = {1: torch.zeros(2, *SHAPE), 4: torch.full((2, *SHAPE), 0.2)}
    with pytest.raises(VerificationError, match=r"1 steps: 0, 4 steps: 0\.1 \(allowed 1e-05\)"):
        verify_folder(tmp_path, expected, None, [1, 2])
    drawn[4] = torch.full((2, *SHAPE), float("nan"))
    with pytest.raises(VerificationError, match="4 steps: nan"):
        verify_folder(tmp_path, expected, None, [1, 2])
    monkeypatch.undo()
    monkeypatch.setattr("stepdistill.pipelines.verify._STRANGER", "import stepdistil_misspelt")
    with pytest.raises(VerificationError, match="plain diffusers: ModuleNotFoundError: No module"):
        draw_folder(tmp_path, [1], None, [1, 2])


def test_the_index_names_only_files_that_are_there(tmp_path):
    """A list that is no component would be taken for one when the folder comes from the Hub."""
    out = write(tmp_path / "student", student())
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "ImagePipeline"]
    assert index["scheduler"] == ["literal_grid", "LiteralGridScheduler"]
    assert index["model"] == ["diffusers", "DiTTransformer2DModel"]
    assert tuple(index["classes"]) == tuple(NAMES)
    assert {key for key, value in index.items() if isinstance(value, list)} == {
        "_class_name",
        "model",
        "scheduler",
    }
    loaded = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    again = write(tmp_path / "again", loaded)
    assert not any(str(tmp_path) in path.read_text() for path in again.rglob("*.json"))
    assert len({path.stat().st_mode for path in again.rglob("*") if path.is_file()}) == 1


def test_a_loaded_pipeline_can_be_saved_and_loaded_again(tmp_path, caplog):
    pipe, z = student("initial"), normal(0, 2, *SHAPE)
    first = write(tmp_path / "first", pipe, default_guidance=1.5)
    loaded = DiffusionPipeline.from_pretrained(first, trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "second")
    again = DiffusionPipeline.from_pretrained(tmp_path / "second", trust_remote_code=True)
    assert "Expected types" not in caplog.text and "not expected" not in caplog.text
    for name in ("pipeline.py", "model_index.json", "scheduler/literal_grid.py"):
        assert (tmp_path / "second" / name).read_bytes() == (first / name).read_bytes()
    assert type(again).__module__ != ImagePipeline.__module__
    assert again.config.classes == NAMES and again.config.default_guidance == 1.5
    again.set_progress_bar_config(disable=True)
    images = again(["one", "two"], latents=z, output_type="pt").images
    wanted = pipe([1, 2], guidance_scale=1.5, latents=z, output_type="pt").images
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-6)


def test_a_teachers_folder_keeps_its_stock_scheduler(tmp_path):
    pipe = student()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    out = write(tmp_path / "teacher", pipe)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(out)
    loaded = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    assert isinstance(loaded.scheduler, FlowMatchEulerDiscreteScheduler)
    assert loaded.scheduler.config.shift == 2.0
    assert [p.name for p in (out / "scheduler").iterdir()] == ["scheduler_config.json"]
    with pytest.raises(UserError, match="several networks need"):
        write(tmp_path / "two", pipe, tiny_dit())


def test_nothing_is_overwritten_unasked(tmp_path):
    pipe, out = student(), tmp_path / "out"
    out.mkdir()
    write(out, pipe, card="first")  # an empty folder is free
    with pytest.raises(UserError, match="exists; choose another folder"):
        write(out, pipe, card="second")
    assert (out / "README.md").read_text() == "first"
    write(out, pipe, card="second", overwrite=True)
    assert (out / "README.md").read_text() == "second"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="is no pipeline folder"):
        write(precious, pipe, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious"]


def test_a_torn_write_leaves_nothing(tmp_path, monkeypatch):
    pipe, out = student(), tmp_path / "out"

    def fails(path):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "flush", fails)
        with pytest.raises(OSError, match="no space"):
            write(out, pipe)
    assert list(tmp_path.iterdir()) == []
    write(out, pipe, card="old")
    with pytest.raises(KeyboardInterrupt), whole_folder(out) as fresh:
        (fresh / "README.md").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "README.md").read_text() == "old"


def test_only_networks_that_diffusers_knows_are_written(tmp_path):
    scheduler = LiteralGridScheduler(flow_grid([1.0]))
    settings = dict(classes=None, null_label=None, default_steps=1, card="", dtype=None)
    with pytest.raises(UserError, match="Linear is no diffusers network"):
        write_pipeline(tmp_path / "out", [torch.nn.Linear(1, 1)], scheduler, **settings)
    with pytest.raises(UserError, match="default_steps is 4; grids are 1"):
        write_pipeline(tmp_path / "out", [tiny_dit()], scheduler, **settings | {"default_steps": 4})


def test_model_card():
    grids = flow_grid([1.0]) | flow_grid([1.0, 0.5], lambda i: i)
    text = model_card(
        title="Digits in two steps",
        folder="out/digits",
        teacher="digits-dit",
        method="sim",
        data="scikit-learn digits",
        command="stepdistill export runs/sim --out out/digits",
        default_steps=2,
        classes=NAMES,
        grids=grids,
        noise="fresh",
        figures=[{"steps": 1, "fd": 2.345678912}, {"steps": 2, "fd": 1.5, "note": "a|b"}],
    )
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "diffusers"
    assert "sim" in yaml.safe_load(header)["tags"]
    code = body.split("```python\n")[1].split("```")[0].splitlines()
    assert len(code) == 4
    assert 'from_pretrained("out/digits", trust_remote_code=True)' in code[1]
    compile("\n".join(code), "example", "exec")
    assert "| 2 | model_2 | 500 | 1 | 0.5 | 0.5 | -1 | 1 |" in body
    assert "| 1 | 2.34568 |  |" in body and "a\\|b" in body
    assert "fresh Gaussian noise" in body and "| teacher | digits-dit |" in body
    assert "1, 2; 2 if none is given" in body
