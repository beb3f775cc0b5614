"""Captioned pictures: the emoji set, and captions in a folder's metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from stepdistill.data.emoji import captions_of
from stepdistill.data.images import DataConfig, open_data
from stepdistill.run.errors import UserError
from tests.children import stepdistill

ROWS = (
    ("HOT PEPPER", ["hot_pepper"], "1f336.png", 2),
    ("BALLOON", ["balloon", "party-balloon"], "1f388.png", 1),
    ("NOT DRAWN", ["gone"], "0000.png", 3),
)


@pytest.fixture
def package(tmp_path) -> Path:
    """As npm unpacks it: two pictures, half transparent, of three that are listed."""
    folder = tmp_path / "package"
    pictures = folder / "img" / "twitter" / "64"
    pictures.mkdir(parents=True)
    listed = []
    for name, short, file, order in ROWS:
        listed.append(
            {"name": name, "short_names": short, "image": file, "sort_order": order}
            | {"category": "Things"}
        )
        if file != "0000.png":
            image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
            image.paste((255, 0, 0, 255), (0, 0, 64, 32))
            image.save(pictures / file)
    (folder / "emoji.json").write_text(json.dumps(listed))
    return folder


def test_the_set_has_a_row_for_each_caption_of_each_picture(package, tmp_path) -> None:
    args = ["data", "emoji", "--from", str(package), "--out", "set"]
    done = stepdistill(*args, folder=tmp_path)
    assert done.code == 0, done.err
    assert done.out == "set: 2 pictures with 3 captions\n"
    rows = [json.loads(line) for line in (tmp_path / "set/metadata.jsonl").open()]
    assert [(row["file_name"], row["text"]) for row in rows] == [
        ("1f388.png", "balloon"),
        ("1f388.png", "party balloon"),
        ("1f336.png", "hot pepper"),
    ]
    assert "CC-BY 4.0" in (tmp_path / "set" / "NOTICE.txt").read_text()
    again = stepdistill(*args, folder=tmp_path)
    assert again.code == 2 and "set exists; choose another folder or pass --overwrite" in again.err
    assert stepdistill(*args, "--overwrite", folder=tmp_path).code == 0


def test_captions_are_the_classes_of_a_captioned_folder(package, tmp_path) -> None:
    stepdistill("data", "emoji", "--from", str(package), "--out", "set", folder=tmp_path)
    data = open_data(DataConfig(source=str(tmp_path / "set")))
    assert data.classes == ("balloon", "hot pepper", "party balloon")
    assert data.shape == (3, 64, 64) and len(data) == 3
    images, labels = data.load(range(3))
    assert labels.tolist() == [0, 2, 1]
    assert images[0, :, 10, 10].tolist() == [1, -1, -1]  # red
    assert torch.equal(images[0, :, 60, 10], torch.ones(3))  # white, where nothing is


def test_a_folder_of_the_user_s_is_not_overwritten(package, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    args = ["data", "emoji", "--from", str(package), "--out", "mine", "--overwrite"]
    done = stepdistill(*args, folder=tmp_path)
    assert done.code == 2 and "no set that this command has made" in done.err
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_captions_are_names_and_stand_alone(tmp_path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    table = tmp_path / "metadata.jsonl"
    table.write_text('{"file_name": "0.png", "text": "1984"}')
    assert open_data(DataConfig(source=str(tmp_path))).classes == ("1984",)
    table.write_text('{"file_name": "0.png", "text": "a cat", "label": 3}')
    with pytest.raises(UserError, match="metadata.jsonl:1: has both a label and a text"):
        open_data(DataConfig(source=str(tmp_path)))


def test_names_that_say_the_same_are_one_caption() -> None:
    row = {"name": "OM", "short_names": ["om_symbol", "symbol-om", "+1", "a"]}
    assert list(captions_of(row)) == ["om", "om symbol", "+1"]


@pytest.mark.parametrize("damage", ["nothing", "no json", "no pictures", "other list"])
def test_what_is_no_such_package_is_told(damage, package, tmp_path) -> None:
    if damage == "nothing":
        package = tmp_path / "nowhere"
    elif damage == "no json":
        (package / "emoji.json").write_text("{")
    elif damage == "no pictures":
        for file in package.glob("img/twitter/64/*"):
            file.unlink()
    else:
        (package / "emoji.json").write_text("[1, 2]")
    done = stepdistill("data", "emoji", "--from", str(package), "--out", "set", folder=tmp_path)
    assert done.code == 2 and done.err.count("\n") == 1 and str(package) in done.err
    assert not (tmp_path / "set").exists()
