"""What every test shares: no network, the repository's root, and the product's files."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch: equal to the last bit
# As the command line sets it before it imports diffusers; tests that fork have it imported.
os.environ["DIFFUSERS_VERBOSITY"] = "error"
if "PYTEST_XDIST_WORKER" in os.environ:  # two at once do not write into one module cache
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOT_FOLDERS = ("configs", "eval", "pipelines", "trainers")
BY_METHOD = ("contract", "golden", "method_keys", "methods", "prove", "runs", "two_processes")
LONGEST = ("test_prove", "test_readme", "test_bench_modes", "test_two_processes", "test_contract")


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which names the groups by these marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process, so that they share its fixtures; in files whose fixtures
    are made by method, those of a method. What takes longest is handed out first."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        group, call = item.path.stem.removeprefix("test_"), getattr(item, "callspec", None)
        if call and group in BY_METHOD and "method" in call.params:
            group += f"-{call.params['method']}"
        item.add_marker(pytest.mark.xdist_group(group))


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
