"""What gets installed: one top-level name, every file of the product, and nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDERS = ("configs", "eval", "pipelines", "trainers")


@pytest.fixture(scope="module")
def setuptools_table(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]


@pytest.fixture(scope="module", params=["links", "text files"])
def wheel(request, root: Path, tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tree, where links work and where they came out as text."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    for name in ("stepdistill", *FOLDERS):
        shutil.copytree(
            root / name,
            source / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", ".*"),
        )
    for folder in FOLDERS:
        link = source / "stepdistill" / folder
        link.unlink()
        if request.param == "links":
            link.symlink_to(f"../{folder}")
        else:
            link.write_text(f"../{folder}")
    build = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(out), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    assert "would be ignored" not in build.stdout + build.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_product_under_one_top_level_name(wheel, shipped) -> None:
    content = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in content} == {"stepdistill"}
    assert content == set(shipped)
    assert "stepdistill/py.typed" in content


def test_wheel_carries_the_licence_the_version_and_the_command(wheel) -> None:
    import stepdistill

    info = f"stepdistill-{stepdistill.__version__}.dist-info"
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")
    assert b"stepdistill = stepdistill.cli:main" in wheel.read(f"{info}/entry_points.txt")


def test_every_folder_with_an_init_is_listed_and_no_other(setuptools_table, modules) -> None:
    packages = {name for name, path in modules.items() if path.name == "__init__.py"}
    assert packages == set(setuptools_table["packages"])


def test_every_module_lies_in_a_listed_package(setuptools_table, modules) -> None:
    parents = {name.rpartition(".")[0] for name in modules if "." in name}
    assert parents <= set(setuptools_table["packages"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_link_leads_to_the_root_folder(root: Path, setuptools_table, folder: str) -> None:
    link = root / "stepdistill" / folder
    target = str(link.readlink()) if link.is_symlink() else link.read_text().strip()
    assert Path(target).as_posix() == f"../{folder}"
    assert setuptools_table["package-dir"][f"stepdistill.{folder}"] == folder


def test_root_folders_refuse_any_other_name(root: Path, modules) -> None:
    """Else one file would give two classes, and pickles and isinstance would break."""
    guarded = [
        (name, path)
        for name, path in modules.items()
        if path.name == "__init__.py" and path.relative_to(root).parts[0] in FOLDERS
    ]
    assert len(guarded) >= len(FOLDERS)
    for name, path in guarded:
        wrong = name.removeprefix("stepdistill.")
        spec = importlib.util.spec_from_file_location(wrong, path)
        with pytest.raises(ImportError, match=f"^import {name}, not {wrong}$"):
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert importlib.import_module(name).__name__ == name
