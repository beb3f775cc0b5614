"""Feature spaces for distances between sets of images, each with a name and its weights' hash.

``digits`` and ``fashion-mnist``: the hidden layers of the shipped classifiers of such images, of
8x8 and 28x28 pixels. ``pixels``: the pixels themselves. ``inception``: clean-fid's network; only
its figures may be called FID or KID without naming the space.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from stepdistill.eval import inception
from stepdistill.eval.classifier import FEATURES, RECIPES, shipped
from stepdistill.eval.images import to_uint8
from stepdistill.run.errors import UserError

NAMES = (*RECIPES, "pixels", "inception", "inception-legacy")


class FeatureExtractor(nn.Module, ABC):
    """Images [B, C, H, W] in [-1, 1] to features [B, D] fp32.

    Attributes:
        name: of the feature space.
        dim: D.
        sha: SHA-256 of the weights.
        device: where images are taken to.
    """

    name: str
    dim: int
    sha: str
    device: torch.device

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features [B, D] fp32 of images [B, C, H, W] in [-1, 1]."""


class ClassifierFeatures(FeatureExtractor):
    """The 64 hidden values of a shipped classifier of small grey images."""

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__()
        self.name, self.dim, self.device = name, FEATURES, device
        self.net = shipped(name).to(device)
        self.shape = RECIPES[name].shape
        self.sha = weights_sha(self.net)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, 64] of images [B, 1, side, side].

        Raises:
            UserError: images of another shape.
        """
        if tuple(images.shape[1:]) != self.shape:
            sees, found = ("x".join(map(str, one)) for one in (self.shape, images.shape[1:]))
            raise UserError(
                f"features={self.name} sees {sees} images, not {found}; use inception or pixels"
            )
        return self.net.features(images.float())


class PixelFeatures(FeatureExtractor):
    """The pixels themselves, for images of one shape (C, H, W)."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        super().__init__()
        self.name, self.device = "pixels", device
        self.dim = shape[0] * shape[1] * shape[2]
        self.sha = weights_sha(self)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, C H W]."""
        return images.flatten(1).float()


class InceptionFeatures(FeatureExtractor):
    """clean-fid's Inception, 2,048 values, fed as clean-fid feeds it: bytes resized to 299x299."""

    def __init__(self, mode: inception.Mode, device: torch.device) -> None:
        super().__init__()
        self.name = "inception" if mode == "clean" else "inception-legacy"
        self.dim, self.device = 2048, device
        self._network, self.sha = inception.build(mode, device)
        from cleanfid.resize import build_resizer

        self._resize = build_resizer(mode)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, 2048] of images with 1 or 3 channels."""
        pixels = to_uint8(images)
        if pixels.shape[-1] == 1:
            pixels = pixels.repeat(3, axis=-1)
        resized = np.stack([self._resize(image) for image in pixels])
        fed = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device)
        return self._network(fed).float()


def load_features(
    name: str,
    device: torch.device | str = "cpu",
    *,
    shape: tuple[int, int, int] | None = None,
) -> FeatureExtractor:
    """A feature space by its name.

    Args:
        name: digits, fashion-mnist, pixels, inception, or inception-legacy (pytorch-fid's port
            and resizing).
        device: where it runs.
        shape: (C, H, W) of the images, which only pixels needs.

    Raises:
        UserError: unknown name, or weights that are missing.
    """
    device = torch.device(device)
    if name in RECIPES:
        return ClassifierFeatures(name, device)
    if name == "inception":
        return InceptionFeatures("clean", device)
    if name == "inception-legacy":
        return InceptionFeatures("legacy_pytorch", device)
    if name == "pixels":
        if shape is None:
            raise UserError("features=pixels needs the shape of the images")
        return PixelFeatures(shape, device)
    raise UserError(f"unknown features {name}; known: {', '.join(NAMES)}")


@torch.no_grad()
def extract(extractor: FeatureExtractor, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Features [N, D] fp32, on the CPU, of images [N, C, H, W] taken in batches."""
    parts = images.split(batch_size)
    return torch.cat([extractor(part.to(extractor.device)).cpu() for part in parts])


def weights_sha(module: nn.Module) -> str:
    """SHA-256 over a module's tensors: names, shapes and values in fp32, in order of name."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
