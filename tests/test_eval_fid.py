"""FID through clean-fid's own code, with locally made networks in the place of the download."""

from __future__ import annotations

import hashlib
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

cleanfid_features = pytest.importorskip("cleanfid.features")

from cleanfid import fid as cleanfid  # noqa: E402
from cleanfid import inception_pytorch  # noqa: E402

from stepdistill.data.images import DataConfig, open_data  # noqa: E402
from stepdistill.eval import inception  # noqa: E402
from stepdistill.eval.features import extract, load_features  # noqa: E402
from stepdistill.eval.fid import CleanFid, Moments  # noqa: E402
from stepdistill.eval.images import save_images  # noqa: E402
from stepdistill.eval.runner import Reference, evaluate  # noqa: E402
from stepdistill.run.errors import UserError  # noqa: E402

pytestmark = [  # of the libraries that clean-fid calls in their old way
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchvision"),
]


def means(images: torch.Tensor) -> torch.Tensor:
    """Four means a channel of images [B, 3, 299, 299]."""
    return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture
def folders(tmp_path):
    digits = open_data(DataConfig())
    for name, start in (("a", 0), ("b", 40)):
        save_images(digits.load(range(start, start + 40))[0], tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def test_distance_is_clean_fids(folders, tmp_path):
    wanted = cleanfid.compute_fid(
        *map(str, folders),
        num_workers=0,
        device=torch.device("cpu"),
        custom_feat_extractor=means,
        verbose=False,
        use_dataparallel=False,
    )
    tool = CleanFid(extractor=means)
    assert tool.name == "fd" and tool.sha is None  # not Inception, so not FID
    assert tool.distance(*folders) == pytest.approx(wanted, rel=1e-9)
    moments = tool.moments(folders[1])
    np.savez(tmp_path / "b.npz", mu=moments.mu, sigma=moments.sigma)
    assert tool.distance(folders[0], tmp_path / "b.npz") == pytest.approx(wanted, rel=1e-6)


def test_bad_folders_and_statistics_are_named(folders, tmp_path):
    tool = CleanFid(extractor=means)
    with pytest.raises(UserError, match="no folder .*nowhere"):
        tool.distance(folders[0], tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="at least 2 images in .*empty"):
        tool.moments(tmp_path / "empty")
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="bad.npz holds no statistics"):
        tool.distance(folders[0], tmp_path / "bad.npz")
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(UserError, match="do not fit together"):
        Moments.read(tmp_path / "odd.npz")
    with pytest.raises(UserError, match="3 values a feature, this network 12"):
        tool.distance(folders[0], Moments(np.zeros(3), np.eye(3)))


def place(monkeypatch, path: Path, sha256: str | None = None) -> str:
    """Let a mode read a local file, which is the right one if its hash is not given otherwise."""
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "0" * 64
    made = inception.Weights(path, "https://example.invalid/weights", sha256 or found)
    monkeypatch.setattr(inception, "weights", lambda mode: made)
    return found


def offline(*args, **kwargs):
    raise urllib.error.URLError("no network")


@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch"])
def test_offline_there_is_one_line(monkeypatch, tmp_path, mode):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    wanted = inception.weights(mode)
    if mode == "clean":
        place(monkeypatch, tmp_path / "w.pt")
        wanted = inception.weights(mode)
    with pytest.raises(UserError) as caught:
        CleanFid(mode)
    line = str(caught.value)
    assert "\n" not in line and str(wanted.path) in line and wanted.url in line
    assert "no network" in line


def test_the_published_hashes_are_what_is_asked_for():
    assert "6726825d" in inception.weights("legacy_pytorch").path.name  # part of the published name
    assert inception.weights("legacy_pytorch").sha256.startswith("6726825d")
    assert inception.weights("legacy_pytorch").url == inception_pytorch.FID_WEIGHTS_URL
    assert (
        inception.weights("clean").url
        == cleanfid_features.check_download_url.__globals__["inception_url"]
    )


def test_another_network_is_not_called_inception(monkeypatch, tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(b"another network")
    place(monkeypatch, path, sha256="f" * 64)
    with pytest.raises(UserError, match="is not the Inception network of FID"):
        load_features("inception")


class Net(nn.Module):
    """Shaped as the TorchScript file is: `layers` maps [B, 3, 299, 299] to 2,048 values."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.ConstantPad1d((0, 2036), 0.0)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_clean_mode_from_file_to_row(monkeypatch, tmp_path):
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Net()).save(str(path))
    sha = place(monkeypatch, path)
    real = cleanfid_features.InceptionV3W
    monkeypatch.setattr(
        cleanfid_features, "InceptionV3W", lambda _, **kwargs: real(str(tmp_path), **kwargs)
    )
    root = cleanfid.frechet_distance  # of the values that are not padding: 12 in the place of 2,048
    monkeypatch.setattr(
        cleanfid,
        "frechet_distance",
        lambda m, c, n, d: root(m[:12], c[:12, :12], n[:12], d[:12, :12]),
    )
    tool = CleanFid("clean")
    assert (tool.name, tool.sha) == ("fid", sha)
    digits = open_data(DataConfig())
    digits._labels, digits._pixels = digits._labels[:24], digits._pixels[:24]
    reference = Reference(digits, load_features("inception"), fid=tool)
    images = digits.load(range(24))[0]
    save_images(images, tmp_path / "i")
    assert np.allclose(
        extract(reference.extractor, images).numpy().mean(0), tool.moments(tmp_path / "i").mu
    )
    (row,) = evaluate({1: images}, reference, model="m", method="copy", metrics=["fid"])
    assert row.fid == pytest.approx(0, abs=1e-3) and row.fid_mode == "clean"
    assert row.feature_sha == sha


def test_legacy_mode_loads_the_port(monkeypatch, tmp_path):
    """The real architecture, with weights made here, through torch's own cache folder."""
    with monkeypatch.context() as patch:
        patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *a, **k: None)
        net = inception_pytorch.fid_inception_v3()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = inception.weights("legacy_pytorch").path
    path.parent.mkdir(parents=True)
    torch.save(net.state_dict(), path)
    sha = place(monkeypatch, path)
    features = load_features("inception-legacy")
    assert (features.name, features.sha) == ("inception-legacy", sha)
    found = extract(features, open_data(DataConfig()).load(range(2))[0])
    assert found.shape == (2, 2048) and torch.isfinite(found).all()
