"""A pipeline's own text encoders, asked by its own ``encode_prompt``: embeddings of prompts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.prompts import EMBEDDED, Prompts

GIVEN: Mapping[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("text", "-text"),
    "StableDiffusionXLPipeline": ("text", "-text", "pooled", "-pooled"),
    "StableDiffusion3Pipeline": ("text", "-text", "pooled", "-pooled"),
    "PixArtAlphaPipeline": ("text", "mask", "-text", "-mask"),
    "PixArtSigmaPipeline": ("text", "mask", "-text", "-mask"),
    "SanaPipeline": ("text", "mask", "-text", "-mask"),
    "AuraFlowPipeline": ("text", "mask", "-text", "-mask"),
    "Lumina2Pipeline": ("text", "mask", "-text", "-mask"),
    "LTXPipeline": ("text", "mask", "-text", "-mask"),
    "WanPipeline": ("text", "-text"),
    "CogVideoXPipeline": ("text", "-text"),
    "FluxPipeline": ("text", "pooled", ""),
    "Flux2Pipeline": ("text", ""),
    "QwenImagePipeline": ("text", "mask"),
    "HunyuanVideoPipeline": ("text", "pooled", "mask"),
    "ZImagePipeline": ("text", "-text"),
    "HiDreamImagePipeline": ("text", "-text", "second", "-second", "pooled", "-pooled"),
}
"""What ``encode_prompt`` gives, in its order, by a pipeline's class; "-": that of no prompt."""


@torch.no_grad()
def encode_prompts(
    pipe: Any, captions: Sequence[str], *, batch_size: int = 32, device: str = "cpu"
) -> Prompts:
    """Embeddings of prompts, and of none as the pipeline takes it for guidance.

    Args:
        pipe: a diffusers pipeline with its text encoders; its network may be None.
        captions: the prompts.
        batch_size: prompts encoded at once.
        device: where the encoders lie.

    Raises:
        ValueError: a pipeline whose embeddings are not known here.
    """
    name = type(pipe).__name__
    if name not in GIVEN:
        raise ValueError(
            f"what {name} makes of a prompt is not known here; known are {', '.join(sorted(GIVEN))}"
        )
    parts = [
        _rows(pipe, list(captions[start : start + batch_size]), device)
        for start in range(0, len(captions), batch_size)
    ]
    rows = joined([*parts, _none(pipe, device)])
    return Prompts(captions, replace(rows, sizes=_sizes(pipe, len(captions) + 1)))


def _rows(pipe: Any, texts: list[str], device: str, sign: str = "") -> Cond:
    """Embeddings of some prompts, or with "-" those for their guidance."""
    takes = inspect.signature(pipe.encode_prompt).parameters
    keys: dict[str, Any] = {"prompt": texts, "device": device}
    keys |= {k: 1 for k in ("num_images_per_prompt", "num_videos_per_prompt") if k in takes}
    for other in ("prompt_2", "prompt_3", "prompt_4"):
        keys |= {other: texts} if other in takes else {}
    for k, own in inspect.signature(type(pipe).__call__).parameters.items():
        if k in takes and k not in keys and own.default not in (None, inspect.Parameter.empty):
            keys[k] = own.default  # as a user's call has it
    if "do_classifier_free_guidance" in takes:
        keys["do_classifier_free_guidance"] = bool(sign)
    made = pipe.encode_prompt(**keys)
    made = made if isinstance(made, tuple) else (made,)
    named = dict(zip(GIVEN[type(pipe).__name__], made, strict=True))
    found = {part: named.get(sign + part) for part in EMBEDDED}
    if isinstance(found["text"], list):  # a tensor a prompt, as long as it is
        found["text"], found["mask"] = _filled(found["text"])
    if (second := found["second"]) is not None:  # HiDream's, whose layers come first
        found["second"] = second.movedim(0, 1)
    return Cond(**{part: None if v is None else v.cpu() for part, v in found.items()})


def _sizes(pipe: Any, count: int) -> Tensor | None:
    """What a network is told of its pictures' size, of those that it makes by itself; None if it
    is told nothing."""
    net = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    config: Any = getattr(net, "config", {})
    side = float((config.get("sample_size") or 0) * getattr(pipe, "vae_scale_factor", 1))
    if config.get("addition_embed_type") == "text_time":
        row = [side, side, 0.0, 0.0, side, side]
    elif "use_additional_conditions" in config:
        told = config["use_additional_conditions"]
        row = [side, side] if told or (told is None and config.get("sample_size") == 128) else []
    else:
        row = []
    return torch.tensor(row).expand(count, -1).contiguous() if row else None


def _none(pipe: Any, device: str) -> Cond:
    """The row of no prompt."""
    guided = any(name.startswith("-") for name in GIVEN[type(pipe).__name__])
    return _rows(pipe, [""], device, "-" if guided else "")


def _filled(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts [L, D] of several lengths as one [B, L, D], and where they are."""
    longest = max(len(one) for one in texts)
    there = torch.tensor([[k < len(one) for k in range(longest)] for one in texts])
    return torch.stack([_longer(one, longest, 0) for one in texts]), there


def joined(parts: Sequence[Cond]) -> Cond:
    """Rows one after the other; texts of fewer tokens are filled up, and masked where that shows.

    Raises:
        ValueError: texts of several lengths without a mask.
    """
    if any(part.mask is not None for part in parts):  # some have none, since all are tokens
        parts = [part if part.mask is not None else _whole(part) for part in parts]
    elif len({part.text.shape[1] for part in parts if part.text is not None}) > 1:
        raise ValueError("prompts have embeddings of several lengths, and no mask")
    out: dict[str, Tensor] = {}
    for name in EMBEDDED:
        values = [value for part in parts if (value := getattr(part, name)) is not None]
        if name in ("text", "mask") and values:
            longest = max(value.shape[1] for value in values)
            values = [_longer(value, longest, 1) for value in values]
        out |= {name: torch.cat(values)} if values else {}
    return Cond(**out)


def _whole(part: Cond) -> Cond:
    """Rows whose entries are all tokens, with the mask that says so."""
    assert part.text is not None
    return replace(part, mask=torch.ones(part.text.shape[:2], dtype=torch.bool))


def _longer(value: Tensor, length: int, axis: int) -> Tensor:
    """A tensor with zeros after its own entries of an axis."""
    short = length - value.shape[axis]
    if not short:
        return value
    shape = list(value.shape)
    shape[axis] = short
    return torch.cat([value, value.new_zeros(shape)], dim=axis)
