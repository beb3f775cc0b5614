"""What a run was made with, in one line."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from stepdistill import __version__

PACKAGES = ("torch", "diffusers", "safetensors")


def versions() -> str:
    """Versions of stepdistill, Python and the packages that decide a run's numbers."""
    found = [f"stepdistill {__version__}", f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
