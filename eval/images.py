"""Images in and out of folders: numbered PNGs and grids.

Images are [N, C, H, W] in [-1, 1] with C = 1 (grey) or 3 (RGB).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from stepdistill.data.folder import FolderSet
from stepdistill.run.errors import UserError
from stepdistill.run.files import write_bytes

_NUMBERED = re.compile(r"\d{6,}\.png")


def load_images(folder: Path, channels: Literal[1, 3] | None = None) -> Tensor:
    """The images of a folder in the order of their names, [N, C, H, W] in [-1, 1].

    Where there are numbered PNGs, as `save_images` writes them, other files are left alone.

    Args:
        folder: theirs.
        channels: 1 grey, 3 RGB; the images' own if left out.

    Raises:
        UserError: no folder, no images, a broken one, or sizes that differ.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    files = _numbered(folder) or None
    images = FolderSet(folder, files=files, channels=channels, on_error="stop")
    return images.load(range(len(images)))[0]


def save_images(
    images: Tensor,
    folder: Path,
    *,
    indices: Sequence[int] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write one PNG an image, named by its index with six digits, and return the paths.

    Args:
        images: [N, C, H, W] in [-1, 1].
        folder: made if missing.
        indices: numbers of the images; 0..N-1 if left out.
        overwrite: replace numbered PNGs that the folder already holds, all of them.

    Raises:
        UserError: the folder already holds numbered PNGs and ``overwrite`` is not set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    old = _numbered(folder)
    if old and not overwrite:
        raise UserError(f"{folder} already holds {len(old)} numbered images; pass overwrite")
    for path in old:
        path.unlink()
    numbers = range(len(images)) if indices is None else indices
    paths = [folder / f"{number:06d}.png" for number in numbers]
    assert len(paths) == len(images)
    with ThreadPoolExecutor(16) as pool:  # the disk is waited for, not the processor
        list(pool.map(_write_png, paths, to_uint8(images)))
    return paths


def save_grid(
    images: Tensor,
    path: Path,
    *,
    columns: int | None = None,
    scale: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write one PNG of all images side by side with a gap of one pixel before scaling.

    Args:
        images: [N, C, H, W] in [-1, 1].
        path: of the PNG.
        columns: images a row; near the square root of N if left out.
        scale: side of the square that shows one pixel; small images are enlarged if left out.
        overwrite: replace an existing file.

    Raises:
        UserError: the file exists and ``overwrite`` is not set.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; pass overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = tiled(images, columns or math.ceil(math.sqrt(len(images))))
    scale = scale or max(1, 48 // max(images.shape[-2:]))
    _write_png(path, pixels.repeat(scale, axis=0).repeat(scale, axis=1))


def tiled(images: Tensor, columns: int) -> npt.NDArray[np.uint8]:
    """All images [N, C, H, W] in [-1, 1] side by side as bytes [H, W, C], white between them."""
    pixels = to_uint8(images)
    count, height, width, depth = pixels.shape
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, depth), 255, np.uint8)
    for place, tile in enumerate(pixels):
        row, column = divmod(place, columns)
        top, left = row * (height + 1) + 1, column * (width + 1) + 1
        sheet[top : top + height, left : left + width] = tile
    return sheet


def to_uint8(images: Tensor) -> npt.NDArray[np.uint8]:
    """Images [N, C, H, W] in [-1, 1] as rounded bytes [N, H, W, C]."""
    scaled = images.detach().float().add(1).mul(127.5).round_().clamp_(0, 255)
    return np.ascontiguousarray(scaled.to(torch.uint8).cpu().permute(0, 2, 3, 1).numpy())


def to_pil(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """Bytes [H, W, 1 or 3] as a Pillow image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _numbered(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if _NUMBERED.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.stem))


def _write_png(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
