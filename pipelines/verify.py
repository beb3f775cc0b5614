"""Prove that an exported folder draws the training sampler's images, where only diffusers is.

Noise contract: sample i has the generator g_i = torch.Generator("cpu").manual_seed(seed_i). Its
initial noise is the first torch.randn([C, H, W], generator=g_i); a fresh-noise walk takes one more
of them for each further step, in order. Stock pipelines that do not hand the generators on to their
scheduler take the further ones from torch's own generator, seeded with the first seed.

Shapes: B batch, C channels, H W.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.diffusion.saved import absent
from stepdistill.run.errors import CheckFailed, UserError

_STRANGER = """
import json, sys
sys.modules["stepdistill"] = None  # importing it now raises ImportError
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

with open(sys.argv[1], encoding="utf-8") as file:
    task = json.load(file)
torch.set_num_threads(task["threads"])
pipe = DiffusionPipeline.from_pretrained(
    task["folder"], trust_remote_code=True, **dict.fromkeys(task["absent"])
)
pipe.set_progress_bar_config(disable=True)
images, call = {}, task["call"]
if "image" in call:
    call["image"] = torch.tensor(call["image"])
for steps in task["steps"]:
    torch.manual_seed(task["seeds"][0])
    images[str(steps)] = pipe(
        **call,
        **task["walks"].get(str(steps), {}),
        num_inference_steps=steps,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in task["seeds"]],
        output_type="pt",
    ).images.contiguous()
save_file(images, task["images"])
"""


class VerificationError(CheckFailed):
    """An exported folder does not load, or draws other images than the training sampler."""


def noise_from_seeds(seeds: Sequence[int], shape: Sequence[int], count: int) -> list[Tensor]:
    """The noise that the exported pipeline will draw, for the training sampler to use.

    Args:
        seeds: one for each sample.
        shape: of one sample, [C, H, W].
        count: number of tensors: 1, or the number of steps for fresh noise.

    Returns:
        ``count`` tensors [B, C, H, W]: the initial noise, then the one each further step mixes in,
        so that ``sample(den, noise[0], ..., fresh=noise.__getitem__)`` walks on it.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return [
        torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
        for _ in range(count)
    ]


def draw_folder(
    out: Path,
    steps: Sequence[int],
    labels: Sequence[int] | None,
    seeds: Sequence[int],
    low: Tensor | None = None,
    *,
    call: Mapping[str, Any] | None = None,
    walks: Mapping[int, Mapping[str, Any]] | None = None,
) -> dict[int, Tensor]:
    """Images [B, C, H, W] in [0, 1] for each number of steps, drawn by a fresh interpreter on CPU;
    of small pictures made large where some are given.

    Args:
        out: the exported folder.
        steps: numbers of steps.
        labels: class labels [B], or None for an unconditional model.
        seeds: one for each sample [B].
        low: small pictures [B, C, h, w] in [0, 1] that are made large, or None.
        call: what a stock pipeline is called with in place of labels, such as prompts.
        walks: what it is told besides for a number of steps, such as sigmas.

    In it stepdistill cannot be imported and the Hub is not asked; its copy of the folder's code is
    kept apart from the user's cache.

    Raises:
        VerificationError: the folder does not load or run; the message ends with its last words.
    """
    with tempfile.TemporaryDirectory() as scratch:
        task, images = Path(scratch, "task.json"), Path(scratch, "images.safetensors")
        order = {
            "folder": str(out.absolute()),
            "steps": list(steps),
            "seeds": list(seeds),
            "call": dict(call) if call is not None else _call(labels, seeds, low),
            "walks": {str(n): dict(told) for n, told in (walks or {}).items()},
            "threads": torch.get_num_threads(),
            "absent": unloaded(out),
            "images": str(images),
        }
        task.write_text(json.dumps(order), encoding="utf-8")
        offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch, "modules"))}
        done = subprocess.run(
            [sys.executable, "-c", _STRANGER, str(task)],
            cwd=scratch,
            env={**os.environ, **offline},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise VerificationError(f"{out} does not run in plain diffusers: {words[-1]}")
        return {int(name): tensor for name, tensor in load_file(images).items()}


def unloaded(out: Path) -> list[str]:
    """Parts that a pipeline is loaded without: those that it was saved without, and a checker that
    blackens pictures, which are to be compared as they are."""
    file = out / "model_index.json"
    if not file.is_file():
        return []
    checker = json.loads(file.read_text(encoding="utf-8")).get("safety_checker") or [None]
    return [*absent(out), *(["safety_checker"] if checker[0] else [])]


def _call(labels: Sequence[int] | None, seeds: Sequence[int], low: Tensor | None) -> dict[str, Any]:
    """What our own pipelines are called with."""
    own: dict[str, Any] = {"class_labels": None if labels is None else list(labels)}
    return own | ({"num_images": len(seeds)} if low is None else {"image": low.tolist()})


def verify_folder(
    out: Path,
    expected: Mapping[int, Tensor],
    labels: Sequence[int] | None,
    seeds: Sequence[int],
    tolerance: float = 1e-5,
    low: Tensor | None = None,
    *,
    call: Mapping[str, Any] | None = None,
    walks: Mapping[int, Mapping[str, Any]] | None = None,
) -> float:
    """Reload a folder among strangers and hold its images against the training sampler's.

    Args:
        out: the exported folder.
        expected: for each number of steps the training sampler's clean samples [B, C, H, W] in
            [-1, 1] (not clamped), computed on CPU from the weights as they were saved (reload the
            networks when they were saved in half precision), with :func:`noise_from_seeds`.
        labels: class labels [B], or None for an unconditional model.
        seeds: one for each sample [B].
        tolerance: largest difference allowed between images in [0, 1].
        low: small pictures [B, C, h, w] in [0, 1] that are made large, or None.
        call: see :func:`draw_folder`.
        walks: see :func:`draw_folder`.

    Returns:
        The largest difference between any two pixels in [0, 1].

    Raises:
        UserError: the numbers of samples, labels and seeds differ.
        VerificationError: the folder does not run, or the difference is above the tolerance.
    """
    counts = {len(seeds), *(len(x) for x in expected.values())}
    counts |= set() if labels is None else {len(labels)}
    if len(counts) != 1 or not expected:
        raise UserError(f"verify: samples, labels and seeds differ in number: {sorted(counts)}")
    drawn = draw_folder(out, list(expected), labels, seeds, low, call=call, walks=walks)
    differences: dict[int, float] = {}
    for steps, x in expected.items():
        wanted, got = (x.detach().cpu().float() / 2 + 0.5).clamp(0, 1), drawn[steps].float()
        if wanted.shape != got.shape:
            raise VerificationError(
                f"{out} at {steps} steps: images are {list(got.shape)}, not {list(wanted.shape)}"
            )
        differences[steps] = float((wanted - got).abs().max())
    if not all(difference <= tolerance for difference in differences.values()):
        figures = ", ".join(f"{n} steps: {worst:.3g}" for n, worst in differences.items())
        raise VerificationError(
            f"{out} does not draw the training sampler's images; largest difference at {figures} "
            f"(allowed {tolerance:g})"
        )
    return max(differences.values())
