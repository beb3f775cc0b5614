"""doctor: what this machine has, what is missing, and what each method holds in memory."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stepdistill.commands.bench import held_line, network_of, passes_line
from stepdistill.commands.read import read_config
from stepdistill.run.assets import SHIPPED, load_teacher
from stepdistill.run.config import CONFIGS
from stepdistill.run.errors import UserError
from stepdistill.trainers.base import Trainer

PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "xformers",
    "torchmetrics",
    "clean-fid",
    "open_clip_torch",
    "safetensors",
)


def doctor() -> int:
    """Print the report; 0 if training, export and evaluation can run, else 1."""
    console, faults = Console(), 0
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("python", platform.python_version())
    table.add_row("machine", f"{platform.machine()}, {os.cpu_count()} CPU cores")
    table.add_row("device", device_line())
    for package in PACKAGES:
        table.add_row(package, escape(package_line(package)))
    for name in SHIPPED:
        try:
            den = load_teacher(name)
            count = sum(p.numel() for p in den.net.parameters())
            line = f"{count:,} parameters, {den.process.name}/{den.head.name}"
        except UserError as error:
            faults, line = faults + 1, f"[red]{escape(str(error))}[/red]"
        table.add_row(f"teacher {name}", line)
    table.add_row("xformers attention", escape(xformers_line()))
    table.add_row(
        "hub", "offline" if os.environ.get("HF_HUB_OFFLINE") == "1" else "asked on demand"
    )
    console.print(table)
    if not faults:
        console.print(methods_table())
    return 1 if faults else 0


def methods_table() -> Table:
    """Networks held and passes a step of every method that has an installed config."""
    table = Table(title="methods, by their digits configs, at the last step", title_justify="left")
    for name in ("method", "networks held", "network passes a step"):
        table.add_column(name)
    for method, trainer in digits_trainers().items():
        table.add_row(method, held_line(trainer), passes_line(trainer))
    return table


def digits_trainers() -> dict[str, Trainer]:
    """A trainer at its last step of each method, by the first installed config that names it."""
    found: dict[str, Trainer] = {}
    for path in sorted(CONFIGS.glob("*-digits*.yaml")):
        cls, settings = read_config(str(path))
        if settings.method not in found:
            trainer = found[settings.method] = cls(settings, network_of(settings))
            trainer.prepare(settings.steps - 1)
    return found


def device_line() -> str:
    """The device that `device: auto` takes."""
    if torch.cuda.is_available():
        count, name = torch.cuda.device_count(), torch.cuda.get_device_name(0)
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        return f"{count} x {name}, {memory:.0f} GiB, {bf16}"
    if torch.backends.mps.is_available():
        return "Apple GPU (mps)"
    return f"CPU, {torch.get_num_threads()} threads"


def package_line(name: str) -> str:
    """Version of a package, or what installs it."""
    extras = {"torchvision": "eval", "clean-fid": "eval", "open_clip_torch": "eval"}
    try:
        return version(name)
    except PackageNotFoundError:
        extra = "xformers" if name == "xformers" else extras.get(name)
        return f'not installed; pip install "stepdistill[{extra}]"' if extra else "not installed"


def xformers_line() -> str:
    """Whether `xformers: true` would work."""
    if not torch.cuda.is_available():
        return "no: needs CUDA"
    return "yes" if find_spec("xformers") else 'no: pip install "stepdistill[xformers]"'
