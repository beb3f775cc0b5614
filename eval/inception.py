"""The Inception network of FID, as clean-fid builds it; no other network is called Inception here.

Its weights are a download of about 95 MB. They are checked against the published SHA-256 before
they are read, so a figure named FID can only come from the real network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from stepdistill.run.errors import UserError

Mode = Literal["clean", "legacy_pytorch"]


@dataclass(frozen=True)
class Weights:
    """Where one of clean-fid's networks is read from, and what must lie there."""

    path: Path
    url: str
    sha256: str


def weights(mode: Mode) -> Weights:
    """The file of a mode: ``clean`` is the TorchScript network, ``legacy_pytorch`` the port."""
    if mode == "clean":
        return Weights(
            Path("/tmp/inception-2015-12-05.pt"),  # clean-fid looks nowhere else
            "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
            "inception-2015-12-05.pt",
            "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        )
    name = "pt_inception-2015-12-05-6726825d.pth"
    return Weights(
        Path(torch.hub.get_dir()) / "checkpoints" / name,
        f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{name}",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    )


def build(mode: Mode, device: torch.device) -> tuple[Callable[[Tensor], Tensor], str]:
    """clean-fid's network for images [B, 3, 299, 299] in [0, 255], and its weights' SHA-256.

    Raises:
        UserError: clean-fid is not installed, or the weights are missing and cannot be had.
    """
    sha = fetch(mode)
    from cleanfid.features import build_feature_extractor

    return build_feature_extractor(mode, device, use_dataparallel=False), sha


def fetch(mode: Mode) -> str:
    """See that the right weights lie in their place, by a download if need be; their SHA-256."""
    if find_spec("cleanfid") is None or find_spec("torchvision") is None:
        raise UserError("FID needs clean-fid and torchvision: pip install 'stepdistill[eval]'")
    wanted = weights(mode)
    if not wanted.path.is_file():
        try:
            wanted.path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                wanted.url, str(wanted.path), hash_prefix=wanted.sha256, progress=False
            )
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"FID needs Inception's weights at {wanted.path}, and the download failed "
                f"({error}); put the file there from {wanted.url}, or use fd with features=digits"
            ) from error
    found = hashlib.sha256(wanted.path.read_bytes()).hexdigest()
    if found != wanted.sha256:
        raise UserError(
            f"{wanted.path} is not the Inception network of FID (its SHA-256 begins {found[:12]}, "
            f"not {wanted.sha256[:12]}); remove it and fetch {wanted.url}"
        )
    return found
