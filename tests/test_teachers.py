"""The shipped teachers: their size, that plain diffusers loads them, and how well they draw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stepdistill.data.digits import open_digits
from stepdistill.eval.diversity import mean_pairwise_distance
from stepdistill.eval.features import load_features
from stepdistill.eval.generate import generate, load_pipeline
from stepdistill.eval.runner import Reference, evaluate
from stepdistill.run.assets import ASSETS, TEACHERS, load_teacher

HEADS = {"digits-dit": ("rf", "velocity"), "digits-unet": ("vp", "eps")}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(open_digits(), load_features("digits"))


@pytest.mark.parametrize("name", TEACHERS)
def test_it_is_small_half_precision_and_read_from_its_folder(name: str) -> None:
    folder = ASSETS / name
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 2_000_000
    weights = folder / "model" / "diffusion_pytorch_model.safetensors"
    den = load_teacher(name)
    count = sum(param.numel() for param in den.net.parameters())
    assert weights.stat().st_size < 2.2 * count
    assert (den.process.name, den.head.name) == HEADS[name]
    assert len(den.classes) == 10 and den.null_label == 10
    assert next(den.net.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", TEACHERS)
def test_the_pipeline_file_inside_is_the_one_of_this_version(name: str, root: Path) -> None:
    inside = (ASSETS / name / "pipeline.py").read_text(encoding="utf-8")
    assert inside == (root / "pipelines" / "image.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TEACHERS)
def test_many_steps_are_close_to_the_data_and_one_is_not(name: str, reference: Reference) -> None:
    pipe = load_pipeline(ASSETS / name, trust_remote_code=True)
    images = {n: generate(pipe, 600, seed=1, steps=n) for n in (1, 32)}
    one, many = evaluate(images, reference, model=name, method="teacher", seed=1)
    assert many.fd is not None and many.fd < 1.5
    assert one.fd is not None and one.fd > 4 * many.fd
    real = mean_pairwise_distance(open_digits().load(range(1797))[0])
    assert many.diversity == pytest.approx(real, rel=0.06)
