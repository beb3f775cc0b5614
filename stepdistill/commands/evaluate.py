"""eval: figures of a pipeline or of a folder of images, the teacher's rows beside them."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.data.degrade import DegradeConfig, lowered
from stepdistill.data.images import DataConfig, ImageSet, open_data
from stepdistill.diffusion.timesteps import regular_start, uniform_grid
from stepdistill.eval.classifier import RECIPES
from stepdistill.eval.clip import ClipScorer, class_captions
from stepdistill.eval.features import load_features
from stepdistill.eval.fid import CleanFid
from stepdistill.eval.generate import TOLD, class_count, generate, load_pipeline
from stepdistill.eval.images import load_images
from stepdistill.eval.runner import METRICS, Reference, Row
from stepdistill.eval.runner import evaluate as figures_of
from stepdistill.eval.straightness import flow_path, straightness
from stepdistill.eval.table import results_table
from stepdistill.run.assets import SHIPPED, load_teacher, teacher_path
from stepdistill.run.errors import UserError
from stepdistill.run.files import write_text
from stepdistill.run.rng import Rng

PATHS = 500


def device_of() -> str:
    """CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_reference(
    source: str, features: str | None, metrics: Sequence[str], device: str
) -> Reference:
    """The real images, their feature space, and Inception where FID is asked for.

    Raises:
        UserError: no such images, features or weights.
    """
    data: ImageSet = open_data(DataConfig(source=source))
    known = source.removesuffix("-test")
    name = features or (known if known in RECIPES else "pixels")
    extractor = load_features(name, device, shape=data.shape)
    fid = CleanFid(device=device) if "fid" in metrics else None
    return Reference(data, extractor, fid=fid)


def evaluate(
    target: str | Path,
    reference: Reference,
    *,
    steps: Sequence[int] = (1, 2, 4),
    num: int = 2000,
    metrics: Sequence[str] = ("fd", "kid", "diversity"),
    seed: int = 0,
    name: str | None = None,
    method: str | None = None,
    batch_size: int = 250,
    clip: ClipScorer | None = None,
    guidance: float | None = None,
    trust_remote_code: bool = False,
) -> list[Row]:
    """Figures of a pipeline at each number of steps that it has, or of a folder of images.

    Numbers of steps that a few-step student was not trained for are left out; at least one must
    remain. A pipeline that reads prompts is given the reference's captions in turn.

    Raises:
        UserError: bad input.
    """
    source = Path(teacher_path(str(target)))
    title = name or str(target)
    samples: dict[int | None, Tensor]
    straight, more = None, dict[str, Any]()
    if is_image_folder(source):
        for metric, lack in (("clip", "captions"), ("straightness", "paths")):
            if metric in metrics:
                raise UserError(f"{metric}: the images in {target} have no {lack}; give a pipeline")
        samples, seen = {None: load_images(source)[:num]}, None
    else:
        pipe = load(target, trust_remote_code=trust_remote_code)
        chosen = available(pipe, steps, title)
        if "straightness" in metrics:  # of the paths, and told first where there are none
            scale = pipe.config.get("default_guidance") or 1.0
            straight = straightness_of(target, seed, guidance=scale)
        small = seen_of(pipe, reference, num)
        call = small.call | prompts_of(pipe, reference) | scaled(guidance)
        keys: dict[str, Any] = {"seed": seed, "batch_size": batch_size, **call}
        samples = {n: generate(pipe, num, steps=n, **keys) for n in chosen}
        more["real"] = small.real
        if "clip" in metrics:
            more["captions"] = captions_for(pipe, call, num)
        seen = seed
    rows = figures_of(
        samples,
        reference,
        model=title,
        method=method or card_fact(source, "method") or "unknown",
        seed=seen,
        metrics=metrics,
        clip=clip,
        **more,
    )
    for row in rows:
        row.straightness = straight
    return rows


@dataclass(frozen=True)
class Small:
    """What a pipeline that makes small pictures large is called with, and what it should give."""

    call: dict[str, Any]
    real: Tensor | None


def seen_of(pipe: Any, reference: Reference, num: int) -> Small:
    """The first pictures of a reference made small, as the pipeline has learnt; nothing for others.

    Raises:
        UserError: the reference's pictures are of another size.
    """
    degrade = pipe.config.get("degrade")
    if degrade is None:
        return Small({}, None)
    config = DegradeConfig(**degrade)
    config.check(reference.data.shape)
    real, label = reference.data.first(num)
    low = lowered(real, config, Rng(0), torch.arange(num))
    call: dict[str, Any] = {"images": low / 2 + 0.5}
    labelled = class_count(pipe) and reference.data.classes
    return Small(call | ({"labels": label.tolist()} if labelled else {}), real)


def captions_for(pipe: Any, call: Mapping[str, Any], num: int) -> Sequence[str]:
    """What samples are to show: their prompts, or their classes in words."""
    prompts: Sequence[str] | None = call.get("prompts")
    return prompts or class_captions(pipe.config.get("classes") or (), num)


def scaled(guidance: float | None) -> dict[str, Any]:
    """How samples are guided; nothing where the pipeline knows by itself."""
    return {} if guidance is None else {"options": {"guidance_scale": guidance}}


