"""CLIP scores through open_clip's own code, with a small random model made here."""

from __future__ import annotations

import json

import pytest
import torch

open_clip = pytest.importorskip("open_clip")

from safetensors.torch import save_file  # noqa: E402

from stepdistill.eval.clip import ClipScorer, class_captions  # noqa: E402
from stepdistill.eval.images import to_pil, to_uint8  # noqa: E402
from stepdistill.run.errors import UserError  # noqa: E402

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder in open_clip's layout, and its architecture made known under a name."""
    path = tmp_path_factory.mktemp("clip")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL}))
    (path / "small-test-clip.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(path / "small-test-clip.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = open_clip.create_model("small-test-clip")
    save_file(net.state_dict(), path / "open_clip_model.safetensors")
    return path


@pytest.fixture(scope="module")
def images():
    return torch.rand((5, 1, 8, 8), generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_scores_are_scaled_cosines(folder, images):
    name = f"local-dir:{folder}"
    captions = class_captions(("zero", "one"), 5, "a scan of {}")
    assert captions == [f"a scan of {('zero', 'one')[i % 2]}" for i in range(5)]
    found = ClipScorer(name).scores(images, captions, batch_size=2)
    net, _, prepare = open_clip.create_model_and_transforms(name)
    net.eval()
    with torch.no_grad():
        seen = net.encode_image(
            torch.stack([prepare(to_pil(p)) for p in to_uint8(images)]), normalize=True
        )
        texts = net.encode_text(open_clip.get_tokenizer(name)(captions), normalize=True)
    wanted = (100 * (seen * texts).sum(1)).clamp_min(0)
    assert torch.allclose(found, wanted, atol=1e-3) and found.max() > 0


def test_a_file_of_weights_and_a_folder_agree(folder, images):
    from_file = ClipScorer("small-test-clip", str(folder / "open_clip_model.safetensors"))
    captions = ["a"] * 5
    assert torch.equal(
        from_file.scores(images, captions),
        ClipScorer(f"local-dir:{folder}").scores(images, captions),
    )
    with pytest.raises(UserError, match="5 images but 1 captions"):
        from_file.scores(images, ["a"])


def test_offline_there_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="clip needs the weights laion2b_s34b_b79k") as caught:
        ClipScorer()
    assert "\n" not in str(caught.value) and "local .safetensors file" in str(caught.value)


def test_what_cannot_be_loaded_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="knows no model ViT-B-33"):
        ClipScorer("ViT-B-33")
    with pytest.raises(UserError, match="neither a file nor a tag of ViT-B-32 .*openai"):
        ClipScorer("ViT-B-32", "openia")
    (tmp_path / "w.pt").write_bytes(b"pickle")
    with pytest.raises(UserError, match="must be a .safetensors file"):
        ClipScorer("small-test-clip", str(tmp_path / "w.pt"))
    (tmp_path / "w.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot load small-test-clip"):
        ClipScorer("small-test-clip", str(tmp_path / "w.safetensors"))
    with pytest.raises(UserError, match="needs open_clip_config.json and a .safetensors file"):
        ClipScorer(f"local-dir:{tmp_path}")


def test_captions_need_names():
    with pytest.raises(UserError, match="give prompts"):
        class_captions((), 3)
