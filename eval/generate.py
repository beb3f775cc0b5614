"""Samples that depend on the seed and their index only, drawn from any diffusers pipeline."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.diffusion.saved import absent, quiet
from stepdistill.run.errors import UserError
from stepdistill.run.rng import mix

TOLD = "told"  # by number of steps, what a stock pipeline is told beside it, in walks.json
_WORD = (1 << 32) - 1
_OWN = frozenset(  # what `generate` gives itself
    "self num_inference_steps output_type generator batch_size num_images prompt class_labels"
    " return_dict image".split()
)


def generate(
    pipeline: Any,
    indices: int | Sequence[int],
    *,
    seed: int,
    steps: int,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    batch_size: int = 250,
    options: Mapping[str, object] | None = None,
    images: Tensor | None = None,
) -> Tensor:
    """Draw samples [N, C, H, W] fp32 in [-1, 1], on the CPU.

    Every sample has a generator of its own on the CPU, so neither the batch size, nor the number
    of processes that share the indices, nor the device decides what noise it gets.

    Args:
        pipeline: a loaded diffusers pipeline; what its ``__call__`` accepts decides what is passed.
        indices: which samples; a number N means 0..N-1.
        seed: of the whole set.
        steps: number of inference steps.
        labels: class of each sample; if left out its index modulo theirs, none beside images.
        prompts: for a text pipeline, taken in turn by index.
        batch_size: samples a call.
        options: further arguments of the call, such as guidance_scale.
        images: of each sample, the small picture [N, C, h, w] in [0, 1] that is made large.

    Raises:
        UserError: arguments that the pipeline does not take or refuses.
    """
    wanted = list(range(indices) if isinstance(indices, int) else indices)
    accepted = inspect.signature(type(pipeline).__call__).parameters
    name = type(pipeline).__name__
    _refuse(name, accepted, options or {}, prompts, images)
    free = images is None or labels is not None  # a picture's class is not its place
    chosen = _labels(pipeline, accepted, wanted, labels) if free else None
    pipeline.set_progress_bar_config(disable=True)
    more, parts = _told(pipeline, accepted, steps) | dict(options or {}), []
    for start in range(0, len(wanted), batch_size):
        part = wanted[start : start + batch_size]
        call: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pt"}
        call["generator"] = [_generator(seed, index) for index in part]
        call |= {key: len(part) for key in ("batch_size", "num_images") if key in accepted}
        if prompts:
            call["prompt"] = [prompts[index % len(prompts)] for index in part]
        for key, rows in (("image", images), ("class_labels", chosen)):
            call |= {} if rows is None else {key: rows[start : start + batch_size]}
        try:
            with _handed_on(pipeline, call["generator"]):
                made = pipeline(**call, **more)
        except ValueError as error:
            raise UserError(f"{name} refuses the call (steps={steps}): {error}") from error
        if not hasattr(made, "images"):
            raise UserError(f"{name} makes no images, but {', '.join(made)}")
        parts.append(_as_tensor(made.images) * 2 - 1)
    return torch.cat(parts)


def _refuse(
    name: str,
    accepted: Mapping[str, inspect.Parameter],
    options: Mapping[str, object],
    prompts: Sequence[str] | None,
    images: Tensor | None,
) -> None:
    """Refuse what a pipeline does not take, and the lack of what it needs."""
    for option in options:
        if option not in accepted or option in _OWN:
            raise UserError(f"{name}: {option} cannot be set; it takes {', '.join(accepted)}")
    for key, what, there in (("prompt", "prompts", prompts), ("image", "small pictures", images)):
        given = there is not None and len(there) > 0
        if given and key not in accepted:
            raise UserError(f"{name} takes no {what}")
        if not given and key in accepted and accepted[key].default is inspect.Parameter.empty:
            raise UserError(f"{name} needs {what}")
    if "prompt" in accepted and not prompts:
        raise UserError(f"{name} needs prompts")


def _told(pipeline: Any, accepted: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What a few-step student of prompts is called with besides: no guidance, and its levels.

    Raises:
        UserError: a number of steps whose levels are not known.
    """
    walks: dict[str, dict[str, Any]] = getattr(pipeline, TOLD, {})
    if walks and str(steps) not in walks:
        raise UserError(f"steps={steps}: this student samples in {', '.join(walks)} steps")
    scheduler = getattr(pipeline, "scheduler", None)
    few = bool(walks) or (scheduler is not None and scheduler.config.get("grids") is not None)
    alone = {"guidance_scale": 1.0} if few and {"prompt", "guidance_scale"} <= {*accepted} else {}
    return alone | walks.get(str(steps), {})


