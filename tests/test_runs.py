"""Whole runs on the shipped teacher: what they leave, and that no end before the end shows.

Every run is a command in a process of its own, on one thread.
"""

from __future__ import annotations

import json
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from stepdistill.commands.read import read_config
from stepdistill.data.pairs.store import PairStore
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run import checkpoint
from stepdistill.run.config import digest
from stepdistill.trainers.find import trainer
from tests.children import ByMethod, Child, Done, losses, rows, stepdistill, weights
from tests.faults import FAULT
from tests.recipes import DISTILS as METHODS
from tests.recipes import KINDS, SHORT, command, recipe

TOLD = {"flow_map", "hyper_sd", "mean_flow", "twin_flow", "lcm"}  # networks told more


def train(folder: Path, method: str, run: str, *more: str) -> Path:
    """Train to the end."""
    done = stepdistill(*command(method, run, *more), folder=folder)
    assert (done.code, done.out) == (0, f"{run}\n"), done
    return folder / run


def stop(child: Child, run: Path, row: int, number: int, wait: float = 0) -> Done:
    """Send a run a signal ``wait`` seconds after a row of its log."""
    child.when(lambda: len(rows(run)) >= row)
    time.sleep(wait)
    child.signal(number)
    return child.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file lie."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder: Path) -> ByMethod[Path]:
    """An uninterrupted run of each method."""
    return ByMethod(lambda method: train(folder, method, f"whole-{method}"))


# What a run leaves --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_layout_of_a_finished_run(whole, method) -> None:
    run = whole[method]
    log = rows(run)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    seconds = [row["seconds"] for row in log]
    assert seconds == sorted(seconds) and seconds[0] > 0
    for row in log:
        assert row["skipped"] == 0
        assert row["images_per_second"] > 0 and row["memory_bytes"] > 2**20
        assert all(re.fullmatch(r"\w+/\w+", name) for name in row["losses"])
        assert all(isinstance(value, float) for value in row["losses"].values())
    saved = checkpoint.found(run / "checkpoints")
    assert [path.name for path in saved] == ["step-0000006", "step-0000004"]  # keep=2
    assert all((path / "COMPLETE").is_file() for path in saved)
    players = checkpoint.load(saved[0]).meta["updates"]
    students = [name for name in players if name.startswith("student")]
    assert "student" in students
    for name in students:
        files = {path.name for path in (run / name).iterdir()}
        own = {"config.json", "diffusion_pytorch_model.safetensors"}
        assert files == own | ({"extra"} if method in TOLD else set())
        assert json.loads((run / name / "config.json").read_text())["_class_name"]
        written = [path for path in (run / name).rglob("*") if path.is_file()]
        assert len({path.stat().st_mode for path in written}) == 1
    entries = {"config.yaml", "log.jsonl", "checkpoints", *students}
    entries |= {"pairs"} if trainer(method).needs == "pairs" else set()
    assert {path.name for path in run.iterdir()} == entries


@pytest.mark.parametrize("method", METHODS)
def test_the_resolved_config_and_its_hash_are_kept(whole, method) -> None:
    text = (whole[method] / "config.yaml").read_text()
    _, config = read_config(str(whole[method] / "config.yaml"))
    assert text.startswith(f"# sha256 {digest(config)}\n")
    values = yaml.safe_load(text)
    assert values["method"] == method and values["batch_size"] == 16
    assert values["checkpoint"] == {"every_steps": 2, "keep": 2}


