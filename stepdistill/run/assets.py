"""What ships inside the package, and how a teacher is named."""

from __future__ import annotations

from pathlib import Path

import torch

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run.errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TEACHERS = ("digits-dit", "digits-unet")


def teacher_path(name: str) -> str:
    """A shipped teacher's folder by its name; anything else is a folder or hub name already."""
    return str(ASSETS / name) if name in TEACHERS else name


def load_teacher(name: str, device: torch.device | str = "cpu") -> Denoiser:
    """The frozen teacher that a config names.

    Raises:
        UserError: it cannot be found or understood.
    """
    source = teacher_path(name)
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not Path(source).expanduser().is_dir():
        raise UserError(f"teacher={name}: no such folder; shipped are {', '.join(TEACHERS)}")
    try:
        return Denoiser.from_pipeline(Path(source).expanduser(), device=str(device))
    except (ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"teacher={name}: {first} (shipped teachers: {', '.join(TEACHERS)})"
        ) from error
