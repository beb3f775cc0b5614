"""Pipelines as diffusers saves them: which network, classes, process and output a folder holds."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from stepdistill.diffusion.codec import Codec
from stepdistill.diffusion.heads import Head
from stepdistill.diffusion.process import EDM, RF, VP, Process

NETWORK_KEYS = ("transformer", "unet", "model")
HEAD_NAMES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}  # by diffusers' types
EDM_HEADS = {"epsilon": "edm-f", "v_prediction": "trig-f"}  # of diffusers' EDM schedulers
ENCODERS = ("text_encoder", "tokenizer")  # how the parts that read prompts are called
NEAR = 1e-3  # relative: numbers of a scheduler that are one and the same


def pipeline_folder(source: str | Path) -> Path:
    """A pipeline's folder; what is none is a name on the hub, from where it is downloaded."""
    import diffusers

    folder = Path(source)
    return folder if folder.is_dir() else Path(diffusers.DiffusionPipeline.download(str(source)))


def read_network(folder: Path, key: str, class_name: str, dtype: torch.dtype) -> nn.Module:
    """The network of a pipeline's folder, which its index names by ``key``.

    Raises:
        ValueError: diffusers has no such class.
    """
    import diffusers

    if not hasattr(diffusers, class_name):
        raise ValueError(f"{folder}: diffusers has no network class {class_name}")
    net: nn.Module = getattr(diffusers, class_name).from_pretrained(
        folder, subfolder=key, torch_dtype=dtype, use_safetensors=True
    )
    return net


def read_codec(folder: Path, index: dict[str, Any]) -> Codec | None:
    """The autoencoder of a pipeline's folder, in fp32; None for a model of pixels.

    Raises:
        ValueError: diffusers has no such class, or its latents' scale is not known.
    """
    entry = index.get("vae") or [None, None]
    return Codec(read_network(folder, "vae", entry[1], torch.float32)) if entry[1] else None


def read_parts(folder: Path, given: Mapping[str, nn.Module | None]) -> Any:
    """A pipeline with its text encoders around parts that are given, by name, such as its network;
    what else it has is left out. No code that lies in the folder is run.

    Raises:
        ValueError: a part that diffusers or transformers does not have, or that cannot be loaded.
    """
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    cls = getattr(diffusers, index["_class_name"], None)
    if cls is None:
        raise ValueError(f"{folder}: diffusers has no pipeline {index['_class_name']}")
    parts: dict[str, Any] = {}
    for name in inspect.signature(cls.__init__).parameters:
        entry = index.get(name)
        if not isinstance(entry, list):
            parts |= {name: entry} if name in index else {}
        elif not name.startswith(ENCODERS) or not entry[1]:
            parts[name] = given.get(name)
        else:
            made = getattr(libraries.get(entry[0]), entry[1], None)
            if made is None:
                raise ValueError(f"{folder}: its {name} is a {'.'.join(entry)}, not known here")
            parts[name] = _loaded(made, folder, name)
    return cls(**parts | {k: False for k in ("requires_safety_checker",) if k in parts})


def _loaded(cls: Any, folder: Path, name: str) -> Any:
    """A part of a pipeline, in fp32 if it has weights.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        with quiet():
            module = isinstance(cls, type) and issubclass(cls, nn.Module)
            own = {"use_safetensors": True} if module else {}
            part = cls.from_pretrained(folder / name, **own)
    except (OSError, ValueError, TypeError, ImportError, KeyError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder}: its {name} cannot be loaded: {first}") from error
    return part.float() if isinstance(part, nn.Module) else part


def absent(folder: Path) -> dict[str, None]:
    """Parts that a pipeline was saved without and that its class must be told so of, by name."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    cls = getattr(diffusers, str(index.get("_class_name")), None)  # one of its own is a list
    optional = getattr(cls, "_optional_components", [])
    if cls is None:
        return {}
    return {name: None for name, v in index.items() if v == [None, None] and name not in optional}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars over a pipeline's components; those of downloads stay."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    both = (of_diffusers, of_transformers)
    shown = [of_diffusers.is_progress_bar_enabled(), of_transformers.is_progress_bar_enabled()]
    for one in both:
        one.disable_progress_bar()
    try:
        yield
    finally:
        for one, was in zip(both, shown, strict=True):
            if was:
                one.enable_progress_bar()