def test_the_student_is_the_average_not_the_last_weights(whole) -> None:
    from diffusers import DiTTransformer2DModel

    run = whole["consistency"]
    net = DiTTransformer2DModel.from_pretrained(run / "student")
    saved = checkpoint.load(run / "checkpoints" / "step-0000006").tensors["student"]
    for name, value in net.state_dict().items():
        assert torch.equal(value, saved[f"ema.{name}"])
    assert any(not torch.equal(v, saved[f"net.{k}"]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_student(whole, root, method) -> None:
    cls, config = read_config(recipe(method))
    name = config.teacher or "digits-dit"
    teacher = Denoiser.from_pipeline(root / "stepdistill" / "assets" / name).net
    net = type(teacher).from_pretrained(whole[method] / "student")
    own = dict(teacher.named_parameters())  # a smaller student's are others
    moved = [name not in own or not torch.equal(a, own[name]) for name, a in net.named_parameters()]
    fixed = "freeze" in cls.Config.model_fields  # most of its weights stay as they are
    assert sum(moved) > len(moved) / (10 if fixed else 2)
    assert all(value.isfinite().all() for value in net.parameters())


def test_grids_figures_curves_and_the_best_checkpoint(folder) -> None:
    args = "sample.every_steps=3 sample.num=10 sample.teacher_steps=2 eval.every_steps=1 steps=8"
    args += " eval.num=65 log.tensorboard=true checkpoint.keep=1 optim.lr=0.003 checkpoint"
    run = train(folder, "consistency", "looks", *f"{args}.every_steps=0".split())
    names = sorted(path.name for path in (run / "samples").iterdir())
    assert names == [f"step-{step:07d}.png" for step in (3, 6, 8)]
    # ten images in rows of two, the teacher's five rows over the student's five
    side, scale = 8 + 1, 48 // 8
    size = ((2 * side + 1) * scale, (10 * side + 1) * scale)
    first, last = (Image.open(run / "samples" / names[k]) for k in (0, -1))
    assert first.size == last.size == size
    half = (0, 0, size[0], 5 * side * scale)
    below = (0, 5 * side * scale, *size)
    assert first.crop(half).tobytes() == last.crop(half).tobytes()
    assert first.crop(below).tobytes() != last.crop(below).tobytes()
    figures = [(row["step"], row["eval"]) for row in rows(run) if "eval" in row]
    assert [step for step, _ in figures] == list(range(1, 9))
    assert all(set(one) == {"fd-digits/1"} for _, one in figures)
    best = min(figures, key=lambda row: row[1]["fd-digits/1"])[0]
    kept = {path.name for path in checkpoint.found(run / "checkpoints")}
    assert kept == {"step-0000008", f"step-{best:07d}"}
    meta = checkpoint.load(run / "checkpoints" / f"step-{best:07d}").meta
    assert meta["best"]["name"] == f"step-{best:07d}"
    assert list((run / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_is_as_it_was(whole, root, method) -> None:
    """Training reads it; nothing in its folder is touched."""
    folder = root / "stepdistill" / "assets" / "digits-dit"
    newest = max(path.stat().st_mtime for path in folder.rglob("*"))
    assert newest < (whole[method] / "config.yaml").stat().st_mtime


def test_a_teacher_is_trained_and_distilled(folder) -> None:
    args = ["run=new-teacher", *SHORT, "steps=4", "network.config.num_layers=1"]
    args += ["sample.every_steps=2", "sample.num=4"]
    done = stepdistill("teacher", "teacher-digits-dit", *args, folder=folder)
    assert (done.code, done.out) == (0, "new-teacher/pipeline\n"), done
    run = folder / "new-teacher"
    side, scale = 8 + 1, 48 // 8
    picture = Image.open(run / "samples" / "step-0000002.png")
    assert picture.size == ((side + 1) * scale, (4 * side + 1) * scale)  # no teacher beside it
    student = train(folder, "dmd", "of-new", "teacher=new-teacher/pipeline", "steps=2")
    made = json.loads((student / "student" / "config.json").read_text())
    assert made["num_layers"] == 1
    done = stepdistill("export", "new-teacher", "--out", "x", folder=folder)
    assert done.code == 2 and "its pipeline is new-teacher/pipeline already" in done.err


# Ends before the end ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in KINDS if name in METHODS])
def test_killed_at_a_random_moment_and_resumed_a_run_ends_the_same(folder, whole, method) -> None:
    """Twice in one run; phased_dmd once before and once after the border of its phases."""
    run, moment = f"killed-{method}", random.Random()
    for first in (1, 4):
        child = Child(command(method, run, "resume=auto"), folder)
        done = stop(child, folder / run, first + moment.randrange(2), signal.SIGKILL, 0.03)
        assert done.code in (-signal.SIGKILL, 0)  # 0 where it was faster
    train(folder, method, run, "resume=auto")
    assert weights(folder / run) == weights(whole[method])
    assert [row["step"] for row in rows(folder / run)] == [1, 2, 3, 4, 5, 6]
    newest = checkpoint.found(folder / run / "checkpoints")[0]
    reference = checkpoint.found(whole[method] / "checkpoints")[0]
    for path in reference.glob("*.safetensors"):  # optimizers too
        assert (newest / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("phased_dmd", ["steps=8"]),  # its second phase begins at step 4
        ("phased_dmd", ["steps=7", "critic_steps=2"]),
        ("consistency", ["target=ema", "solver=heun", "pairs.stages=3", "steps=8"]),
        ("sim", ["critic_steps=2", "steps=8"]),
    ],
    ids=["phases", "odd phases", "ema target", "two critic turns"],
)
def test_resumed_from_a_checkpoint_a_run_ends_the_same(folder, method, more, step) -> None:
    """From each checkpoint by its path, in a run of its own."""
    name = "-".join(["steps", method, *more]).replace("=", "-")
    if not (folder / name).exists():
        train(folder, method, name, "checkpoint.keep=9", *more)
    source = folder / name / "checkpoints" / f"step-{step:07d}"
    run = train(folder, method, f"{name}-from-{step}", f"resume={source}", *more)
    assert weights(run) == weights(folder / name)
    assert [row["step"] for row in rows(run)][0] == step + 1
    assert losses(run) == losses(folder / name)[step:]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_a_resumed_run_ends_the_same(folder, whole, number, code) -> None:
    run = f"signal-{code}"
    never = "checkpoint.every_steps=0"
    child = Child(command("sim", run, never), folder, {FAULT: "signal:3"})
    done = stop(child, folder / run, 2, number)
    assert (done.code, done.out) == (code, "")
    *_, line = done.err.splitlines()
    assert line == f"stepdistill: stopped by {signal.Signals(number).name}; the state was saved"
    (saved,) = checkpoint.found(folder / run / "checkpoints")
    assert checkpoint.problem(saved) is None and saved.name >= "step-0000002"
    assert not (folder / run / "student").exists()
    resumed = stepdistill(*command("sim", run, never, "resume=auto"), folder=folder)
    assert resumed.code == 0 and f"resumed from {saved.name}" in resumed.err
    assert weights(folder / run) == weights(whole["sim"])


def test_torn_checkpoints_are_named_and_passed_over(folder, whole) -> None:
    run = folder / "torn"
    train(folder, "dmd", "torn", "checkpoint.keep=9")
    for path in (run / "student").iterdir():
        path.unlink()
    (run / "student").rmdir()
    newest, middle, _ = checkpoint.found(run / "checkpoints")
    (newest / "COMPLETE").unlink()
    short = middle / "critic.safetensors"
    whole_size = short.stat().st_size
    short.write_bytes(short.read_bytes()[:-100])
    done = stepdistill(*command("dmd", "torn", "resume=auto"), folder=folder)
    assert done.code == 0
    assert done.err.splitlines()[:3] == [
        "passed over checkpoint step-0000006: it has no COMPLETE: its writing was cut short",
        f"passed over checkpoint step-0000004: critic.safetensors has {whole_size - 100} bytes "
        f"instead of {whole_size}",
        "resumed from step-0000002",
    ]
    assert weights(run) == weights(whole["dmd"])
    short = run / "checkpoints" / "step-0000006" / "student.safetensors"
    short.write_bytes(short.read_bytes()[:-1])
    source = f"resume={short.parent}"
    done = stepdistill(*command("dmd", "torn", source), folder=folder)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "student.safetensors has" in line and "resume=auto takes the newest" in line


def test_going_back_by_a_path_drops_what_came_later(folder, whole) -> None:
    run = train(folder, "reflow", "back", "checkpoint.keep=9")
    source = run / "checkpoints" / "step-0000002"
    done = stepdistill(*command("reflow", "back", f"resume={source}"), folder=folder)
    assert done.code == 0
    for step in (4, 6):
        gone = f"removed checkpoint step-000000{step}: the run goes on from step 2"
        assert gone in done.err.splitlines()
    assert weights(run) == weights(whole["reflow"])
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_resumed_does_nothing_and_can_be_made_longer(folder, whole) -> None:
    run = train(folder, "reflow", "longer", "steps=4", "optim.decay=constant")
    before = weights(run)
    train(folder, "reflow", "longer", "steps=4", "optim.decay=constant", "resume=auto")
    assert weights(run) == before and len(rows(run)) == 4
    train(folder, "reflow", "longer", "steps=6", "optim.decay=constant", "resume=auto")
    train(folder, "reflow", "at-once", "steps=6", "optim.decay=constant")
    assert weights(run) == weights(folder / "at-once") != before


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["optim.lr=0.5"], r"other settings: optim.lr=[\d.e-]+ \(here 0.5\); set them back, or"),
        (["seed=1", "critic_steps=3"], r"seed=0 \(here 1\), critic_steps=\d \(here 3\); set"),
        (["steps=4"], "steps=4: checkpoint .* has done 6 already; set steps to that or more"),
        (["steps=20"], r"steps=20: at step 6 this run trains student, critic, the checkpoint .*_2"),
    ],
)
def test_what_cannot_be_resumed(folder, whole, more, line) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole["phased_dmd"].rglob("*")}
    args = command("phased_dmd", "whole-phased_dmd", "resume=auto", *more)
    done = stepdistill(*args, folder=folder)
    assert done.code == 2
    (text,) = done.err.splitlines()
    assert re.search(line, text), text
    after = {path: path.stat().st_mtime_ns for path in whole["phased_dmd"].rglob("*")}
    assert after == before


