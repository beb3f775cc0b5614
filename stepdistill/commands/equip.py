"""What a teacher's own pipeline holds beside its network: embeddings of the prompts of a set."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from stepdistill.data.images import DataConfig, open_data
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.saved import pipeline_folder, read_index, read_parts
from stepdistill.diffusion.text import encode_prompts
from stepdistill.run.assets import load_teacher, teacher_path
from stepdistill.run.errors import UserError
from stepdistill.trainers.settings import TrainConfig


def teacher_of(config: TrainConfig, device: torch.device | str = "cpu") -> Denoiser:
    """The frozen teacher of a config; one that reads text knows the captions of its data, which
    its text encoders have read on a device.

    Raises:
        UserError: it cannot be found or understood, or there are no captions for it.
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
    captions, folder = captions_of(config.data), pipeline_folder(teacher_path(config.teacher))
    try:
        _, key = read_index(folder / "model_index.json")
        vae = None if teacher.codec is None else teacher.codec.vae
        pipe = read_parts(folder, {key: teacher.net, "vae": vae})
        own = (teacher.net, vae)
        for part in pipe.components.values():
            if isinstance(part, nn.Module) and part not in own:
                part.to(device)
        teacher.read(encode_prompts(pipe, captions, device=str(device)))
    except ValueError as error:
        raise UserError(f"teacher={config.teacher}: {error}") from error
    return teacher


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
    captions = open_data(data).classes
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
