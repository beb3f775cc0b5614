"""Digits, Fashion-MNIST's idx files, the order of use."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stepdistill.data.images import DataConfig, open_data
from stepdistill.data.order import batch_positions, share
from stepdistill.run.errors import UserError


def test_digits_are_scaled_by_their_sixteen_levels():
    digits = open_data(DataConfig())
    images, labels = digits.load([0, 1796])
    assert (len(digits), digits.shape, len(digits.classes)) == (1797, (1, 8, 8), 10)
    assert images.dtype == torch.float32 and labels.tolist() == [0, 8]
    # the first row of the first digit is 0 0 5 13 9 1 0 0
    wanted = torch.tensor([0, 0, 5, 13, 9, 1, 0, 0]) / 8 - 1
    assert torch.equal(images[0, 0, 0], wanted)


def test_digits_resample_by_area_and_repeat_channels():
    plain, _ = open_data(DataConfig()).load([3])
    small, _ = open_data(DataConfig(size=4, channels=3)).load([3])
    means = plain.reshape(1, 1, 4, 2, 4, 2).mean((3, 5))
    assert torch.allclose(small, means.expand(-1, 3, -1, -1), atol=1e-6)
    assert open_data(DataConfig(size=16)).shape == (1, 16, 16)


@pytest.mark.parametrize("bad", [{"surce": "digits"}, {"channels": 2}, {"size": 0}])
def test_config_refuses_what_it_does_not_know(bad):
    with pytest.raises(ValidationError):
        DataConfig(**bad)


def test_an_unknown_source_is_named():
    with pytest.raises(UserError, match="data.source=digitz is neither"):
        open_data(DataConfig(source="digitz"))
    with pytest.raises(UserError, match="data.path belongs to"):
        open_data(DataConfig(path=Path("/tmp")))


def write_idx(path: Path, values: np.ndarray, magic: int | None = None) -> None:
    header = struct.pack(f">{values.ndim + 1}I", magic or 0x800 + values.ndim, *values.shape)
    raw = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def fashion(tmp_path):
    pixels = np.arange(5 * 28 * 28).reshape(5, 28, 28) % 256
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", pixels)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([9, 0, 3, 3, 1]))
    return tmp_path, pixels


def open_fashion(folder: Path, **kwargs):
    return open_data(DataConfig(source="fashion-mnist", path=folder, **kwargs))


def test_idx_plain_and_gzipped(fashion, monkeypatch):
    folder, pixels = fashion
    images, labels = open_fashion(folder).load([4, 0])
    assert torch.allclose(images[1, 0], torch.from_numpy(pixels[0]).float() / 127.5 - 1, atol=1e-6)
    assert labels.tolist() == [1, 9]
    assert open_fashion(folder, size=14).shape == (1, 14, 14)
    monkeypatch.setenv("FASHION_MNIST", str(folder))
    found = open_data(DataConfig(source="fashion-mnist"))
    assert len(found) == 5 and found.classes[9] == "Ankle boot"
    write_idx(folder / "t10k-images-idx3-ubyte", pixels[:2])
    write_idx(folder / "t10k-labels-idx1-ubyte", np.array([7, 7]))
    held_out = open_data(DataConfig(source="fashion-mnist-test", path=folder))
    assert held_out.load([1])[1].tolist() == [7] and len(held_out) == 2


def test_a_missing_idx_file_is_named(fashion):
    folder, _ = fashion
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="neither train-labels-idx1-ubyte nor"):
        open_fashion(folder)
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        open_fashion(folder / "nowhere")


def test_a_wrong_magic_number_is_named(fashion):
    folder, pixels = fashion
    write_idx(folder / "train-images-idx3-ubyte.gz", pixels, magic=0x0D03)
    with pytest.raises(UserError, match=r"magic number 0x00000d03, expected 0x00000803"):
        open_fashion(folder)


@pytest.mark.parametrize("damage", ["cut", "not gzip", "empty"])
def test_a_damaged_idx_file_is_named(fashion, damage):
    folder, _ = fashion
    path = folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-40], "not gzip": b"hello" * 9, "empty": b""}[damage])
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz"):
        open_fashion(folder)


def test_a_header_that_promises_more_than_there_is(fashion):
    folder, pixels = fashion
    path = folder / "train-images-idx3-ubyte.gz"
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(raw[:-1]))
    with pytest.raises(UserError, match=f"holds {pixels.size - 1} values .* {pixels.size}"):
        open_fashion(folder)


def test_images_and_labels_must_match(fashion):
    folder, _ = fashion
    write_idx(folder / "train-labels-idx1-ubyte", np.array([1, 2]))
    with pytest.raises(UserError, match="5 images but .* 2 labels"):
        open_fashion(folder)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 25])
def test_every_image_is_used_once_an_epoch(batch_size):
    n, epochs = 10, 7
    steps = n * epochs // batch_size + 1
    used = np.concatenate([batch_positions(s, batch_size, n, seed=3) for s in range(steps)])
    for epoch in range(epochs):
        assert sorted(used[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert not np.array_equal(used[:n], used[n : 2 * n])


def test_the_order_is_one_sequence_cut_into_batches():
    whole = np.concatenate([batch_positions(s, 6, 100, seed=0) for s in range(50)])
    other = np.concatenate([batch_positions(s, 25, 100, seed=0) for s in range(12)])
    assert np.array_equal(whole, other)
    assert not np.array_equal(whole[:100], batch_positions(0, 100, 100, seed=1))


def test_the_order_is_pinned():
    """A resumed run must meet the same images whatever the version of numpy."""
    assert batch_positions(0, 8, 8, seed=0).tolist() == PINNED[0]
    assert batch_positions(5, 8, 8, seed=42).tolist() == PINNED[1]


PINNED = ([7, 4, 2, 6, 5, 0, 1, 3], [7, 2, 1, 3, 0, 6, 5, 4])


def test_processes_share_a_batch():
    parts = [batch_positions(4, 12, 100, seed=0)[share(12, rank, 3)] for rank in range(3)]
    assert np.array_equal(np.concatenate(parts), batch_positions(4, 12, 100, seed=0))
    with pytest.raises(UserError, match="batch_size=10 does not divide among 4 .* such as 12"):
        share(10, 0, 4)
