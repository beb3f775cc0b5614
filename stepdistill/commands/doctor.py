"""doctor: what this machine has, what is missing, and what each method holds in memory."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.table import Table

from stepdistill.run.assets import TEACHERS, load_teacher
from stepdistill.run.errors import UserError

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
        table.add_row(package, package_line(package))
    for name in TEACHERS:
        try:
            den = load_teacher(name)
            count = sum(p.numel() for p in den.net.parameters())
            line = f"{count:,} parameters, {den.process.name}/{den.head.name}"
        except UserError as error:
            faults, line = faults + 1, f"[red]{error}[/red]"
        table.add_row(f"teacher {name}", line)
    table.add_row("xformers attention", xformers_line())
    table.add_row(
        "hub", "offline" if os.environ.get("HF_HUB_OFFLINE") == "1" else "asked on demand"
    )
    console.print(table)
    return 1 if faults else 0


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
