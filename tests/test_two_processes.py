"""Two processes with one global batch train as one does, and survive being killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stepdistill.commands.read import read_config
from stepdistill.run import checkpoint
from stepdistill.run.assets import load_teacher
from tests import recipes
from tests.children import ALONE, ByMethod, Done, losses, ranks, rows, stepdistill, weights
from tests.golden import smooth
from tests.recipes import KINDS

KILLS = {  # in this order in one job: boundary -> whether both die there, or the first alone
    "shard:2": True,  # whichever takes it
    "turn:1": True,
    "files:2": False,
    "phase": True,
    "turn:4": False,
    "mark:6": True,
}


def command(method: str, run: str, *more: str) -> list[str]:
    """A short run on batches that are large enough for the means of two halves.

    Smooth, so that the sums of two halves, which round otherwise than one sum, stay near it.
    """
    calm = [f"{key}={json.dumps(value)}" for key, value in smooth(method).items()]
    return recipes.command(method, run, "batch_size=64", *calm, "optim.lr=2e-4", *more)


def job(folder: Path, method: str, run: str, *more: str) -> list[Done]:
    """Train in two processes to the end."""
    return [child.wait() for child in ranks(command(method, run, *more), folder)]


def launch(folder: Path, launcher: list[str], *args: str) -> subprocess.CompletedProcess[str]:
    """A job by one of the launchers that users have, in fresh interpreters."""
    env = {**os.environ, **ALONE, "ACCELERATE_USE_CPU": "1"}
    command = [str(Path(sys.executable).with_name(launcher[0])), *launcher[1:], *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def pair(folder: Path) -> ByMethod[Path]:
    """An uninterrupted run of each method in two processes."""

    def make(method: str) -> Path:
        done = job(folder, method, f"two-{method}")
        assert [one.code for one in done] == [0, 0], done
        assert done[1].err == ""  # one of them talks
        return folder / f"two-{method}"

    return ByMethod(make)


def same_curve(a: Path, b: Path) -> None:
    """The same losses at every step, to 1e-5 (relative where they are above 1).

    What is divided by a small gap, or is a norm of gradients, shows ten times as much, and a share
    of saturated entries moves by whole entries.
    """
    slack = {"saturation": 1e-3, "grad_norm": 1e-4, "direction": 1e-4, "lag": 1e-4}
    first, second = losses(a), losses(b)
    assert len(first) == len(second) == 6
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            near = slack.get(name.rpartition("/")[2], 1e-5)
            close = pytest.approx(value, rel=near, abs=near)
            assert two[name] == close, name


@pytest.mark.parametrize("method", KINDS)
def test_two_processes_have_the_curve_of_one(folder, pair, method) -> None:
    assert stepdistill(*command(method, f"one-{method}"), folder=folder).code == 0
    same_curve(folder / f"one-{method}", pair[method])
    one, two = rows(folder / f"one-{method}"), rows(pair[method])
    assert [row["step"] for row in one] == [row["step"] for row in two]
    entries = {path.name for path in pair[method].iterdir()}
    assert entries == {path.name for path in (folder / f"one-{method}").iterdir()}
    stores = [run / "pairs" for run in (pair[method], folder / f"one-{method}")]
    made = [{path.name: path.read_bytes() for path in store.glob("*")} for store in stores]
    assert made[0] == made[1]  # by the two together


def test_no_step_is_taken_on_rounding(pair) -> None:
    """At first the two scores are one and SIM's gradient is zero; Adam must not blow up its error,
    which is another for another number of processes."""
    assert losses(pair["sim"])[0]["student/grad_norm"] == 0.0
    assert losses(pair["sim"])[1]["student/grad_norm"] > 0.1


def test_the_halves_are_not_the_same_half(folder, pair) -> None:
    """The comparison sees it when both processes train on the first half of the batch."""
    halves = command("consistency", "half", "batch_size=32")
    assert stepdistill(*halves, folder=folder).code == 0
    with pytest.raises(AssertionError):
        same_curve(folder / "half", pair["consistency"])


def changes_players(run: Path) -> bool:
    """Whether other players train later in a run than at its start."""
    cls, config = read_config(str(run / "config.yaml"))
    if not config.teacher:
        return False
    made, held = cls(config, load_teacher(config.teacher)), []
    for step in range(config.steps):
        made.prepare(step)
        held.append(set(made.players))
    return any(players != held[0] for players in held)


def boundaries_of(run: Path) -> list[str]:
    """Those that a method comes to: with other players in time, or with pairs, it has more."""
    others = changes_players(run)
    return [
        name
        for name in KILLS
        if (others or name != "phase")
        and ((run / "pairs").exists() or not name.startswith("shard"))
    ]


@pytest.mark.parametrize("method", KINDS)
def test_a_job_killed_at_every_boundary_and_resumed_ends_the_same(folder, pair, method) -> None:
    """Both processes die at once, or the first alone and then, by the launcher, the other; what
    the job ends with is the uninterrupted one's, to the bit."""
    run = f"killed-{method}"
    for boundary in boundaries_of(pair[method]):
        kill = dict.fromkeys((0, 1) if KILLS[boundary] else (0,), boundary)
        first, second = ranks(command(method, run, "resume=auto"), folder, kill=kill)
        codes = [first.wait().code]
        second.process.kill()
        codes.append(second.wait(10).code)
        assert -signal.SIGKILL in codes and 0 not in codes, boundary
        assert KILLS[boundary] or codes[0] == -signal.SIGKILL, boundary
        assert not (folder / run / "student").exists()
    done = job(folder, method, run, "resume=auto")
    assert [one.code for one in done] == [0, 0], done
    assert weights(folder / run) == weights(pair[method])
    assert losses(folder / run) == losses(pair[method])
    for part in ("checkpoints/step-0000006/*.safetensors", "pairs/*"):
        ours, theirs = (sorted(where.glob(part)) for where in (folder / run, pair[method]))
        assert [path.name for path in ours] == [path.name for path in theirs]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, theirs, strict=True))


