"""sample: images of any diffusers pipeline, as PNG files and a grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stepdistill.commands.evaluate import load
from stepdistill.eval.generate import generate
from stepdistill.eval.images import save_grid, save_images
from stepdistill.run.errors import UserError

STEPS = 4  # of a pipeline that has no number of its own


def sample(
    pipeline: str,
    out: Path,
    *,
    steps: int | None,
    num: int,
    seed: int = 0,
    batch_size: int = 250,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    options: Mapping[str, object] | None = None,
) -> None:
    """Draw ``num`` images into ``out``: 000000.png, ... and grid.png.

    Without ``steps`` in as many as the pipeline says by itself, or in 4.

    Raises:
        UserError: bad input, or images that are there and are not to be replaced.
    """
    grid = out / "grid.png"
    if grid.exists() and not overwrite:
        raise UserError(f"{grid} exists; choose another folder or pass --overwrite")
    pipe = load(pipeline, trust_remote_code=trust_remote_code)
    steps = steps or pipe.config.get("default_steps") or STEPS
    images = generate(pipe, num, seed=seed, steps=steps, batch_size=batch_size, options=options)
    save_images(images, out, overwrite=overwrite)
    save_grid(images[:100], grid, columns=10, overwrite=overwrite)
    print(f"{out}: {num} images, {steps} steps, seed {seed}")
