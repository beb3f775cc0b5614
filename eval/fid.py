"""FID by clean-fid itself, from folders of images or saved statistics (Parmar 2022)."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepdistill.eval import inception
from stepdistill.run.errors import UserError


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] of features, in the precision of clean-fid or the file."""

    mu: npt.NDArray[np.floating]
    sigma: npt.NDArray[np.floating]

    @classmethod
    def read(cls, path: Path) -> Moments:
        """The arrays ``mu`` and ``sigma`` of an .npz file, which is never unpickled.

        Raises:
            UserError: unreadable, or without two arrays that belong together.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                mu, sigma = stored["mu"].astype(np.float64), stored["sigma"].astype(np.float64)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} holds no statistics mu and sigma: {error}") from error
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise UserError(f"{path}: mu {mu.shape} and sigma {sigma.shape} do not fit together")
        return cls(mu, sigma)


class CleanFid:
    """Frechet distances of folders, computed by clean-fid's own functions.

    Attributes:
        name: "fid" when the network is Inception, "fd" for any other.
        sha: SHA-256 of Inception's weights; None for another network.

    Args:
        mode: clean-fid's resizing and network: clean, or legacy_pytorch.
        device: where the network runs.
        batch_size: images a pass.
        extractor: another network, for images [B, 3, 299, 299] in [0, 255].

    Raises:
        UserError: Inception's weights are missing and cannot be had.
    """

    def __init__(
        self,
        mode: inception.Mode = "clean",
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
        extractor: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.mode, self.device, self.batch_size = mode, torch.device(device), batch_size
        self.sha: str | None = None
        self.name = "fd"
        if extractor is None:
            extractor, self.sha = inception.build(mode, self.device)
            self.name = "fid"
        self._extractor = extractor

    def moments(self, folder: Path) -> Moments:
        """Moments of all images in a folder.

        Raises:
            UserError: no such folder, or fewer than two images in it.
        """
        from cleanfid import fid

        if not folder.is_dir():
            raise UserError(f"no folder {folder}")
        if sum(path.suffix[1:] in fid.EXTENSIONS for path in folder.rglob("*")) < 2:
            raise UserError(f"{self.name} needs at least 2 images in {folder}")
        features = fid.get_folder_features(
            str(folder),
            self._extractor,
            num_workers=0,
            batch_size=self.batch_size,
            device=self.device,
            mode=self.mode,
            verbose=False,
        )
        return Moments(features.mean(axis=0), np.cov(features, rowvar=False))

    def distance(self, samples: Path, reference: Path | Moments) -> float:
        """Distance between a folder and a reference: a folder, an .npz file, or moments.

        Raises:
            UserError: as `moments` and `Moments.read`; or statistics of another network.
        """
        from cleanfid import fid

        if isinstance(reference, Path):
            is_file = reference.suffix == ".npz"
            reference = Moments.read(reference) if is_file else self.moments(reference)
        own = self.moments(samples)
        if own.mu.shape != reference.mu.shape:
            raise UserError(
                f"the reference statistics have {len(reference.mu)} values a feature, "
                f"this network {len(own.mu)}"
            )
        try:
            value = fid.frechet_distance(own.mu, own.sigma, reference.mu, reference.sigma)
        except ValueError as error:
            raise UserError(f"clean-fid fails ({error}); take more images") from error
        return float(value)