def test_a_signal_to_all_saves_once_and_resumes(folder, pair) -> None:
    run = "signal"
    args = command("sim", run, "checkpoint.every_steps=0")
    children = ranks(args, folder, fault="signal:3")
    children[0].when(lambda: len(rows(folder / run)) >= 2)
    for child in children:
        child.signal(signal.SIGTERM)
    assert [child.wait().code for child in children] == [143, 143]
    (saved,) = checkpoint.found(folder / run / "checkpoints")
    assert checkpoint.problem(saved) is None
    done = job(folder, "sim", run, "checkpoint.every_steps=0", "resume=auto")
    assert [one.code for one in done] == [0, 0]
    assert weights(folder / run) == weights(pair["sim"])


def test_a_signal_to_one_stops_all(folder) -> None:
    args = command("dmd", "one-told", "checkpoint.every_steps=0")
    children = ranks(args, folder, fault="signal:3")
    children[0].when(lambda: len(rows(folder / "one-told")) >= 2)
    children[1].signal(signal.SIGTERM)
    assert [child.wait().code for child in children] == [143, 143]
    assert len(checkpoint.found(folder / "one-told" / "checkpoints")) == 1


def test_figures_pictures_and_the_best_checkpoint(folder) -> None:
    """Drawn by one process while the other waits."""
    looks = "sample.every_steps=3 sample.num=4 sample.teacher_steps=2 eval.every_steps=3".split()
    done = job(folder, "consistency", "looks", *looks, "eval.num=65")
    assert [one.code for one in done] == [0, 0], done
    assert len(list((folder / "looks" / "samples").iterdir())) == 2
    assert len([row for row in rows(folder / "looks") if "eval" in row]) == 2


def test_a_batch_that_cannot_be_shared(folder) -> None:
    for done in job(folder, "sim", "odd", "batch_size=7"):
        assert done.code == 2
        (line,) = done.err.splitlines()
        assert "batch_size=7 does not divide among 2 processes; make it a multiple of 2" in line
    assert not (folder / "odd").exists()


# By the launchers themselves ----------------------------------------------------------------------


def test_torchrun(folder, pair) -> None:
    """As users start it, and with the words of one process."""
    run = "torchrun"
    launcher = ["torchrun", "--nproc_per_node", "2", "-m", "stepdistill"]
    done = launch(folder, launcher, *command("phased_dmd", run))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run}\n"
    assert "Warning" not in done.stderr
    assert weights(folder / run) == weights(pair["phased_dmd"])


def test_no_thread_of_the_process_group_outlives_the_run(folder) -> None:
    """One that is still at work when the interpreter ends aborts a run that had succeeded."""
    (folder / "leave.py").write_text(
        "import atexit, os, pathlib\n"
        "from stepdistill.cli import main\n"
        "def threads():\n"
        "    tasks = pathlib.Path('/proc/self/task').iterdir()\n"
        "    names = sorted((task / 'comm').read_text().strip() for task in tasks)\n"
        "    pathlib.Path('threads-' + os.environ['RANK']).write_text(' '.join(names))\n"
        "atexit.register(threads)\n"
        "main()\n"
    )
    launcher = ["torchrun", "--nproc_per_node", "2", "leave.py"]
    done = launch(folder, launcher, *command("phased_dmd", "left"))
    assert done.returncode == 0, done.stderr
    left = [(folder / f"threads-{rank}").read_text() for rank in range(2)]
    assert all("python" in names and "gloo" not in names for names in left)


def test_accelerate_launch(folder) -> None:
    launcher = ["accelerate", "launch", "--cpu", "-m", "stepdistill"]
    done = launch(folder, launcher, *command("consistency", "launched"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^launched$", done.stdout, re.MULTILINE)
    if not (folder / "one-consistency").exists():
        stepdistill(*command("consistency", "one-consistency"), folder=folder)
    assert weights(folder / "launched") == weights(folder / "one-consistency")


@pytest.mark.parametrize(("value", "cpu"), [("1", True), ("true", True), ("False", False)])
def test_the_launchers_word_on_the_cpu_is_read_as_it_means_it(monkeypatch, value, cpu) -> None:
    """`accelerate launch` sets ACCELERATE_USE_CPU=False on a machine with a GPU."""
    from stepdistill.run import ranks as module

    asked: list[bool] = []

    class Recorder:
        process_index, num_processes, device = 0, 1, None

        def __init__(self, *, cpu: bool, **_: object) -> None:
            asked.append(cpu)

    monkeypatch.setattr(module, "Accelerator", Recorder)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    module.Processes()
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    module.Processes()
    module.Processes(device="cpu")
    assert asked == [cpu, False, True]


@pytest.fixture(autouse=True, scope="module")
def _clean(folder: Path) -> None:
    yield
    shutil.rmtree(folder)
