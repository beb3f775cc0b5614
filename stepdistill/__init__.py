"""Distil many-step diffusion and flow models into few-step ones.

The public names below are imported when first asked for, so that importing the package is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepdistill.commands.evaluate import evaluate
    from stepdistill.commands.export import export
    from stepdistill.commands.train import train
    from stepdistill.diffusion.denoiser import Denoiser
    from stepdistill.diffusion.sampler import sample

__version__ = "0.1.0"

__all__ = ["Denoiser", "__version__", "evaluate", "export", "sample", "train"]

_HOMES = {
    "Denoiser": "stepdistill.diffusion.denoiser",
    "evaluate": "stepdistill.commands.evaluate",
    "export": "stepdistill.commands.export",
    "sample": "stepdistill.diffusion.sampler",
    "train": "stepdistill.commands.train",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
