"""What every test shares: no network, the repository's root, and the product's files."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch: equal to the last bit
# As the command line sets it before it imports diffusers; tests that fork have it imported.
os.environ["DIFFUSERS_VERBOSITY"] = "error"

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOT_FOLDERS = ("configs", "eval", "pipelines", "trainers")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shipped() -> dict[str, Path]:
    """Every file of the product: its path in site-packages -> its real path, each file once."""
    files = {}
    for top in ("stepdistill", *ROOT_FOLDERS):
        for folder, _, names in os.walk(ROOT / top):  # does not walk links
            for path in (Path(folder) / name for name in sorted(names)):
                relative = path.relative_to(ROOT).as_posix()
                is_link = relative.removeprefix("stepdistill/") in ROOT_FOLDERS
                if is_link or path.suffix == ".pyc" or path.name.startswith("."):
                    continue
                files[relative if top == "stepdistill" else f"stepdistill/{relative}"] = path
    return files


@pytest.fixture(scope="session")
def modules(shipped: dict[str, Path]) -> dict[str, Path]:
    """Every module of the product: dotted name -> real path (the files in assets are data)."""
    return {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
        for name, path in shipped.items()
        if path.suffix == ".py" and not name.startswith("stepdistill/assets/")
    }