def read_index(file: Path) -> tuple[dict[str, Any], str]:
    """A pipeline's model_index.json, and the key of its network.

    Raises:
        ValueError: no such file, or a pipeline of a kind that is not known here.
    """
    if not file.is_file():
        raise ValueError(f"{file.parent}: no model_index.json, so this is no diffusers pipeline")
    index = json.loads(file.read_text(encoding="utf-8"))
    held = {k for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1]}
    if "vqvae" in held:
        raise ValueError(f"{file}: a model of quantised latents (vqvae), which is not known here")
    key = next((k for k in NETWORK_KEYS if k in held), None)
    if key is None:
        raise ValueError(f"{file}: names none of the networks {', '.join(NETWORK_KEYS)}")
    if f"{key}_2" in held:
        raise ValueError(
            f"{file}: several networks ({key}, {key}_2); save each as a pipeline of its own, to be "
            "given as teacher and, where the method has it, teacher_low"
        )
    if "scheduler" not in held:
        raise ValueError(f"{file}: names no scheduler, which tells how the network was trained")
    return index, key


def read_classes(index: dict[str, Any], rows: int, null: int | None) -> tuple[str, ...]:
    """Names of the classes by label: those of the index, else numbers.

    Args:
        index: a pipeline's model_index.json; ``classes`` (a list, or name -> label) or diffusers'
            ``id2label`` hold names.
        rows: labels that the network knows; 0 if it takes none.
        null: the label that means "no class".

    Raises:
        ValueError: names for other labels than 0, 1, ..., or for more than the network knows.
    """
    count = rows - (null is not None and null == rows - 1)
    given = index.get("classes") or index.get("id2label")
    if rows == 0 or not given:
        return tuple(map(str, range(count)))
    if not isinstance(given, dict):
        names = dict(enumerate(given))
    elif index.get("classes"):
        names = {int(label): name for name, label in given.items()}
    else:
        names = {int(label): name for label, name in given.items()}
    if sorted(names) != list(range(len(names))) or len(names) > count:
        raise ValueError(f"model_index.json: {len(names)} class names for {count} labels")
    texts = [str(names[label]) for label in range(len(names))]
    return tuple(f"{t} ({k})" if texts.count(t) > 1 else t for k, t in enumerate(texts))


def read_scheduler(folder: Path, class_name: str) -> tuple[Process, str]:
    """Process and head name of a saved diffusers scheduler, or of the stock one that it names.

    Raises:
        ValueError: a scheduler whose process is not one of those known here, or of a student that
            knows the times of its own few steps alone.
    """
    import diffusers

    config = json.loads((folder / "scheduler_config.json").read_text())
    if class_name == "LiteralGridScheduler":
        if not config.get("stock"):
            raise ValueError(
                f"{folder}: a student of few steps, which is no teacher; of a method that makes "
                "flows, such as reflow, export the student again"
            )
        config = config["stock"]
        class_name = config["_class_name"]
    if class_name.startswith("FlowMatch"):
        return RF(float(config.get("shift", 1.0))), "velocity"
    if class_name.startswith("EDM"):
        return _read_edm(folder, config)
    scheduler_class = getattr(diffusers, class_name, None)
    if scheduler_class is None or config.get("prediction_type", "epsilon") not in HEAD_NAMES:
        raise ValueError(
            f"{folder}: cannot read a process from {class_name}; known are FlowMatch and EDM "
            f"schedulers, and those with alphas_cumprod and prediction_type {', '.join(HEAD_NAMES)}"
        )
    table = getattr(scheduler_class.from_config(config), "alphas_cumprod", None)
    if table is None:
        raise ValueError(f"{folder}: {class_name} has no alphas_cumprod to read a process from")
    return VP(table), HEAD_NAMES[config.get("prediction_type", "epsilon")]


