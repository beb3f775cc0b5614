"""Students on diffusers' own schedulers: `export --stock`, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from stepdistill.commands.evaluate import available
from stepdistill.diffusion.heads import HEADS
from stepdistill.diffusion.process import EDM, RF, VP
from stepdistill.pipelines.stock import stock_scheduler
from stepdistill.run.assets import load_teacher
from stepdistill.run.errors import UserError
from tests.children import stepdistill
from tests.recipes import command

EVEN = {1: (1.0, 0.0), 4: (1.0, 0.75, 0.5, 0.25, 0.0)}
TABLE = VP([0.9999 * 0.99**k for k in range(1000)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stock")


@pytest.mark.parametrize(
    ("method", "keys", "name", "walk"),
    [
        ("consistency", ["clip=null"], "FlowMatchEulerDiscreteScheduler", [1, 0.75, 0.5, 0.25]),
        (
            "pcm",
            ["clip=null", "student_steps=4"],
            "FlowMatchEulerDiscreteScheduler",
            [1, 0.75, 0.5, 0.25],
        ),
        ("scm", [], "FlowMatchEulerDiscreteScheduler", [1, 0.75, 0.5, 0.25]),
        ("consistency", ["teacher=digits-unet"], "LCMScheduler", [767, 575, 383, 191]),
        (
            "pcm",
            ["teacher=digits-unet", "clip=null", "student_steps=4"],
            "DPMSolverMultistepScheduler",
            [767, 575, 383, 191],
        ),
    ],
    ids=["flow, fresh", "flow, predicted", "flow, by angle", "table, fresh", "table, predicted"],
)
def test_a_student_draws_the_same_on_it(folder, request, method, keys, name, walk) -> None:
    """The command itself compares all grids to 1e-5; here in what the folder is written."""
    run = request.node.callspec.id.replace(", ", "-")
    assert stepdistill(*command(method, run, *keys), folder=folder).code == 0
    done = stepdistill("export", run, "--out", f"{run}-out", "--stock", folder=folder)
    assert done.code == 0, done
    out = folder / f"{run}-out"
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", name]
    assert index["walks"]["4"] == walk
    assert sorted(path.name for path in (out / "scheduler").iterdir()) == ["scheduler_config.json"]
    assert f"| scheduler | {name}" in (out / "README.md").read_text()
    pipe = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(num_images=3, num_inference_steps=4).images) == 3
    with pytest.raises(ValueError, match="this student has"):
        pipe(num_inference_steps=5)
    assert available(pipe, [3, 4, 5], "x") == [4]
    with pytest.raises(UserError, match="a student of few steps on a stock scheduler"):
        load_teacher(str(out))


@pytest.mark.parametrize(
    ("method", "keys", "why"),
    [
        ("flow_map", [], "none tells the network where its steps end"),
        ("msd", [], "none takes one network of several"),
        ("consistency", ["clip=1"], "none of flows clips clean estimates"),
    ],
)
def test_what_none_can_do_is_told_and_nothing_written(folder, method, keys, why) -> None:
    run = f"refused-{method}"
    assert stepdistill(*command(method, run, *keys), folder=folder).code == 0
    done = stepdistill("export", run, "--out", f"{run}-out", "--stock", folder=folder)
    assert done.code == 2 and why in done.err and "Traceback" not in done.err
    assert not (folder / f"{run}-out").exists()


@pytest.mark.parametrize(
    ("process", "head", "noise", "grids", "clip", "why"),
    [
        (EDM(), "edm-f", "fresh", EVEN, None, "knows edm-f"),
        (RF(), "x0", "fresh", EVEN, None, "knows x0"),
        (RF(), "velocity", "initial", EVEN, None, "noise that the walk began with"),
        (RF(), "velocity", "heun", EVEN, None, "Heun's steps by a grid that is given"),
        (RF(), "velocity", "fresh", EVEN, 1.0, "clips clean estimates"),
        (TABLE, "eps", "fresh", {2: (1.0, 0.4997, 0.0)}, None, "between the entries"),
        (TABLE, "eps", "predicted", {2: (1.0, 0.4, 0.0)}, 1.0, "none clips"),
    ],
)
def test_reasons(process, head, noise, grids, clip, why) -> None:
    with pytest.raises(ValueError, match=why):
        stock_scheduler(process, HEADS[head], noise, grids, clip)


def test_one_step_needs_no_clip() -> None:
    """Images are clamped anyway."""
    assert stock_scheduler(RF(), HEADS["velocity"], "fresh", {1: (1.0, 0.0)}, 1.0)[1] == {"1": [1]}


def test_even_steps_from_the_noise_are_ddim() -> None:
    grids = {2: (1.0, 0.5, 0.0), 4: (1.0, 0.75, 0.5, 0.25, 0.0)}
    scheduler, walks = stock_scheduler(TABLE, HEADS["v"], "predicted", grids, 1.0)
    assert type(scheduler).__name__ == "DDIMScheduler" and scheduler.config.clip_sample
    assert walks == {"2": [999, 499], "4": [999, 749, 499, 249]}