def test_a_run_is_not_written_over(folder, whole) -> None:
    """Not by another one's checkpoint, and not where only its student is left."""
    source = whole["sim"] / "checkpoints" / "step-0000006"
    done = stepdistill(*command("sim", "whole-dmd", f"resume={source}"), folder=folder)
    assert done.code == 2 and "run=whole-dmd already holds a run" in done.err
    (folder / "bare").mkdir()
    (whole["sim"] / "student").rename(folder / "bare" / "student")
    try:
        done = stepdistill(*command("sim", "bare", "resume=auto"), folder=folder)
        assert done.code == 2
        assert "run=bare is finished and holds no complete checkpoint" in done.err
    finally:
        (folder / "bare" / "student").rename(whole["sim"] / "student")


def test_what_a_killed_run_left_half_written_goes(folder) -> None:
    run = train(folder, "reflow", "left", "steps=2")
    before = {path.name for path in run.rglob("*")}
    for name in (".student.ab.part", "checkpoints/.step-0000004.cd.part"):
        (run / name).mkdir()
        (run / name / "model.safetensors").write_bytes(b"half")
    train(folder, "reflow", "left", "steps=3", "resume=auto")
    after = {path.name for path in run.rglob("*")}
    assert after == before | {"step-0000003"}


def test_pairs_made_before_are_used(folder, whole) -> None:
    args = command("reflow", "first-pairs")
    assert stepdistill("pairs", *args[1:], folder=folder).code == 0
    store = folder / "first-pairs" / "pairs"
    before = {path: path.stat().st_mtime_ns for path in store.glob("pairs-*")}
    run = train(folder, "reflow", "first-pairs")
    assert before == {path: path.stat().st_mtime_ns for path in store.glob("pairs-*")}
    assert weights(run) == weights(whole["reflow"])
    elsewhere = train(folder, "reflow", "other", "pairs.path=first-pairs/pairs")
    assert not (elsewhere / "pairs").exists()
    assert weights(elsewhere) == weights(whole["reflow"])