def _read_edm(folder: Path, config: dict[str, Any]) -> tuple[Process, str]:
    """Process and head of an EDM scheduler's config.

    Raises:
        ValueError: a spacing of noise levels that is not EDM's own, or another output.
    """
    kind, spacing = config.get("prediction_type", "epsilon"), config.get("sigma_schedule", "karras")
    if kind not in EDM_HEADS or spacing != "karras":
        raise ValueError(
            f"{folder}: sigma_schedule={spacing}, prediction_type={kind}; of EDM schedulers, those "
            f"with sigma_schedule=karras and prediction_type {' or '.join(EDM_HEADS)} are known"
        )
    numbers = {"sigma_data": 0.5, "rho": 7.0, "sigma_min": 0.002, "sigma_max": 80.0}
    sigma_data, rho, low, high = (float(config.get(key, own)) for key, own in numbers.items())
    return EDM(sigma_data, rho, low, high), EDM_HEADS[kind]


def stock_config(process: Process, head: Head) -> dict[str, Any] | None:
    """The config of a stock scheduler, from which :func:`read_scheduler` reads process and head.

    None where diffusers has none: for TrigFlow, and for velocities of other processes.
    """
    edm = {head: kind for kind, head in EDM_HEADS.items()}
    if isinstance(process, EDM) and head.name in edm:
        return {
            "_class_name": "EDMEulerScheduler",
            "sigma_min": process.t_min,
            "sigma_max": process.t_max,
            "sigma_data": process.sigma_data,
            "rho": process.rho,
            "prediction_type": edm[head.name],
        }
    kinds = {head: kind for kind, head in HEAD_NAMES.items()}
    if isinstance(process, RF) and head.name == "velocity":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": process.shift}
    if not isinstance(process, VP) or head.name not in kinds:
        return None
    bar = torch.sigmoid(-2 * process.log_n)
    before = torch.cat([torch.ones_like(bar[:1]), bar[:-1]])
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": process.size,
        "trained_betas": [float(f"{beta:.9g}") for beta in (1 - bar / before).tolist()],
        "prediction_type": kinds[head.name],
    }


def read_meaning(folder: Path, class_name: str, process: Process, head: Head) -> bool:
    """Whether a saved scheduler, of steps that are spelt out or not, is of a process and output.

    Raises:
        ValueError: a scheduler that is not known here.
    """
    config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    if class_name != "LiteralGridScheduler":
        found, name = read_scheduler(folder, class_name)
        t = torch.linspace(0.02, 0.98, 25)
        return name == head.name and all(
            torch.allclose(one, other, rtol=NEAR, atol=NEAR)
            for one, other in zip(_told(found, t), _told(process, t), strict=True)
        )
    rows = [row for grid in config["grids"].values() for row in grid]
    t = torch.stack([time_told(process, float(row["time"])) for row in rows])
    c = process.coefs(t)
    a, b, _ = head.weights(c, process.sigma_data)
    mine = {"alpha": c.alpha, "sigma": c.sigma, "a": a, "b": b}
    mine["scale"] = process.scale_input(torch.ones_like(t), t)
    return all(
        torch.allclose(
            torch.tensor([float(row[key]) for row in rows]), value.expand(len(rows)), NEAR, NEAR
        )
        for key, value in mine.items()
    )


def _told(process: Process, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a network is told and fed at even times between the ends of a process."""
    t = process.t_min + u * (process.t_max - process.t_min)
    c = process.coefs(t)
    return c.alpha, c.sigma, process.network_time(t), process.scale_input(torch.ones_like(t), t)


def time_told(process: Process, number: float) -> torch.Tensor:
    """The time that a network is told as a number, by bisection; an end, where there is none."""
    low, high = torch.tensor(process.t_min), torch.tensor(process.t_max)
    for _ in range(60):
        middle = (low + high) / 2
        below = bool(process.network_time(middle) < number)
        low, high = (middle, high) if below else (low, middle)
    return high
