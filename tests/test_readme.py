"""Every command and every Python block of the README runs, with few steps where it trains."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepdistill.commands.read import read_config
from tests.children import Done, stepdistill
from tests.helpers import mlp_teacher, run, saved

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SMALL = ["steps=3", "batch_size=16", "sample.every_steps=0", "eval.every_steps=0", "device=cpu"]


def blocks(root: Path, language: str) -> list[str]:
    text = (root / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(root: Path) -> list[str]:
    lines = [
        line.split("#")[0].strip() for block in blocks(root, "sh") for line in block.split("\n")
    ]
    prose = re.sub(
        r"```.*?```", "", (root / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    inline = re.findall(r"`([^`]*stepdistill train [^`]*)`", prose)
    return [line for line in lines if line] + [" ".join(line.split()) for line in inline]


def pair_store(name: str) -> bool:
    """Whether a config makes pairs of its own, of which a few will do."""
    return read_config(name)[1].pair_store is not None


def small(words: list[str]) -> list[str]:
    """The same command with few steps."""
    if {"train", "teacher"} & set(words):
        words = words + SMALL
    if words[1:3] == ["pairs", "reflow-digits"]:
        words = [*words, "pairs.num=20", "pairs.steps=1"]
    if "train" in words and pair_store(words[words.index("train") + 1]):
        words = [*words, "pairs.num=64", "pairs.steps=2"]
    if "students" in words:
        words = [*words, *"--config consistency-digits --seconds 1 --seeds 0 --num 100".split()]
    elif "--num" in words:
        words[words.index("--num") + 1] = "64"
    return words


def run_line(line: str, folder: Path) -> Done:
    """One line of a shell block: ours in a child that has all imported, others as they stand by
    this interpreter's own scripts."""
    words = small(shlex.split(line))
    if words[0] == "stepdistill":
        return stepdistill(*words[1:], folder=folder)
    place = next(i for i, word in enumerate(words) if "=" not in word)
    words[place] = str(Path(sys.executable).parent / words[place])
    ran = subprocess.run(["env", *words], cwd=folder, env=ENV, capture_output=True, text=True)
    return Done(ran.returncode, ran.stdout, ran.stderr)


def test_the_commands_run_in_order(root: Path, tmp_path: Path) -> None:
    done = []
    for block in blocks(root, "python"):
        if named := re.match(r"# (\w+\.py)\n", block):  # a file that a command is about
            (tmp_path / named[1]).write_text(block, encoding="utf-8")
    for line in commands(root):
        if line.startswith(("make ", "pip ")):  # CI itself runs these
            continue
        ran = run_line(line, tmp_path)
        assert ran.code == 0, f"{line}\n{ran.out[-500:]}\n{ran.err[-2000:]}"
        done.append(line)
    assert len(done) >= 8
    assert (tmp_path / "figures.json").is_file()
    for block in blocks(root, "python"):
        if "class MyTrainer" in block:
            made: dict = {"__name__": "mine"}
            exec(block, made)
            keys = {"method": "mine", "run": "unused", "teacher": "unused", "steps": 4}
            cls = made["TRAINER"]
            own = cls(cls.Config(**keys, batch_size=8), mlp_teacher())
            before = saved(own)[0]["student"]
            run(own, 0, 3)
            assert any(not torch.equal(w, before[k]) for k, w in saved(own)[0]["student"].items())
            continue
        code = block.replace("steps=100", "steps=2")
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=ENV, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{block}\n{ran.stderr[-2000:]}"
    assert (tmp_path / "three.png").is_file()


def test_the_readme_names_every_method(root: Path) -> None:
    from stepdistill.trainers.find import methods

    text = (root / "README.md").read_text(encoding="utf-8")
    missing = [method.name for method in methods() if f"`{method.name}`" not in text]
    assert not missing


@pytest.mark.parametrize("target", ["demo", "test", "proof"])
def test_make_knows_the_commands(root: Path, target: str) -> None:
    dry = subprocess.run(["make", "-n", target], cwd=root, capture_output=True, text=True)
    assert dry.returncode == 0


def test_every_linked_file_is_there(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert {"docs/demo.png", "CONTRIBUTING.md"} <= set(links)
    assert [link for link in links if not (root / link).exists()] == []