@contextmanager
def _handed_on(pipeline: Any, generators: list[torch.Generator]) -> Iterator[None]:
    """A pipeline's scheduler draws from the samples' generators, where its class gives it none."""
    scheduler: Any = getattr(pipeline, "scheduler", None)
    step = getattr(scheduler, "step", None)
    if (
        step is None
        or "generator" not in inspect.signature(step).parameters
        or "prompt" not in inspect.signature(type(pipeline).__call__).parameters
    ):
        yield
        return
    scheduler.step = lambda *args, **keys: step(*args, **({"generator": generators} | keys))
    try:
        yield
    finally:
        del scheduler.step


def load_pipeline(
    path: str | Path,
    *,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
) -> Any:
    """Load a diffusers pipeline from a local folder, or a stock one by its Hub name.

    Args:
        path: folder with model_index.json, or a Hub name.
        trust_remote_code: run the pipeline file that lies in the folder; local folders only.
        device: where it runs.

    Raises:
        UserError: no pipeline there, one that needs trust, or a Hub name with trust.
    """
    folder = Path(path)
    if not folder.is_dir() and trust_remote_code:
        raise UserError(f"{path} is no local folder; code is run from local folders only")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"{path} has no model_index.json, so it is no diffusers pipeline")
    try:
        with quiet():
            pipeline = DiffusionPipeline.from_pretrained(
                str(path),
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                **(absent(folder) if folder.is_dir() else {}),
            )
    except (OSError, ValueError, AttributeError, ImportError, KeyError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{path} brings its own pipeline file; read it, then pass "
                "--trust-remote-code (trust_remote_code=True)"
            ) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        where = "" if folder.is_dir() else ", which is no folder here"
        raise UserError(f"cannot load the pipeline {path}{where}: {reason}") from error
    if (walks := folder / "walks.json").is_file():
        setattr(pipeline, TOLD, json.loads(walks.read_text(encoding="utf-8")))
    return pipeline.to(device)


def class_count(pipeline: Any) -> int | None:
    """Number of classes of a pipeline; None if it is unconditional.

    Known from the pipeline's ``classes``, else from the rows of the network's label table, less
    one if the last row is the pipeline's ``null_label``.
    """
    config = pipeline.config
    if config.get("classes"):
        return len(config["classes"])
    for part in pipeline.components.values():
        settings = getattr(part, "config", None)
        if not isinstance(settings, Mapping):
            continue
        rows = settings.get("num_embeds_ada_norm") or settings.get("num_class_embeds")
        if rows:
            return int(rows) - int(config.get("null_label") == rows - 1)
    return None


def _labels(
    pipeline: Any, accepted: Mapping[str, object], wanted: list[int], labels: Sequence[int] | None
) -> list[int] | None:
    classes = class_count(pipeline) if "class_labels" in accepted else None
    if classes is None:
        if labels is not None:
            raise UserError(f"{type(pipeline).__name__} is unconditional and takes no labels")
        return None
    if labels is None:
        return [index % classes for index in wanted]
    if len(labels) != len(wanted):
        raise UserError(f"{len(labels)} labels for {len(wanted)} samples")
    return [int(label) for label in labels]


def _generator(seed: int, index: int) -> torch.Generator:
    """A generator for one sample.

    torch's CPU generator keeps the low 32 bits of a seed only, so the hash is a bijection of the
    index on 32 bits: within a seed no two of the first 2^32 samples share their noise.
    """
    word = _mix32(_mix32(index & _WORD) ^ (mix(seed + 1) & _WORD))
    return torch.Generator().manual_seed(word)


def _mix32(word: int) -> int:
    """A bijection on 32 bits: multiply-xorshift rounds with odd factors."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = ((word ^ (word >> shift)) * factor) & _WORD
    return word ^ (word >> 16)


def _as_tensor(images: Any) -> Tensor:
    """Whatever a pipeline calls images, [B, C, H, W] fp32 in [0, 1] on the CPU."""
    if isinstance(images, Tensor):
        return images.detach().float().cpu()
    if isinstance(images, list):
        images = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255
    array = images[..., None] if images.ndim == 3 else images
    return torch.from_numpy(np.ascontiguousarray(array)).permute(0, 3, 1, 2).float()
