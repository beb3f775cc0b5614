"""The digits classifier and the feature spaces."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from stepdistill.data.idx import DEBIAN_FOLDER
from stepdistill.data.images import DataConfig, open_data
from stepdistill.eval import classifier
from stepdistill.eval.classifier import (
    RECIPES,
    accuracy,
    load_classifier,
    save_classifier,
    shipped,
    split_digits,
    train_classifier,
)
from stepdistill.eval.features import extract, load_features, weights_sha
from stepdistill.eval.frechet import Stats, frechet_distance
from stepdistill.run.assets import ASSETS
from stepdistill.run.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return open_data(DataConfig()).load(range(1797))[0]


@pytest.mark.parametrize("name", RECIPES)
def test_the_shipped_classifier_is_as_good_as_its_record(name):
    folder = ASSETS / f"{name}-classifier"
    kept = json.loads((folder / "config.json").read_text())
    recorded, count = kept["test_accuracy"], kept["test_images"]
    assert recorded >= {"digits": 0.97, "fashion-mnist": 0.9}[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 500_000
    if name == "fashion-mnist" and not DEBIAN_FOLDER.is_dir():
        pytest.skip("the images of Fashion-MNIST are not installed")
    (_, labels), test = RECIPES[name].parts(0)
    assert len(test[0]) == count and len(labels) > 0
    assert accuracy(shipped(name), test) == pytest.approx(recorded, abs=2 / count)


def test_the_halves_do_not_meet():
    train, test = split_digits()
    assert sorted(torch.cat([train, test]).tolist()) == list(range(1797))


def shorten(monkeypatch, steps: int) -> None:
    short = replace(RECIPES["digits"], steps=steps)
    monkeypatch.setitem(classifier.RECIPES, "digits", short)


def test_training_repeats_itself_and_is_read_back(monkeypatch, tmp_path, digits):
    shorten(monkeypatch, 30)
    (first, correct), (again, _) = train_classifier(), train_classifier()
    assert weights_sha(first) == weights_sha(again) and correct > 0.5
    save_classifier(first, {"kind": "test"}, tmp_path / "c")
    assert torch.equal(load_classifier(tmp_path / "c")(digits[:9]), first(digits[:9]))


def test_the_command_writes_once(monkeypatch, tmp_path, capsys):
    shorten(monkeypatch, 2)
    monkeypatch.setattr("sys.argv", ["classifier", "--out", str(tmp_path / "c")])
    threads = torch.get_num_threads()
    classifier.main()
    torch.set_num_threads(threads)
    assert sorted(f.name for f in (tmp_path / "c").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    with pytest.raises(SystemExit):
        classifier.main()
    assert "pass --overwrite" in capsys.readouterr().err


def test_a_damaged_classifier_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read the classifier"):
        load_classifier(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read the classifier"):
        load_classifier(tmp_path)


def test_digits_features(digits):
    features = load_features("digits")
    found = extract(features, digits[:70], batch_size=32)
    assert found.shape == (70, features.dim) and found.dtype == torch.float32
    assert torch.allclose(found[:32], features(digits[:32]), atol=1e-5)
    assert len(features.sha) == 64 and features.sha == load_features("digits").sha
    with pytest.raises(UserError, match="features=digits sees 1x8x8 images, not 3x8x8"):
        features(torch.zeros(1, 3, 8, 8))
    assert load_features("fashion-mnist")(torch.zeros(2, 1, 28, 28)).shape == (2, 64)
    with pytest.raises(UserError, match="features=fashion-mnist sees 1x28x28 images, not 1x8x8"):
        load_features("fashion-mnist")(digits[:2])


def test_distance_grows_with_every_fault(digits):
    features = load_features("digits")
    real = Stats.of(extract(features, digits))
    noise = torch.randn(digits.shape, generator=torch.Generator().manual_seed(0))
    blurred = functional.avg_pool2d(functional.pad(digits, (1, 1, 1, 1), value=-1), 3, 1)
    faults = {
        "noise": [digits + s * noise for s in (0.1, 0.2, 0.4)],
        "blur": [digits.lerp(blurred, w) for w in (0.2, 0.5, 1)],
        "contrast": [digits * s for s in (0.9, 0.8, 0.6)],
        "missing": [digits[:k] for k in (1797, 100, 30)],
    }
    for name, versions in faults.items():
        found = [frechet_distance(Stats.of(extract(features, v)), real) for v in versions]
        assert found == sorted(found) and found[-1] > 1.0, (name, found)


def test_halves_of_the_digits_are_close(digits):
    """The floor of the distance: two sets of 900 real images."""
    found = extract(load_features("digits"), digits)
    train, test = split_digits()
    assert frechet_distance(Stats.of(found[train]), Stats.of(found[test])) < 1.5


def test_pixels_are_a_feature_space(digits):
    features = load_features("pixels", shape=(1, 8, 8))
    assert features.dim == 64
    assert torch.equal(extract(features, digits[:5]), digits[:5].flatten(1))
    with pytest.raises(UserError, match="needs the shape"):
        load_features("pixels")


def test_unknown_features_are_named():
    with pytest.raises(UserError, match="unknown features inseption; known: digits, fash"):
        load_features("inseption")
