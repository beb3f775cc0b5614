"""Any folder of images, decoded by Pillow, cropped to a square and resized.

A broken image is named in the log, counted in `FolderSet.skipped` and never used, or stops the run
with ``data.on_error=stop``. Headers and endings are checked when the folder is opened; damage that
only decoding shows is met at first use, where the next whole image in the set stands in.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from stepdistill.data.layout import Layout, read_layout
from stepdistill.data.sets import ImageSet
from stepdistill.run.errors import UserError

_log = logging.getLogger(__name__)
_ENDINGS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
_GREY = frozenset({"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N"})
# What Pillow raises on bytes that are not a whole image of a known kind.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Skipped:
    """A broken image and what is wrong with it."""

    path: Path
    reason: str


@dataclass(frozen=True)
class _Header:
    size: tuple[int, int]  # width, height as shown
    grey: bool


class FolderSet(ImageSet):
    """The whole images of a folder, in the order of their paths.

    Args:
        folder: class folders, loose images, or images with metadata.jsonl / metadata.csv.
        files: use these, without labels, instead of what the folder holds.
        size: side of the square to crop and resize to; None keeps the images' own common size.
        channels: 1 grey, 3 RGB, None: grey where every image is grey. Transparent shows as white.
        on_error: skip a broken image, or stop with a UserError that names it.
        workers: threads that check headers.

    Raises:
        UserError: no whole image, sizes that differ while ``size`` is None, bad metadata.
    """

    def __init__(
        self,
        folder: Path,
        *,
        files: Sequence[Path] | None = None,
        size: int | None = None,
        channels: Literal[1, 3] | None = None,
        on_error: Literal["skip", "stop"] = "skip",
        workers: int = 2,
    ) -> None:
        layout = Layout.unlabelled(files) if files else read_layout(folder)
        self.name, self.classes = folder.name, layout.classes
        self._stop, self._lock = on_error == "stop", Lock()
        self._skipped: dict[Path, Skipped] = {}
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            headers = list(pool.map(_check, layout.files))
        whole: list[_Header] = []
        self._files: list[Path] = []
        labels: list[int] = []
        for path, label, header in zip(layout.files, layout.labels, headers, strict=True):
            if isinstance(header, str):
                self._skip(path, header)
                continue
            whole.append(header)
            self._files.append(path)
            labels.append(label)
        if not whole:
            first = next(iter(self._skipped.values()))
            raise UserError(
                f"no whole image in {folder}: all {len(self._skipped)} are broken, "
                f"the first {first.path} ({first.reason})"
            )
        self._labels = torch.tensor(labels, dtype=torch.int64)
        self._size = (size, size) if size else _common_size(folder, whole)
        depth = channels or (1 if all(header.grey for header in whole) else 3)
        self.shape = (depth, self._size[1], self._size[0])
        if self._skipped:
            _log.warning("%s: %d of %d images skipped", folder, len(self._skipped), len(headers))

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The broken images met so far, each once."""
        with self._lock:
            return tuple(self._skipped.values())

    def __len__(self) -> int:
        return len(self._files)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [n, C, H, W] in [-1, 1] and labels [n]; see the module for broken ones.

        Raises:
            UserError: a broken image with ``on_error="stop"``, or no whole one left.
        """
        pairs = [self._one(int(index)) for index in indices]
        pixels = np.stack([image for image, _ in pairs])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        return images.contiguous(), self._labels[[place for _, place in pairs]]

    def _one(self, index: int) -> tuple[npt.NDArray[np.uint8], int]:
        """The image at ``index``, or the next that decodes: the same stand-in on every run."""
        for offset in range(len(self._files)):
            place = (index + offset) % len(self._files)
            path = self._files[place]
            if path in self._skipped:
                continue
            try:
                return _decode(path, self._size, self.shape[0]), place
            except _BROKEN as error:
                self._skip(path, _reason(error))
        raise UserError(f"{self.name}: every image turned out broken; see the log for each")

    def _skip(self, path: Path, reason: str) -> None:
        if self._stop:
            raise UserError(
                f"{path} is broken ({reason}); mend or remove it, or set data.on_error=skip"
            )
        with self._lock:
            if path not in self._skipped:
                self._skipped[path] = Skipped(path, reason)
                _log.warning("skipped %s: %s", path, reason)


def _common_size(folder: Path, headers: Sequence[_Header]) -> tuple[int, int]:
    sizes = Counter(header.size for header in headers)
    if len(sizes) > 1:
        (first, _), (second, _) = sizes.most_common(2)
        raise UserError(
            f"images in {folder} differ in size ({first[0]}x{first[1]}, {second[0]}x{second[1]}"
            f"{', ...' if len(sizes) > 2 else ''}); set data.size to crop and resize them"
        )
    return next(iter(sizes))


def _check(path: Path) -> _Header | str:
    """An image's header, or what is wrong with the file."""
    try:
        if path.stat().st_size == 0:
            return "empty file"
        with Image.open(path) as image:
            width, height = image.size
            limit = Image.MAX_IMAGE_PIXELS
            if limit and width * height > limit:
                return f"{width}x{height} is more than {limit} pixels; shrink it"
            if image.mode == "F":
                return "floating-point pixels; save it with 8 or 16 bits"
            if not _ends_well(path, image.format):
                image.load()
            exif = image.getexif() if "exif" in image.info else {}  # would decode a PNG without
            turned = exif.get(0x0112, 1) in (5, 6, 7, 8)  # orientation
            grey = image.mode in _GREY
            return _Header((height, width) if turned else (width, height), grey)
    except _BROKEN as error:
        return _reason(error)


def _ends_well(path: Path, kind: str | None) -> bool:
    """Whether the last bytes close the image, for the kinds that have such bytes."""
    ending = _ENDINGS.get(kind or "", b"")
    with path.open("rb") as file:
        file.seek(-len(ending), 2)
        return file.read() == ending


def _decode(path: Path, size: tuple[int, int], channels: int) -> npt.NDArray[np.uint8]:
    """Pixels [H, W, C] uint8: upright, on white, the middle square, bicubic with antialiasing."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(_eight_bits(opened))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size[1], size[0], channels)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey brought to 8 bits; every other kind as it is."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64) / 257
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return "not an image" if "cannot identify image file" in text else text
