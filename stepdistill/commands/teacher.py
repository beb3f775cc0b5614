"""teacher: train a many-step model from scratch and save it as a pipeline folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from stepdistill.commands.read import read_config
from stepdistill.commands.train import fit
from stepdistill.data.images import open_data
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.pipelines.card import model_card
from stepdistill.pipelines.folder import write_pipeline
from stepdistill.run.errors import UserError
from stepdistill.run.ranks import main_process
from stepdistill.trainers.flow.denoising import DenoisingConfig, fresh_network, load_student

STEPS = 32


def teacher(name: str, overrides: Sequence[str] = ()) -> Path:
    """Train by flow matching or a VP schedule; returns RUN/pipeline, which diffusers loads.

    Raises:
        UserError: bad input, or a config of another method.
    """
    cls, config = read_config(name, overrides)
    if not isinstance(config, DenoisingConfig):
        raise UserError(f"{name}: a teacher's method is denoising, not {config.method}")
    images = open_data(config.data)
    run = fit(cls, config, fresh_network(config, images.classes))
    if not main_process():
        return run / "pipeline"
    den = load_student(config, run / "student", images.classes)
    command = " ".join(["stepdistill teacher", name, *overrides])
    return save_teacher(den, config, run / "pipeline", command)


def save_teacher(den: Denoiser, config: DenoisingConfig, out: Path, command: str) -> Path:
    """Write a teacher's fp16 pipeline folder with its stock scheduler."""
    card = model_card(
        title=f"Teacher on {config.data.source}: {config.network.type}, {config.head}",
        folder=str(out),
        teacher="none",
        method=config.method,
        data=config.data.source,
        command=command,
        default_steps=STEPS,
        classes=den.classes or None,
        degrade=config.upscaling.get("degrade"),
    )
    return write_pipeline(
        out,
        [den.net],
        stock_scheduler(config.head),
        classes=den.classes or None,
        null_label=den.null_label,
        default_steps=STEPS,
        card=card,
        dtype=torch.float16,
        overwrite=True,
        settings=config.upscaling,
    )


def stock_scheduler(head: str) -> object:
    """The diffusers scheduler that samples what ``denoising`` trains."""
    import diffusers

    if head == "velocity":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    if head == "edm-f":
        return diffusers.EDMEulerScheduler()
    kinds = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
    return diffusers.DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type=kinds[head],
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
