"""Folders of images: layouts, decoding, and every kind of broken file."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.data.folder import FolderSet
from stepdistill.data.images import DataConfig, open_data
from stepdistill.run.errors import UserError


def write(path: Path, value=128, size=(8, 8), mode="L", **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **kwargs)
    return path


def noisy(path: Path, seed: int = 0, side: int = 32) -> Path:
    """A picture that does not compress, so that cutting it in half cuts pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.Generator(np.random.Philox(seed)).integers(0, 256, (side, side, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def test_class_folders_are_numbered_by_value(tmp_path):
    for name in ("10", "2", "1"):
        write(tmp_path / name / "a.png", value=int(name))
    write(tmp_path / "2" / "deeper" / "b.png", value=2)
    (tmp_path / "2" / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    data = open_data(DataConfig(source=str(tmp_path)))
    images, labels = data.load(range(len(data)))
    assert data.classes == ("1", "2", "10") and labels.tolist() == [0, 1, 1, 2]
    assert torch.allclose((images[:, 0, 0, 0] + 1) * 127.5, torch.tensor([1.0, 2, 2, 10]))
    assert data.shape == (1, 8, 8)


def test_loose_images_have_no_classes(tmp_path):
    write(tmp_path / "b.png", value=2)
    write(tmp_path / "a.jpg", value=1)
    write(tmp_path / ".hidden.png")
    data = FolderSet(tmp_path)
    assert len(data) == 2 and data.classes == () and data.load([0, 1])[1].tolist() == [0, 0]


def test_two_layouts_at_once_are_refused(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "cats" / "b.png")
    with pytest.raises(UserError, match="both beside and inside its sub-folders"):
        FolderSet(tmp_path)


def test_metadata_with_names(tmp_path):
    for name in ("x.png", "y.png", "z.png"):
        write(tmp_path / name)
    rows = [("y.png", "dog"), ("x.png", "cat"), ("z.png", "dog")]
    lines = [json.dumps({"file_name": name, "label": label}) for name, label in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    data = FolderSet(tmp_path)
    assert data.classes == ("cat", "dog") and data.load([0, 1, 2])[1].tolist() == [1, 0, 1]


def test_metadata_with_numbers(tmp_path):
    write(tmp_path / "x.png")
    write(tmp_path / "sub" / "y.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\nsub/y.png,3\nx.png,1\n")
    data = FolderSet(tmp_path)
    assert data.classes == ("0", "1", "2", "3") and data.load([0, 1])[1].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("metadata.csv", "name,label\na.png,1\n", r"metadata.csv:1: needs a column file_name"),
        ("metadata.csv", "file_name,label\n,1\n", r"metadata.csv:2: needs a file_name"),
        ("metadata.csv", "file_name\n", r"metadata.csv lists no images"),
        ("metadata.csv", "file_name\n../a.png\n", r"must lie inside"),
        ("metadata.csv", "file_name,label\na.png,1\nb.png,\n", r"b.png has no label"),
        ("metadata.csv", "file_name,label\na.png,99999999\n", r"label 99999999 is out of range"),
        ("metadata.jsonl", '{"file_name": "a.png"\n', r"metadata.jsonl:1: not JSON"),
        ("metadata.jsonl", '\n["a.png"]\n', r"metadata.jsonl:2: needs a text file_name"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 0.5}\n', r"jsonl:1: label must be"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": -1}\n', r"label -1 is out of range"),
    ],
)
def test_bad_metadata_is_named_by_line(tmp_path, name, text, says):
    write(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        FolderSet(tmp_path)


def test_metadata_may_name_a_file_that_is_missing(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name\ngone.png\na.png\n")
    data = FolderSet(tmp_path)
    assert [(skip.path.name, skip.reason) for skip in data.skipped] == [
        ("gone.png", "No such file or directory")
    ]
    with pytest.raises(UserError, match=r"gone.png is broken \(No such file"):
        FolderSet(tmp_path, on_error="stop")


BROKEN = {
    "empty.png": "empty file",
    "text.png": "not an image",
    "cut.png": "truncated",
    "cut.jpg": "truncated",
}


@pytest.fixture
def broken(tmp_path) -> Path:
    for index in range(3):
        noisy(tmp_path / f"good{index}.png", index)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("this is no picture")
    for name in ("cut.png", "cut.jpg"):
        path = noisy(tmp_path / name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return tmp_path


def test_broken_files_are_named_counted_and_skipped(broken, caplog):
    with caplog.at_level(logging.WARNING):
        data = FolderSet(broken)
    assert len(data) == 3
    assert {skip.path.name for skip in data.skipped} == set(BROKEN)
    for skip in data.skipped:
        assert BROKEN[skip.path.name] in skip.reason
        assert caplog.text.count(f"skipped {skip.path}:") == 1
    assert "4 of 7 images skipped" in caplog.text
    assert data.load([0, 1, 2])[0].shape == (3, 3, 32, 32)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_can_stop_the_run(broken, name):
    for other in set(BROKEN) - {name}:
        (broken / other).unlink()
    with pytest.raises(UserError, match=rf"{name} is broken .*data.on_error=skip"):
        open_data(DataConfig(source=str(broken), on_error="stop"))


def corrupt_middle(path: Path) -> None:
    """Damage pixels while header and ending stay whole."""
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 64] = bytes(64)
    path.write_bytes(raw)


def test_damage_inside_is_met_at_first_use(tmp_path, caplog):
    for index in range(4):
        noisy(tmp_path / f"{index}.png", index)
    corrupt_middle(tmp_path / "1.png")
    data = FolderSet(tmp_path)
    assert len(data) == 4 and not data.skipped
    with caplog.at_level(logging.WARNING):
        images = data.load([0, 1, 2, 1])[0]
    assert torch.equal(images[1], images[2]) and torch.equal(images[3], images[2])
    assert [skip.path.name for skip in data.skipped] == ["1.png"]
    assert caplog.text.count("skipped") == 1
    with pytest.raises(UserError, match=r"1.png is broken"):
        FolderSet(tmp_path, on_error="stop").load([1])


def test_folders_without_a_whole_image(tmp_path):
    with pytest.raises(UserError, match="no images in"):
        FolderSet(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(UserError, match="no images in"):
        FolderSet(tmp_path)
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match=r"no whole image .* all 1 are broken.*a.png \(empty file"):
        FolderSet(tmp_path)
    noisy(tmp_path / "b.png")
    corrupt_middle(tmp_path / "b.png")
    with pytest.raises(UserError, match="every image turned out broken"):
        FolderSet(tmp_path).load([0])


def test_sizes_that_differ_need_data_size(tmp_path):
    write(tmp_path / "a.png", size=(8, 8))
    write(tmp_path / "b.png", size=(6, 8))
    with pytest.raises(UserError, match=r"differ in size \(8x8, 6x8\); set data.size"):
        FolderSet(tmp_path)
    assert FolderSet(tmp_path, size=4).load([0, 1])[0].shape == (2, 1, 4, 4)


def test_a_huge_image_is_skipped_with_its_size(tmp_path, monkeypatch):
    write(tmp_path / "a.png", size=(8, 8))
    write(tmp_path / "huge.png", size=(20, 20))
    write(tmp_path / "larger.png", size=(60, 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.warns(Image.DecompressionBombWarning):
        data = FolderSet(tmp_path)
    reasons = {skip.path.name: skip.reason for skip in data.skipped}
    assert len(data) == 1 and "20x20 is more than 300 pixels" in reasons["huge.png"]
    assert "3600 pixels" in reasons["larger.png"]


def test_modes_are_mixed_into_one_shape(tmp_path):
    write(tmp_path / "grey.png", value=51)
    write(tmp_path / "palette.png", value=0, mode="P")
    write(tmp_path / "clear.png", value=(9, 9, 9, 0), mode="RGBA")
    write(tmp_path / "one.png", value=1, mode="1")
    write(tmp_path / "deep.png", value=257 * 51, mode="I;16")
    write(tmp_path / "print.jpg", value=(0, 0, 0, 0), mode="CMYK")
    data = FolderSet(tmp_path)
    images, _ = data.load(range(len(data)))
    assert data.shape == (3, 8, 8)
    values = (images[:, :, 0, 0] + 1) * 127.5
    shown = {path.stem: value for path, value in zip(data._files, values.tolist(), strict=True)}
    for name, value in {"grey": 51, "deep": 51, "clear": 255, "one": 255, "print": 255}.items():
        assert shown[name] == pytest.approx([value] * 3, abs=1), name
    grey, _ = FolderSet(tmp_path, channels=1).load([0])
    assert grey.shape == (1, 1, 8, 8)


def test_the_middle_square_is_kept_upright(tmp_path):
    pixels = np.zeros((8, 24), np.uint8)
    pixels[:, 8:16] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    (image,), _ = FolderSet(tmp_path, size=8).load([0])
    assert torch.allclose(image, torch.full((1, 8, 8), 200 / 127.5 - 1))
    (tmp_path / "wide.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert FolderSet(tmp_path).shape == (1, 24, 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp"])
def test_random_damage_never_escapes(tmp_path, kind):
    """Whatever bytes are hit, an image is read, skipped or refused with a line; nothing else."""
    whole = noisy(tmp_path / f"a.{kind}", side=12).read_bytes()
    draw = random.Random(0)
    outcomes = set()
    for _ in range(60):
        raw = bytearray(whole)
        for _ in range(draw.choice([0, 1, 40])):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        (tmp_path / f"a.{kind}").write_bytes(raw[: draw.choice([len(raw), len(raw) // 2])])
        try:
            FolderSet(tmp_path, size=12).load([0])
            outcomes.add("read")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
