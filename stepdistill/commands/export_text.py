"""export, of a student that reads prompts: the teacher's own pipeline class, with fewer steps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.adapters import scalars
from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.sampler import sample
from stepdistill.diffusion.saved import pipeline_folder, read_index
from stepdistill.diffusion.timesteps import Grid
from stepdistill.pipelines.stock_folder import write_stock
from stepdistill.pipelines.verify import VerificationError, noise_from_seeds, verify_folder
from stepdistill.run.assets import teacher_path
from stepdistill.run.errors import UserError
from stepdistill.trainers.base import Trainer

SEEDS = tuple(range(4))
Told = Mapping[int, Mapping[str, Any]]


def export_text(
    trainer: Trainer,
    scheduler: Any,
    walks: Told,
    out: Path,
    *,
    card: str,
    overwrite: bool,
    tolerance: float,
) -> float:
    """Write the folder, draw a few prompts' pictures in plain diffusers, and compare.

    Args:
        trainer: of the finished run.
        scheduler: the student's.
        walks: what a call is told beside each number of steps, where the scheduler must be told.
        out: the folder to write.
        card: text of README.md.
        overwrite: replace a pipeline folder that is there.
        tolerance: largest difference allowed to the training sampler's pictures in [0, 1].

    Returns:
        The largest difference seen.

    Raises:
        UserError: a student that a stock pipeline cannot hold, or ``out`` is taken.
        VerificationError: the folder draws other pictures; it is not written.
    """
    den, seen = only_network(trainer), list[float]()
    source = pipeline_folder(teacher_path(trainer.config.teacher))
    index, key = read_index(source / "model_index.json")

    def check(folder: Path) -> None:
        prompts = [den.classes[place % len(den.classes)] for place in range(len(SEEDS))]
        pictures = expected(trainer, den, index["_class_name"])
        call = {"prompt": prompts, "guidance_scale": scale_of(den)}
        with kept_from(out):
            found = verify_folder(folder, pictures, None, SEEDS, tolerance, call=call, walks=walks)
        seen.append(found)

    write_stock(
        out,
        source,
        key,
        den.plain(),
        scheduler,
        card=card,
        walks=walks,
        overwrite=overwrite,
        check=check,
    )
    return seen[0]


def only_network(trainer: Trainer) -> Denoiser:
    """The student, where a stock pipeline holds such a one.

    Raises:
        UserError: several networks, or one that is told further numbers.
    """
    den = trainer.best()
    if type(den) is not Denoiser:
        raise UserError(
            f"{trainer.config.method}: a stock pipeline holds one network of a kind, and this "
            "student has several"
        )
    if scalars.held(den.net) is not None:
        names = ", ".join(den.adapter.numbers(den.net))
        raise UserError(
            f"{trainer.config.method}: a stock pipeline tells a network its time alone, and this "
            f"student is told further numbers ({names})"
        )
    return den


def scale_of(den: Denoiser) -> float:
    """The guidance that the student's pipeline is called with: off, or the scale it is told."""
    return den.scale if den.adapter.embeds_guidance(den.net) else 1.0


@torch.no_grad()
def expected(trainer: Trainer, den: Denoiser, pipeline: str) -> dict[int, Tensor]:
    """The training sampler's pictures [B, C, H, W] in each number of steps, on the pipeline's own
    noise: further noise is of the samples' generators if its class hands them on."""
    assert den.codec is not None
    shape, found = trainer.teacher.sample_shape, {}
    cond = Cond(torch.arange(len(SEEDS)) % len(den.classes))
    for steps, grid in trainer.grids().items():
        draws = noise_from_seeds(SEEDS, shape, steps)
        if not hands_on(pipeline):
            generator = torch.Generator().manual_seed(SEEDS[0])
            more = [torch.randn(draws[0].shape, generator=generator) for _ in draws[1:]]
            draws = [draws[0], *more]
        found[steps] = den.codec.decode(walked(trainer, grid, cond, draws))
    return found


def walked(trainer: Trainer, grid: Grid, cond: Cond, draws: Sequence[Tensor]) -> Tensor:
    """What the training sampler makes of given noise: the first, and one for each further step."""
    return sample(
        trainer.best(),
        draws[0],
        grid,
        cond,
        noise=trainer.noise,
        fresh=draws.__getitem__,
        clip=trainer.config.clip,
    )


@contextmanager
def kept_from(out: Path) -> Iterator[None]:
    """What refuses a folder says that it was not written to ``out``."""
    try:
        yield
    except VerificationError as error:
        raise VerificationError(f"{out} was not written: {error}") from error


def hands_on(pipeline: str) -> bool:
    """Whether a pipeline's class gives its scheduler the samples' generators."""
    import diffusers

    return hasattr(getattr(diffusers, pipeline), "prepare_extra_step_kwargs")


def usage(
    folder: str,
    den: Denoiser,
    steps: int,
    told: Mapping[str, Any],
    *,
    own: bool,
    lacks: Iterable[str],
) -> str:
    """How a user calls the pipeline, as Python for the card.

    Args:
        folder: of the pipeline.
        den: the student.
        steps: of the call.
        told: what it is told besides.
        own: whether the folder carries a scheduler class of its own.
        lacks: parts that the pipeline is saved without and must be told so of.
    """
    trusted = ", trust_remote_code=True" if own else ""
    trusted += "".join(f", {name}=None" for name in lacks)
    more = "".join(f", {name}={value}" for name, value in told.items())
    prompt = json.dumps(den.classes[0], ensure_ascii=False)
    return (
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({json.dumps(folder)}{trusted})\n"
        f"images = pipe({prompt}, num_inference_steps={steps}, guidance_scale={scale_of(den):g}"
        f"{more}).images\n"
        'images[0].save("image.png")\n'
    )