def prompts_of(pipe: Any, reference: Reference) -> dict[str, Any]:
    """The reference's captions for a pipeline that reads prompts; nothing for others.

    Raises:
        UserError: it has none.
    """
    if "prompt" not in inspect.signature(type(pipe).__call__).parameters:
        return {}
    if not reference.data.classes:
        raise UserError(
            f"--reference {reference.data.name}: has no captions, and {type(pipe).__name__} reads "
            "prompts; name a folder with a metadata.jsonl of file_name and text"
        )
    return {"prompts": reference.data.classes}


def straightness_of(target: str | Path, seed: int, *, guidance: float = 1.0) -> float:
    """Straightness of the paths of a pipeline that is a flow, from :data:`PATHS` noises.

    Raises:
        UserError: one of few steps, which knows no others, or of a process that is not known.
    """
    den = load_teacher(str(target), device_of(), key="straightness")
    if den.adapter.reads_text:
        raise UserError(
            f"straightness={target}: its paths are those of prompts, and not known here"
        )
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(PATHS, *den.sample_shape, generator=generator).to(device_of())
    count = len(den.classes)
    label = torch.arange(PATHS, device=z.device) % count if count else None
    (top, _) = uniform_grid(den.process, 1, regular_start(den.process, den.head.name))
    return straightness(*flow_path(den, z, top, Cond(label), guidance=guidance))


def is_image_folder(path: Path) -> bool:
    """Whether a folder holds images and no pipeline."""
    return path.is_dir() and not (path / "model_index.json").is_file()


def load(target: str | Path, *, trust_remote_code: bool) -> Any:
    """A pipeline on this machine's device; the shipped teachers need no trust."""
    trusted = trust_remote_code or str(target) in SHIPPED
    path = teacher_path(str(target))
    return load_pipeline(path, trust_remote_code=trusted, device=device_of())


def teacher_beside(
    target: str, asked: str | None, *, trust_remote_code: bool
) -> tuple[str | None, str]:
    """The teacher whose rows stand beside, and, if there is none, why.

    Raises:
        UserError: one that was asked for by name cannot be loaded.
    """
    name = asked or card_fact(Path(target), "teacher")
    if not name or name in ("none", target):
        return None, "no teacher is known for it; name one with --teacher for rows beside"
    try:
        load(name, trust_remote_code=trust_remote_code)
    except UserError as error:
        if asked:
            raise
        return None, f"its teacher's rows are missing: {error}"
    return name, ""


def available(pipe: Any, steps: Sequence[int], title: str) -> list[int]:
    """Those numbers of steps that a pipeline can sample in."""
    grids = (
        pipe.scheduler.config.get("grids") or pipe.config.get("walks") or getattr(pipe, TOLD, {})
    )
    if not grids:
        return list(steps)
    chosen = [n for n in steps if str(n) in grids]
    if not chosen:
        known = ", ".join(sorted(grids, key=int))
        raise UserError(f"steps={','.join(map(str, steps))}: {title} samples in {known} steps")
    return chosen


def card_fact(folder: Path, key: str) -> str | None:
    """A fact from a model card's table, such as the method or the teacher."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    match = re.search(rf"^\| {key} \| (.+?) \|$", card.read_text(encoding="utf-8"), re.MULTILINE)
    return match.group(1) if match else None


def evaluate_command(
    target: str,
    *,
    reference: str,
    steps: str,
    num: int,
    metrics: str,
    features: str | None,
    clip_model: str,
    seed: int,
    guidance: float | None,
    teacher: str | None,
    teacher_steps: int,
    batch_size: int,
    json_file: Path | None,
    overwrite: bool,
    trust_remote_code: bool,
) -> None:
    """The `eval` command: print the table, write the rows.

    Raises:
        UserError: bad input.
    """
    if json_file is not None and json_file.exists() and not overwrite:
        raise UserError(f"{json_file} exists; choose another file or pass --overwrite")
    wanted = [part.strip() for part in metrics.split(",") if part.strip()]
    for metric in set(wanted) - set(METRICS):
        raise UserError(f"--metrics {metric}: known are {', '.join(METRICS)}")
    counts = parse_steps(steps)
    real = open_reference(reference, features, wanted, device_of())
    clip = None
    if "clip" in wanted:
        clip = ClipScorer(*clip_model.split("/", 1), device=device_of())
    common: dict[str, Any] = {
        "num": num,
        "metrics": wanted,
        "seed": seed,
        "batch_size": batch_size,
        "clip": clip,
        "trust_remote_code": trust_remote_code,
    }
    beside, why = teacher_beside(target, teacher, trust_remote_code=trust_remote_code)
    rows = evaluate(target, real, steps=counts, guidance=guidance, **common)
    teacher_rows: list[Row] = []
    if beside is None and target not in SHIPPED:
        print(f"stepdistill: {why}", file=sys.stderr)
    elif beside is not None:
        own = sorted({row.steps for row in rows if row.steps} | {teacher_steps})
        teacher_rows = evaluate(
            beside, real, steps=own, name=f"teacher {beside}", method="teacher", **common
        )
    Console().print(results_table(rows, teacher_rows))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        everything = [row.model_dump() for row in [*teacher_rows, *rows]]
        write_text(json_file, json.dumps(everything, indent=1) + "\n")


def parse_steps(text: str) -> list[int]:
    """Numbers of steps from "1,2,4".

    Raises:
        UserError: something else.
    """
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--steps {text}: write numbers with commas, as 1,2,4") from error
    if not counts or min(counts) < 1:
        raise UserError(f"--steps {text}: steps are 1 or more")
    return counts
