"""sample: images of any diffusers pipeline, as PNG files and a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stepdistill.commands.evaluate import load
from stepdistill.eval.generate import generate
from stepdistill.eval.images import load_images, save_grid, save_images
from stepdistill.run.errors import UserError

STEPS = 4  # of a pipeline that has no number of its own
NUM = 16


def sample(
    pipeline: str,
    out: Path,
    *,
    steps: int | None,
    num: int | None = None,
    images: Path | None = None,
    prompts: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 250,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    options: Mapping[str, object] | None = None,
) -> None:
    """Draw images into ``out``: 000000.png, ... and grid.png.

    Args:
        pipeline: a folder, or a hub name.
        out: folder to write.
        steps: as many as the pipeline says by itself, or 4, if left out.
        num: of the images; 16 if left out, or one of each small picture.
        images: a folder of small pictures, which the pipeline makes large.
        prompts: of a pipeline that reads them, taken in turn.
        seed: of the noise.
        batch_size: images a call.
        overwrite: replace images that are there.
        trust_remote_code: run the pipeline file that travels in the folder.
        options: further arguments of the call.

    Raises:
        UserError: bad input, or images that are there and are not to be replaced.
    """
    grid = out / "grid.png"
    if grid.exists() and not overwrite:
        raise UserError(f"{grid} exists; choose another folder or pass --overwrite")
    pipe = load(pipeline, trust_remote_code=trust_remote_code)
    small = None if images is None else small_pictures(pipe, images, num)
    count = len(small) if small is not None else num or NUM
    steps = steps or pipe.config.get("default_steps") or STEPS
    made = generate(
        pipe,
        count,
        seed=seed,
        steps=steps,
        prompts=prompts,
        batch_size=batch_size,
        options=options,
        images=small,
    )
    save_images(made, out, overwrite=overwrite)
    save_grid(made[:100], grid, columns=10, overwrite=overwrite)
    print(f"{out}: {count} images, {steps} steps, seed {seed}")


def small_pictures(pipe: Any, folder: Path, num: int | None) -> Tensor:
    """The first ``num`` pictures of a folder, or all, in [0, 1], in the channels of a pipeline.

    Raises:
        UserError: the pipeline makes no small pictures large, or the folder has fewer.
    """
    if pipe.config.get("degrade") is None:
        raise UserError(f"--images: {type(pipe).__name__} makes no small pictures large")
    found = load_images(folder, pipe.model.config.out_channels)
    if num is not None and num > len(found):
        raise UserError(f"--num {num}: {folder} has {len(found)} pictures")
    return found[:num] / 2 + 0.5
