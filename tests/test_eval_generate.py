"""Samples depend on the seed and their index only, for our pipelines and diffusers' own."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from stepdistill.eval.generate import _generator, class_count, generate, load_pipeline
from stepdistill.pipelines.image import ImagePipeline
from stepdistill.run.errors import UserError
from stepdistill.run.rng import seeded


def unet(**kwargs) -> UNet2DModel:
    with seeded(0):
        net = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            **kwargs,
        )
    return net.eval()


@pytest.fixture(scope="module")
def conditional() -> ImagePipeline:
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
    )
    generator = torch.Generator().manual_seed(0)
    for weights in model.parameters():  # the class counts from the first step
        torch.nn.init.normal_(weights, std=0.2, generator=generator)
    return ImagePipeline(model, FlowMatchEulerDiscreteScheduler())


def test_batch_size_does_not_matter(conditional):
    small = generate(conditional, 64, seed=0, steps=2, batch_size=7)
    large = generate(conditional, 64, seed=0, steps=2, batch_size=64)
    assert small.shape == (64, 1, 8, 8) and -1 <= small.min() < small.max() <= 1
    assert torch.allclose(small, large, atol=1e-5)


def test_any_share_of_the_indices_gives_the_same_samples(conditional):
    whole = generate(conditional, 12, seed=3, steps=1)
    parts = [generate(conditional, range(rank, 12, 2), seed=3, steps=1) for rank in range(2)]
    assert torch.allclose(torch.stack(parts, 1).flatten(0, 1), whole, atol=1e-5)
    assert not torch.allclose(generate(conditional, 12, seed=4, steps=1), whole, atol=0.1)


def test_labels_are_the_index_modulo_the_classes(conditional):
    assert class_count(conditional) == 10
    default = generate(conditional, 12, seed=0, steps=1)
    given = generate(conditional, 12, seed=0, steps=1, labels=[i % 10 for i in range(12)])
    other = generate(conditional, 12, seed=0, steps=1, labels=[0] * 12)
    assert torch.equal(default, given)
    assert torch.allclose(default[0], other[0], atol=1e-5)
    assert not torch.allclose(default[1:10], other[1:10], atol=1e-3)


class Echo:
    """A pipeline that shows what it was called with."""

    config: dict = {}
    components: dict = {}

    def __init__(self):
        self.calls = []

    def set_progress_bar_config(self, **kwargs):
        pass

    def __call__(self, prompt, generator, num_inference_steps, output_type, strength=1.0):
        self.calls.append((prompt, num_inference_steps, strength))
        if num_inference_steps > 4:
            raise ValueError("no grid for that")
        noise = torch.cat([torch.rand(1, 1, 2, 2, generator=g) for g in generator])
        return SimpleNamespace(images=noise)


def test_the_noise_is_exactly_the_same_for_any_batch_size():
    sets = [
        generate(Echo(), 64, seed=9, steps=1, prompts=["a"], batch_size=size) for size in (7, 64)
    ]
    assert torch.equal(*sets)


def test_text_pipelines_take_prompts_in_turn():
    pipeline = Echo()
    options = {"strength": 0.5}
    generate(
        pipeline, range(3, 6), seed=0, steps=2, prompts=["a", "b"], batch_size=2, options=options
    )
    assert pipeline.calls == [(["b", "a"], 2, 0.5), (["b"], 2, 0.5)]


def test_what_a_pipeline_does_not_take_is_named(conditional):
    with pytest.raises(UserError, match="Echo needs prompts"):
        generate(Echo(), 2, seed=0, steps=1)
    with pytest.raises(UserError, match="ImagePipeline takes no prompts"):
        generate(conditional, 2, seed=0, steps=1, prompts=["a"])
    with pytest.raises(UserError, match="Echo: guidance cannot be set; it takes"):
        generate(Echo(), 2, seed=0, steps=1, prompts=["a"], options={"guidance": 2})
    with pytest.raises(UserError, match=r"refuses the call \(steps=5\): no grid for that"):
        generate(Echo(), 2, seed=0, steps=5, prompts=["a"])
    with pytest.raises(UserError, match="3 labels for 2 samples"):
        generate(conditional, 2, seed=0, steps=1, labels=[1, 2, 3])


def test_stock_pipelines():
    plain = DDIMPipeline(unet(), DDIMScheduler(timestep_spacing="trailing"))
    sets = [generate(plain, 6, seed=0, steps=2, batch_size=size) for size in (4, 6)]
    assert sets[0].shape == (6, 1, 8, 8) and torch.allclose(*sets, atol=1e-5)
    with pytest.raises(UserError, match="unconditional and takes no labels"):
        generate(plain, 6, seed=0, steps=2, labels=[0] * 6)
    consistency = ConsistencyModelPipeline(
        unet(num_class_embeds=5), CMStochasticIterativeScheduler()
    )
    assert class_count(consistency) == 5
    sets = [generate(consistency, 6, seed=0, steps=2, batch_size=size) for size in (4, 6)]
    assert torch.allclose(*sets, atol=1e-5)


def test_no_two_samples_of_a_seed_share_their_noise():
    """torch keeps 32 bits of a seed, where 100,000 random hashes would meet about once."""
    seeds = [_generator(0, index).initial_seed() for index in range(100_000)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**32
    others = [_generator(1, index).initial_seed() for index in range(1000)]
    assert not set(others) & set(seeds[:1000])


def test_a_saved_pipeline_is_loaded_with_trust_only(conditional, tmp_path):
    folder = tmp_path / "p"
    conditional.save_pretrained(folder)
    with pytest.raises(UserError, match="brings its own pipeline file; read it"):
        load_pipeline(folder)
    loaded = load_pipeline(folder, trust_remote_code=True)
    assert torch.equal(
        generate(loaded, 4, seed=0, steps=1), generate(conditional, 4, seed=0, steps=1)
    )


def test_stock_folders_need_no_trust(tmp_path):
    plain = DDIMPipeline(unet(), DDIMScheduler())
    plain.save_pretrained(tmp_path)
    assert isinstance(load_pipeline(tmp_path), DDIMPipeline)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot load the pipeline"):
        load_pipeline(tmp_path)


def test_what_is_no_pipeline_is_named(tmp_path):
    with pytest.raises(UserError, match="has no model_index.json"):
        load_pipeline(tmp_path)
    with pytest.raises(UserError, match="no local folder; code is run from local folders only"):
        load_pipeline("someone/model", trust_remote_code=True)
    with pytest.raises(UserError, match="cannot load the pipeline someone/model"):
        load_pipeline("someone/model")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="cannot load the pipeline"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    with pytest.raises(UserError, match="cannot load the pipeline"):
        load_pipeline(tmp_path)
