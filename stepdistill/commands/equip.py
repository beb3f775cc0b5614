"""What a teacher's own pipeline holds beside its network: embeddings of the prompts of a set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from stepdistill.data.images import DataConfig, open_data
from stepdistill.data.layout import read_layout
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.prompts import Prompts
from stepdistill.diffusion.saved import pipeline_folder, read_index, read_parts
from stepdistill.diffusion.text import encode_prompts
from stepdistill.run.assets import load_teacher, teacher_path
from stepdistill.run.errors import UserError
from stepdistill.run.files import write_bytes
from stepdistill.trainers.settings import TrainConfig

PROMPTS = "prompts.safetensors"  # of a run


def teacher_of(config: TrainConfig, device: torch.device | str = "cpu") -> Denoiser:
    """The frozen teacher of a config; one that reads text knows the captions of its data.

    Its text encoders read them on a device when a run begins; a run that goes on, or is exported,
    takes the embeddings that it has kept.

    Raises:
        UserError: it cannot be found or understood, there are no captions for it, or other ones
            than when the run began.
    """
    teacher = load_teacher(config.teacher)
    if not teacher.adapter.reads_text:
        if teacher.codec is not None:
            raise UserError(
                f"teacher={config.teacher}: a model of latents that reads no prompts, whose "
                "students cannot be exported yet; take one of pixels, or one that reads prompts"
            )
        return teacher
    refuse_pixels(config, teacher)
    captions, file = captions_of(config.data), config.run / PROMPTS
    try:
        if file.is_file():
            teacher.read(kept_prompts(file, captions, config))
        else:
            teacher.read(read_prompts(teacher, config.teacher, captions, device))
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"teacher={config.teacher}: its prompts cannot be read: {first}") from error
    return teacher


def kept_prompts(file: Path, captions: Sequence[str], config: TrainConfig) -> Prompts:
    """What a run has kept of its prompts.

    Raises:
        UserError: the data has other captions now.
    """
    prompts = Prompts.load(file)
    if prompts.captions != tuple(captions):
        raise UserError(
            f"data.source={config.data.source}: has other captions than when {config.run} began; "
            "set them back, or begin another run"
        )
    return prompts


def read_prompts(
    teacher: Denoiser, name: str, captions: Sequence[str], device: torch.device | str
) -> Prompts:
    """The embeddings by the text encoders of the teacher's own folder, which are then let go."""
    folder = pipeline_folder(teacher_path(name))
    _, key = read_index(folder / "model_index.json")
    vae = None if teacher.codec is None else teacher.codec.vae
    pipe = read_parts(folder, {key: teacher.net, "vae": vae})
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part not in (teacher.net, vae):
            part.to(device)
    return encode_prompts(pipe, captions, device=str(device))


def keep_prompts(teacher: Denoiser, run: Path) -> None:
    """Keep the embeddings of a run that begins in its folder."""
    if teacher.prompts is not None and not (run / PROMPTS).is_file():
        run.mkdir(parents=True, exist_ok=True)
        write_bytes(run / PROMPTS, teacher.prompts.dump())


def refuse_pixels(config: TrainConfig, teacher: Denoiser) -> None:
    """Refuse what is of pixels with a teacher of latents.

    Raises:
        UserError: a bound of pixels, or pictures beside the state.
    """
    if teacher.codec is not None and config.clip is not None:
        raise UserError(
            f"clip={config.clip:g}: bounds pixels, and the teacher's are latents, which have no "
            "such bound; set clip=null"
        )
    if teacher.codec is not None and config.pair_store and config.pair_store.invert:
        raise UserError(
            "pairs.invert: pairs of pictures are of pixels, and the teacher's are latents; set it "
            "to null"
        )
    if teacher.codec is not None and (teacher.beside or config.data.degrade is not None):
        raise UserError(
            f"teacher={config.teacher}: a model of latents that is fed a picture beside its state "
            "is not known here; take one that reads prompts alone, and data.degrade=null"
        )


def captions_of(data: DataConfig) -> tuple[str, ...]:
    """The captions of a set of pictures, or the lines of a file of prompts, each once.

    Raises:
        UserError: there are none.
    """
    if (lines := prompts_in(data.source)) is not None:
        return lines
    folder = Path(data.source).expanduser()  # whose pictures are opened when they are wanted
    captions = read_layout(folder).classes if folder.is_dir() else open_data(data).classes
    if not captions:
        raise UserError(
            f"data.source={data.source} has no captions, and the teacher reads prompts; give the "
            "folder a metadata.jsonl of file_name and text, or name a .txt file of prompts, one a "
            "line"
        )
    return captions


def prompts_in(source: str) -> tuple[str, ...] | None:
    """The prompts of a text file, each once; None where a source is none.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    if not source.endswith(".txt"):
        return None
    try:
        text = Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.source={source}: cannot be read: {error}") from error
    lines = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not lines:
        raise UserError(f"data.source={source}: holds no prompts; write one a line")
    return lines
