"""Rows, the table with the teacher beside, and images in and out of folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from stepdistill.data.images import DataConfig, open_data
from stepdistill.eval.diversity import mean_pairwise_distance
from stepdistill.eval.features import extract, load_features
from stepdistill.eval.fid import CleanFid
from stepdistill.eval.frechet import Stats, frechet_distance
from stepdistill.eval.images import load_images, save_grid, save_images
from stepdistill.eval.runner import METRICS, Reference, Row, evaluate
from stepdistill.eval.table import results_table
from stepdistill.run.errors import UserError


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(open_data(DataConfig()), load_features("digits"))


@pytest.fixture(scope="module")
def images(reference) -> torch.Tensor:
    return reference.data.load(range(300))[0]


def test_rows_hold_the_figures(reference, images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    sets = {4: images, 1: images + 0.5 * noise}
    metrics = ["fd", "kid", "pr", "diversity"]
    rows = evaluate(sets, reference, model="m", method="sim", seed=7, metrics=metrics)
    assert [row.steps for row in rows] == [1, 4]
    bad, good = rows
    features = load_features("digits")
    wanted = frechet_distance(Stats.of(extract(features, images)), reference.stats)
    assert good.fd == pytest.approx(wanted)
    assert bad.fd > good.fd and bad.kid > good.kid + good.kid_se and bad.precision < good.precision
    assert good.diversity == pytest.approx(mean_pairwise_distance(images))
    assert (good.num, good.seed, good.features, good.reference) == (300, 7, "digits", "digits")
    assert good.feature_sha == features.sha and "torch" in good.versions
    assert good.fid is None and good.clip is None
    assert Row.model_validate_json(good.model_dump_json()) == good


def test_the_reference_is_read_once(images):
    class Counted:
        def __init__(self, data):
            self.data, self.loads = data, 0
            self.name, self.shape, self.classes = data.name, data.shape, data.classes

        def __len__(self):
            return len(self.data)

        def load(self, indices):
            self.loads += len(indices)
            return self.data.load(indices)

    data = Counted(open_data(DataConfig()))
    reference = Reference(data, load_features("digits"))
    for _ in range(2):
        evaluate({1: images, 2: images}, reference, model="m", method="x")
    assert data.loads == 1797


def test_a_folder_is_a_reference(tmp_path, images):
    save_images(images, tmp_path / "real")
    reference = Reference(tmp_path / "real", load_features("digits"))
    (row,) = evaluate({1: load_images(tmp_path / "real")}, reference, model="m", method="copy")
    assert row.fd < 1e-6 and row.reference == "real"


def test_what_cannot_be_evaluated_is_named(reference, images):
    def run(samples, **kwargs):
        return evaluate({1: samples}, reference, model="m", method="x", **kwargs)

    with pytest.raises(UserError, match="unknown metric fod; known: fd, kid"):
        run(images, metrics=["fod"])
    with pytest.raises(UserError, match="samples of m are 3x8x8, but the reference digits is 1x8"):
        run(images.expand(-1, 3, -1, -1))
    with pytest.raises(UserError, match="at least 2 images"):
        run(images[:1], metrics=["fd"])
    with pytest.raises(UserError, match="NaN or infinity"):
        run(images * float("nan"))
    with pytest.raises(UserError, match="clip was asked for"):
        run(images, metrics=["clip"])
    with pytest.raises(UserError, match="fid was asked for, but the reference"):
        run(images, metrics=["fid"])
    with pytest.raises(UserError, match="psnr: these samples stand for no real picture"):
        run(images, metrics=["psnr"])
    own = {"fd", "kid", "pr", "diversity", "fid", "clip", "straightness"}
    assert set(METRICS) == own | {"psnr", "feature_distance"}


def test_another_network_is_never_fid(images):
    pytest.importorskip("cleanfid")
    data = open_data(DataConfig())
    tool = CleanFid(extractor=lambda x: x.mean((2, 3)))
    reference = Reference(data, load_features("digits"), fid=tool)
    with pytest.raises(UserError, match="is not Inception"):
        evaluate({1: images}, reference, model="m", method="x", metrics=["fid"])


def row(model: str, steps: int | None, **kwargs) -> Row:
    given = {"reference": "digits", "features": "digits", "feature_sha": "s", "num": 2000}
    return Row(model=model, method="x", steps=steps, seed=0, **given, **kwargs)


def test_the_teacher_stands_beside_the_student():
    students = [row("student", 4, fd=2.0, kid=0.01, kid_se=0.002), row("student", 1, fd=3.0)]
    teachers = [row("teacher", n, fd=float(n)) for n in (32, 4, 1)]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(results_table(students, teachers))
    text = console.export_text()
    order = [
        line.split()[1:4:2] for line in text.splitlines() if "teacher" in line or "stud" in line
    ]
    assert order == [["1", "teacher"], ["1", "student"], ["4", "teacher"], ["4", "student"]] + [
        ["32", "teacher"]
    ]
    assert "10.0 ± 2.0" in text and "fid" not in text.lower() and "clip" not in text
    assert "digits features against digits; 2,000 samples" in text


def test_images_go_out_and_in(tmp_path):
    images = torch.linspace(-1.2, 1.2, 3 * 3 * 4 * 4).reshape(3, 3, 4, 4)
    paths = save_images(images, tmp_path / "out", indices=[7, 2, 10])
    assert [path.name for path in paths] == ["000007.png", "000002.png", "000010.png"]
    found = load_images(tmp_path / "out")
    assert torch.allclose(found, images.clamp(-1, 1)[[1, 0, 2]], atol=1 / 255 + 1e-6)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in paths)
    save_grid(images, tmp_path / "out" / "grid.png")
    assert len(load_images(tmp_path / "out")) == 3


def test_images_are_not_overwritten_unasked(tmp_path):
    old = torch.zeros(5, 1, 4, 4)
    save_images(old, tmp_path)
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="already holds 5 numbered images"):
        save_images(old + 1, tmp_path)
    assert (load_images(tmp_path)[0] < 0.1).all()
    save_images(old[:2] + 1, tmp_path, overwrite=True)
    assert len(load_images(tmp_path)) == 2 and (load_images(tmp_path) == 1).all()
    assert (tmp_path / "notes.txt").exists()


def test_a_broken_or_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        load_images(tmp_path / "nowhere")
    save_images(torch.zeros(2, 1, 4, 4), tmp_path)
    (tmp_path / "000001.png").write_bytes(b"")
    with pytest.raises(UserError, match="000001.png is broken"):
        load_images(tmp_path)


def test_a_grid_shows_every_image(tmp_path):
    images = torch.linspace(-1, 1, 5)[:, None, None, None].expand(-1, 1, 2, 2)
    save_grid(images, tmp_path / "g.png", columns=3, scale=2)
    sheet = np.asarray(Image.open(tmp_path / "g.png"))[::2, ::2]
    assert sheet.shape == (7, 10)  # 2 rows and 3 columns of 2 pixels, with gaps of one
    assert [sheet[1, 1], sheet[2, 5], sheet[1, 8]] == [0, 64, 128]
    assert [sheet[4, 1], sheet[4, 4], sheet[4, 7]] == [191, 255, 255]
    with pytest.raises(UserError, match="g.png exists"):
        save_grid(images, tmp_path / "g.png")
