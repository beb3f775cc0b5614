"""What ships inside the package, and how a teacher is named."""

from __future__ import annotations

from pathlib import Path

import torch

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run.errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TEACHERS = ("digits-dit", "digits-unet")


def teacher_path(name: str) -> str:
    """Where a pipeline lies: a shipped teacher's folder, a folder that is there, or a hub name.

    Raises:
        UserError: none of these.
    """
    if name in TEACHERS:
        return str(ASSETS / name)
    source = Path(name).expanduser()
    if source.is_dir():
        return str(source)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"{name}: no such folder; give a pipeline's folder, a hub name (owner/name), or one "
            f"of the shipped teachers {', '.join(TEACHERS)}"
        )
    return name


def load_teacher(
    name: str, device: torch.device | str = "cpu", *, key: str = "teacher"
) -> Denoiser:
    """The frozen teacher that a config names by ``key``.

    Raises:
        UserError: it cannot be found or understood.
    """
    try:
        return Denoiser.from_pipeline(teacher_path(name), device=str(device))
    except UserError as error:
        raise UserError(f"{key}={error}") from error
    except (ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{key}={name}: {first} (shipped teachers: {', '.join(TEACHERS)})"
        ) from error