def test_a_pair_store_is_what_the_teacher_draws(whole) -> None:
    from stepdistill.adapters.cond import Cond
    from stepdistill.diffusion.sampler import sample
    from stepdistill.diffusion.timesteps import uniform_grid
    from stepdistill.run.assets import load_teacher
    from stepdistill.trainers.pair_walk import plan_of

    _, config = read_config(str(whole["reflow"] / "config.yaml"))
    teacher = load_teacher("digits-dit")
    plan = plan_of(config, teacher)
    store = PairStore(whole["reflow"] / "pairs", plan)
    grid, kept = uniform_grid(teacher.process, 2), store.at(torch.arange(40))
    with torch.no_grad():
        x = sample(teacher, plan.noise(torch.arange(40)), grid, Cond(kept.label))
    torch.testing.assert_close(kept.x, x, rtol=0, atol=1e-5)


def test_one_interpreter_can_run_several_precisions(tmp_path, monkeypatch) -> None:
    """`train` leaves nothing behind in the process that would bind the next run."""
    from stepdistill.commands.train import train as run

    monkeypatch.chdir(tmp_path)
    for name in ("fp32", "bf16", "fp32"):
        args = command("sim", f"{name}-{len(list(tmp_path.iterdir()))}", f"precision={name}")
        assert run(args[1], [*args[2:], "steps=1", "batch_size=2"]).joinpath("student").is_dir()
