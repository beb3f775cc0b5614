"""Fashion-MNIST from its idx files, plain or gzipped.

An idx file is a big-endian header (two zero bytes, type byte, number of axes, one int32 an axis)
followed by the values; 0x08 is unsigned byte (LeCun's MNIST page).
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from stepdistill.data.sets import MemorySet
from stepdistill.run.errors import UserError

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def open_fashion_mnist(
    path: Path | None = None,
    size: int | None = None,
    channels: int | None = None,
    *,
    split: Literal["train", "test"] = "train",
) -> MemorySet:
    """The 60,000 training (10,000 test) images, 28x28 grey, ten classes.

    Args:
        path: the folder of the idx files; else $FASHION_MNIST, else Debian's folder.
        size: side to resample to, by area means.
        channels: 1, or 3 for the grey value repeated.
        split: which pair of files.

    Raises:
        UserError: a file is missing, damaged, or not the kind of idx file its name says.
    """
    folder = _folder(path)
    prefix = "train" if split == "train" else "t10k"
    image_file = _file(folder, f"{prefix}-images-idx3-ubyte")
    label_file = _file(folder, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(image_file, axes=3), read_idx(label_file, axes=1)
    if len(images) != len(labels):
        raise UserError(
            f"{image_file} holds {len(images)} images but {label_file} {len(labels)} labels; "
            "fetch both files again"
        )
    if len(images) == 0:
        raise UserError(f"{image_file} holds no images; fetch it again")
    if labels.max() >= len(CLASSES):
        raise UserError(f"{label_file} holds label {labels.max()}, beyond 9; fetch it again")
    return MemorySet(
        "fashion-mnist",
        torch.from_numpy(images),
        torch.from_numpy(labels),
        CLASSES,
        white=255,
        size=size,
        channels=channels,
    )


def read_idx(path: Path, *, axes: int) -> npt.NDArray[np.uint8]:
    """The unsigned bytes of one idx file with the given number of axes.

    Raises:
        UserError: unreadable, wrong magic number, or fewer values than the header promises.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; fetch it again") from error
    header = 4 + 4 * axes
    magic = int.from_bytes(raw[:4], "big")
    if len(raw) < header or magic != 0x800 + axes:
        raise UserError(
            f"{path} is not an idx file of bytes with {axes} axes (magic number {magic:#010x}, "
            f"expected {0x800 + axes:#010x})"
        )
    shape = struct.unpack(f">{axes}I", raw[4:header])
    if len(raw) - header != math.prod(shape):
        raise UserError(
            f"{path} holds {len(raw) - header} values where its header promises "
            f"{math.prod(shape)}; fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def _folder(path: Path | None) -> Path:
    named = path or (Path(env) if (env := os.environ.get("FASHION_MNIST")) else None)
    folder = named.expanduser() if named else DEBIAN_FOLDER
    if not folder.is_dir():
        raise UserError(
            f"Fashion-MNIST: no folder {folder}; set data.path or $FASHION_MNIST to the folder of "
            "its four *-ubyte.gz files (Debian: apt-get install dataset-fashion-mnist)"
        )
    return folder


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"Fashion-MNIST: neither {name} nor {name}.gz in {folder}")
