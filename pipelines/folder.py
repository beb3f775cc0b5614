"""Write a pipeline folder in one piece: whole and on the disk, or not there at all."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import nn

from stepdistill.pipelines.image import MODEL_NAMES, ImagePipeline
from stepdistill.pipelines.literal_grid import LiteralGridScheduler
from stepdistill.pipelines.upscale import UpscalePipeline
from stepdistill.run.errors import UserError
from stepdistill.run.files import whole_folder

INDEX = "model_index.json"


def write_pipeline(
    out: Path,
    modules: Sequence[nn.Module],
    scheduler: Any,
    *,
    classes: Sequence[str] | None,
    null_label: int | None,
    default_steps: int,
    default_guidance: float = 1.0,
    card: str,
    dtype: torch.dtype | None,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
    extra: Any = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write networks and scheduler as a folder that plain diffusers loads; returns ``out``.

    It holds model_index.json, model/ (model_2/ ... for experts; extra/ for further numbers) with
    config and safetensors, scheduler/, pipeline.py and README.md, and is built beside ``out`` under
    a temporary name, flushed to the disk and renamed.

    Args:
        out: the folder to write.
        modules: diffusers networks; module i is the scheduler's expert i.
        scheduler: a :class:`LiteralGridScheduler`, or a stock diffusers scheduler.
        classes: class names by label, or None.
        null_label: the label that means "no class", if the networks know one.
        default_steps: number of steps when none is asked for.
        default_guidance: guidance scale when none is asked for.
        card: text of README.md.
        dtype: dtype of the saved weights; None keeps their own.
        overwrite: replace a pipeline folder that is already there.
        check: is shown the folder before it takes its place; what it raises leaves ``out`` alone.
        extra: embeds the further numbers of the scheduler's grid.
        settings: further ones, such as ``routes``; with ``degrade`` it makes small pictures large.

    Raises:
        UserError: ``out`` is taken, or networks and scheduler do not fit together.
    """
    refuse_taken(out, overwrite)
    _check_fit(modules, scheduler, default_steps)
    pipeline = (UpscalePipeline if "degrade" in (settings or {}) else ImagePipeline)(
        scheduler=scheduler,
        classes=classes,
        default_steps=default_steps,
        null_label=null_label,
        default_guidance=default_guidance,
        extra=_cast(extra, dtype),
        **(settings or {}),
        **dict(zip(MODEL_NAMES, (_cast(module, dtype) for module in modules), strict=False)),
    )
    with whole_folder(out) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        (folder / "README.md").write_text(card, encoding="utf-8")
        _tidy(folder)
        if check is not None:
            check(folder)
    return out


def _cast(module: Any, dtype: torch.dtype | None) -> Any:
    """A copy of a network in another dtype; itself where none is asked for, or there is none."""
    if module is None or dtype is None:
        return module
    return nn.Module.to(copy.deepcopy(module), dtype)


def _tidy(folder: Path) -> None:
    """Take this machine's paths out of the configs and give the weights the other files' mode."""
    for config in [*folder.glob("model*/config.json"), *folder.glob("extra/config.json")]:
        entries = json.loads(config.read_text(encoding="utf-8"))
        entries.pop("_name_or_path", None)
        config.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    for weights in folder.rglob("*.safetensors"):
        weights.chmod((folder / INDEX).stat().st_mode)


def refuse_taken(out: Path, overwrite: bool) -> None:
    """Stop before anything that is not ours to replace is replaced.

    Raises:
        UserError: ``out`` holds something, and may not or must not be overwritten.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; choose another folder, or replace it by --overwrite")
    if out.exists() and not (out / INDEX).is_file():
        raise UserError(f"{out} is no pipeline folder (no {INDEX}), so it is not overwritten")


def _check_fit(modules: Sequence[nn.Module], scheduler: Any, default_steps: int) -> None:
    """Stop where the folder could be written but not used."""
    if not 1 <= len(modules) <= len(MODEL_NAMES):
        raise UserError(f"a pipeline holds 1 to {len(MODEL_NAMES)} networks, not {len(modules)}")
    for module in modules:
        stock = type(module).__module__.startswith("diffusers.")
        if not (stock and isinstance(module, ModelMixin)):
            raise UserError(
                f"{type(module).__name__} is no diffusers network, so diffusers cannot load it; "
                "export a UNet2DModel or a DiTTransformer2DModel"
            )
    if not isinstance(scheduler, LiteralGridScheduler):
        if not isinstance(scheduler, SchedulerMixin):
            raise UserError(f"{type(scheduler).__name__} is no diffusers scheduler")
        if len(modules) > 1:
            raise UserError("several networks need a LiteralGridScheduler, which tells them apart")
        return
    grids = scheduler.config.grids
    if str(default_steps) not in grids:
        raise UserError(f"default_steps is {default_steps}; grids are {', '.join(grids)}")
    needed = 1 + max(row["expert"] for rows in grids.values() for row in rows)
    if needed > len(modules):
        raise UserError(f"the grid calls {needed} networks, but {len(modules)} were given")
