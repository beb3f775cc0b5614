"""sample: images of any diffusers pipeline, as PNG files and a grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stepdistill.commands.evaluate import load
from stepdistill.eval.generate import generate
from stepdistill.eval.images import save_grid, save_images
from stepdistill.run.errors import UserError


def sample(
    pipeline: str,
    out: Path,
    *,
    steps: int,
    num: int,
    seed: int = 0,
    batch_size: int = 250,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    options: Mapping[str, object] | None = None,
) -> None:
    """Draw ``num`` images into ``out``: 000000.png, ... and grid.png.

    Raises:
        UserError: bad input, or images that are there and are not to be replaced.
    """
    grid = out / "grid.png"
    if grid.exists() and not overwrite:
        raise UserError(f"{grid} exists; choose another folder or pass --overwrite")
    pipe = load(pipeline, trust_remote_code=trust_remote_code)
    images = generate(pipe, num, seed=seed, steps=steps, batch_size=batch_size, options=options)
    save_images(images, out, overwrite=overwrite)
    save_grid(images[:100], grid, columns=10, overwrite=overwrite)
    print(f"{out}: {num} images, {steps} steps, seed {seed}")
