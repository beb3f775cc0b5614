"""The contract of every method that needs whole runs: kills at boundaries, and the export.

Methods are found by their files and run by their configs; nothing here names one.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.commands.export import SEEDS, small_pictures
from stepdistill.commands.read import read_config
from stepdistill.data.degrade import raised
from stepdistill.pipelines.verify import noise_from_seeds
from stepdistill.run import checkpoint
from stepdistill.run.assets import load_teacher
from stepdistill.trainers.base import Trainer
from tests.children import ByMethod, Child, losses, rows, stepdistill, weights
from tests.kills import KILL
from tests.recipes import DISTILS, KINDS, METHODS, command
from tests.strangers import strangers

BOUNDARIES = {  # in this order in one run: boundary -> what the next run goes on from
    "shard:1": 0,
    "step:0": 0,
    "turn:1": 0,
    "files:2": 0,
    "mark:2": 0,
    "phase": 2,
    "remove:2": 4,
    "turn:4": 4,
    "step:5": 4,
    "files:6": 4,
    "mark:6": 4,
    "student": 6,
}
ALWAYS = ("shard:1", "phase", "turn:4", "mark:6")  # at these every method's run is killed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the runs of this file lie."""
    made = tmp_path_factory.mktemp("contract")
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def whole(folder: Path) -> ByMethod[Path]:
    """An uninterrupted run of each method, with all of its checkpoints."""

    def make(method: str) -> Path:
        done = stepdistill(*command(method, f"whole-{method}", "checkpoint.keep=9"), folder=folder)
        assert done.code == 0, done
        return folder / f"whole-{method}"

    return ByMethod(make)


def saved(run: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:07d}"


def tensors(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint that hold weights, averages and optimizers."""
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def pair_files(run: Path) -> dict[str, bytes]:
    """The files of a run's own pair store; none where it makes none."""
    return {file.name: file.read_bytes() for file in (run / "pairs").glob("*")}


def boundaries_of(method: str, run: Path) -> Sequence[str]:
    """Those that a method comes to: with other players in time, or with pairs, it has more."""
    others = len({frozenset(tensors(path)) for path in checkpoint.found(run / "checkpoints")}) > 1
    return [
        name
        for name in (BOUNDARIES if method in KINDS else ALWAYS)
        if (others or name != "phase") and (pair_files(run) or name != "shard:1")
    ]


def check_left(run: Path, boundary: str) -> None:
    """A killed run left just what its boundary says."""
    name, _, number = boundary.partition(":")
    at = saved(run, int(number or 0))
    torn = [path for path in run.glob(f"checkpoints/.{at.name}.*") if any(path.iterdir())]
    if name == "files":
        assert len(torn) == 1 and len(list(torn[0].iterdir())) == 1 and not at.exists()
    elif name in ("mark", "remove"):
        assert len(tensors(at)) > 0
        assert checkpoint.problem(at) == "it has no COMPLETE: its writing was cut short"
    elif name == "shard":
        (half,) = run.glob("pairs/.*.part")
        assert half.stat().st_size > 0
        assert [path.name for path in run.glob("pairs/pairs-*")] == ["pairs-000000.safetensors"]
    elif name == "student":
        assert len(list(run.glob(".student.*/*.safetensors"))) == 1
    assert not (run / "student").exists()


# Resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_boundaries_and_resumed_a_run_ends_the_same(folder, whole, method) -> None:
    """One run is killed at boundary after boundary; what it holds is always the uninterrupted
    run's, and so is its end: weights, averages, optimizers, losses, pairs, to the bit."""
    name, reference = f"killed-{method}", whole[method]
    run, goes_on = folder / name, 0
    args = command(method, name, "resume=auto", "checkpoint.keep=1")
    for boundary in boundaries_of(method, reference):
        done = Child(args, folder, {KILL: boundary}).wait()
        assert done.code == -signal.SIGKILL, f"{boundary}: {done}"
        assert (f"resumed from step-{goes_on:07d}" in done.err) == (goes_on > 0), boundary
        assert ("no checkpoint to go on from" in done.err) == (goes_on == 0), boundary
        check_left(run, boundary)
        goes_on = BOUNDARIES[boundary]
        complete = [p for p in checkpoint.found(run / "checkpoints") if not checkpoint.problem(p)]
        assert [path.name for path in complete[:1]] == [f"step-{goes_on:07d}"][: goes_on > 0]
        for path in complete:
            assert tensors(path) == tensors(saved(reference, int(path.name[5:]))), boundary
    done = stepdistill(*args, folder=folder)
    assert done.code == 0, done
    assert weights(run) == weights(reference)
    assert tensors(saved(run, 6)) == tensors(saved(reference, 6))
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    assert losses(run) == losses(reference)
    assert pair_files(run) == pair_files(reference)
    assert not list(run.rglob(".*"))


# Export -------------------------------------------------------------------------------------------


def trainer_of(run: Path) -> Trainer:
    """The trainer of a finished run as it was at the end, from its last checkpoint."""
    cls, config = read_config(str(run / "config.yaml"))
    teacher = load_teacher(config.teacher or str(run / "pipeline"))
    made, last = cls(config, teacher), checkpoint.load(saved(run, config.steps))
    made.load_state(last.step, last.tensors, last.meta["updates"])
    return made


def drawn(made: Trainer, labels: Tensor, low: Tensor | None = None) -> dict[int, Tensor]:
    """The trainer's own images, by number of steps, from the noise that the pipeline will draw."""
    images, shape = {}, made.teacher.sample_shape
    cond = Cond(labels, image=None if low is None else raised(low * 2 - 1, shape[1:]))
    for steps in made.grids():
        z = noise_from_seeds(SEEDS, shape, steps)
        noise = SimpleNamespace(normal=lambda name, *_, z=z: z[int(name.rpartition("-")[2])])
        images[steps] = made.draw(z[0], cond, steps, noise, torch.arange(len(SEEDS)))
    return images


def exported(folder: Path, run: Path, method: str) -> Path:
    """The pipeline folder of a finished run; that of a trained teacher is written by its run."""
    if method not in DISTILS:
        return run / "pipeline"
    out = f"export-{method}"
    done = stepdistill("export", run.name, "--out", out, folder=folder, env=strangers())
    assert done.code == 0 and "loads in plain diffusers; largest difference" in done.out, done
    return folder / out


@pytest.mark.parametrize("method", METHODS)
def test_an_export_reloaded_draws_what_the_trainer_drew(folder, whole, method) -> None:
    """At every grid. The export itself compares in an interpreter without stepdistill, here a fork;
    a trained teacher's folder holds half precision, and so must the trainer's weights here."""
    out, made = exported(folder, whole[method], method), trainer_of(whole[method])
    pipe = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    if method in DISTILS:
        assert {int(steps) for steps in pipe.scheduler.config.grids} == set(made.grids())
    else:
        for param in made.best().net.parameters():
            param.data = param.data.half().float()
    labels = torch.arange(len(SEEDS)) % len(made.teacher.classes)
    low = small_pictures(made, 1) if made.teacher.beside else None
    more = {} if low is None else {"image": low}
    for steps, x in drawn(made, labels, low).items():
        call = {"class_labels": labels, "num_inference_steps": steps, "output_type": "pt"}
        noise = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        images = pipe(**call, **more, generator=noise).images
        assert (images - (x / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5, steps
        assert images.std() > 0.05
