"""What breaks under a run, on purpose: what its user reads, what is kept, what resuming does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepdistill.data.order import batch_positions
from stepdistill.run import checkpoint
from tests.children import Child, Done, losses, ranks, rows, stepdistill, weights
from tests.faults import FAULT

SMALL = "steps=6 batch_size=4 log.every_steps=1 log.tensorboard=false sample.every_steps=0".split()
SMALL += "eval.every_steps=0 checkpoint.every_steps=2 checkpoint.keep=9".split()


def command(method: str, run: object, *more: str) -> list[str]:
    return ["train", f"{method}-digits", f"run={run}", *SMALL, *more]


def broken(folder: Path, fault: str, method: str, run: object, *more: str) -> Done:
    """A run under a fault; whatever happens, no traceback shows."""
    done = stepdistill(*command(method, run, *more), folder=folder, env={FAULT: fault})
    assert "Traceback" not in done.err, done.err
    return done


def last_line(done: Done) -> str:
    """The line with which a run gave up."""
    assert done.code == 2, done
    assert "Traceback" not in done.err, done.err
    line = done.err.splitlines()[-1]
    assert line.startswith("stepdistill: ")
    return line.removeprefix("stepdistill: ")


def goes_on(folder: Path, whole: Path, run: str, *more: str) -> None:
    """Without the fault the run is resumed and ends as one that never broke."""
    done = stepdistill(*command("sim", run, "resume=auto", *more), folder=folder)
    assert done.code == 0, done
    assert weights(folder / run) == weights(whole)
    assert [row["step"] for row in rows(folder / run)] == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run in which nothing breaks."""
    assert stepdistill(*command("sim", "whole"), folder=folder).code == 0
    return folder / "whole"


# Numbers that are not finite ----------------------------------------------------------------------


def test_a_teacher_that_gives_nan_is_named(folder, whole) -> None:
    done = broken(folder, "teacher:3", "sim", "teacher")
    line = last_line(done)
    assert line.startswith("step 5: the student's gradient was not finite 3 updates in a row; its")
    assert line.endswith(
        "; the output of the teacher digits-dit is not finite: look at it, or at precision"
    )
    assert "step 3: skipped an update of the student: the output of the teacher" in done.err
    goes_on(folder, whole, "teacher", f"resume={folder}/teacher/checkpoints/step-0000002")


def test_one_bad_image_costs_one_update_and_is_said_once(folder) -> None:
    place = int(batch_positions(2, 16, 1797, 0)[3])
    done = broken(folder, f"image:{place}", "consistency", "image", "batch_size=16")
    assert done.code == 0
    said = [line for line in done.err.splitlines() if "skipped" in line]
    assert said == [
        "step 2: skipped an update of the student: the image of sample 3 of the batch is not "
        "finite: look at the data"
    ]
    log = rows(folder / "image")
    assert [row["skipped"] for row in log] == [0, 0, 1, 1, 1, 1]
    assert [row["skipped_share"] for row in log] == [0, 0, 1, 0, 0, 0]
    assert [row["losses"]["student/loss"] is None for row in log] == [
        row["step"] == 3 for row in log
    ]
    net = load_file(folder / "image" / "student" / "diffusion_pytorch_model.safetensors")
    assert all(value.isfinite().all() for value in net.values())


def test_a_pair_that_is_not_finite_is_refused_and_made_again(folder) -> None:
    args = command("reflow", "pair", "pairs.num=20", "pairs.steps=1", "pairs.shard=10")
    assert stepdistill("pairs", *args[1:], folder=folder).code == 0
    shard = folder / "pair" / "pairs" / "pairs-000001.safetensors"
    good = shard.read_bytes()
    with safe_open(shard, "pt") as file:
        meta = file.metadata()
    tensors = {name: value.clone() for name, value in load_file(shard).items()}
    tensors["x"][7] = torch.nan
    save_file(tensors, shard, metadata=meta)
    line = last_line(stepdistill(*args, folder=folder))
    assert line == (
        "pair/pairs/pairs-000001.safetensors: image 17 is not finite; remove the file and run "
        "`stepdistill pairs` again"
    )
    shard.unlink()
    assert stepdistill(*args, "resume=auto", folder=folder).code == 0
    assert shard.read_bytes() == good


def test_one_bad_gradient_is_skipped_and_three_stop_the_run(folder, whole) -> None:
    done = broken(folder, "gradient:2", "sim", "once")
    assert done.code == 0
    assert [row["skipped"] for row in rows(folder / "once")] == [0, 0, 1, 1, 1, 1]
    assert "step 2: skipped an update of the student: batch and teacher are finite" in done.err
    line = last_line(broken(folder, "gradients:3", "sim", "thrice"))
    assert line.startswith("step 5: the student's gradient was not finite 3 updates in a row; ")
    assert "Try a smaller optim.lr" in line
    assert checkpoint.found(folder / "thrice" / "checkpoints")[0].name == "step-0000004"
    assert len(rows(folder / "thrice")) == 5


def test_a_fake_score_that_explodes_stops_the_run_and_says_from_where_to_go_on(folder) -> None:
    more = ["steps=14", "health.rows=2"]
    line = last_line(broken(folder, "critic:7", "sim", "boom", *more))
    assert "over 100 times its lowest mean of 2 rows" in line
    assert "the fake score diverges since step 7." in line
    source = "boom/checkpoints/step-0000006"
    assert f"run=NEW resume={source}, with a smaller critic.lr" in line
    kept = weights_of(folder / source)
    args = command("sim", "calm", *more, f"resume={source}", "critic.lr=1e-4")
    done = stepdistill(*args, folder=folder)
    assert done.code == 0, done
    assert "resumed from step-0000006 with other settings of critic" in done.err
    assert rows(folder / "calm")[0]["step"] == 7 and weights_of(folder / source) == kept
    line = last_line(stepdistill(*args[:-1], "seed=3", "resume=auto", folder=folder))
    assert "was made with other settings: seed=0 (here 3)" in line  # only what tunes may change


def test_a_fake_score_that_explodes_may_be_let_run(folder) -> None:
    more = ["steps=12", "health.rows=2", "health.on_divergence=warn"]
    done = broken(folder, "critic:7", "sim", "let", *more)
    assert done.err.count("the fake score diverges since step 7.") == 1
    assert len(rows(folder / "let")) > 9


def weights_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def test_a_fake_score_that_lags_is_said_once(folder) -> None:
    more = ["steps=9", "batch_size=16", "critic.lr=1e-7", "health.rows=3"]
    done = stepdistill(*command("sim", "lags", *more), folder=folder)
    assert done.code == 0
    lines = [line for line in done.err.splitlines() if "student/lag" in line]
    assert len(lines) == 1 and "is below the healthy -" in lines[0]
    assert "raise critic_steps or critic.lr" in lines[0]
    quiet = stepdistill(*command("sim", "quiet", *more, "health.warn=false"), folder=folder)
    assert "student/lag" not in quiet.err and losses(folder / "quiet") == losses(folder / "lags")


# Disks --------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A disk of ``size`` bytes; without the right to mount one the test has nothing to stand on."""
    folder.mkdir()
    options = f"size={size // 4096 * 4096}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


CAN_MOUNT = os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"]).returncode == 0


def size_of(path: Path) -> int:
    """Bytes that a folder takes on a disk of whole pages."""
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in path.rglob("*") if file.is_file())


@contextmanager
def limited(folder: Path, size: int) -> Iterator[dict[str, str]]:
    """A folder whose disk is full after ``size`` bytes, or where no file may be so large."""
    if CAN_MOUNT:
        with small_disk(folder, size):
            yield {}
    else:
        folder.mkdir()
        yield {FAULT: "size:100000"}


def test_a_disk_that_is_full_at_a_checkpoint_keeps_the_one_before(folder, whole) -> None:
    one = size_of(whole / "checkpoints" / "step-0000004")
    disk = folder / "checkpoint-disk"
    with limited(disk, int(2.5 * one)) as env:
        done = stepdistill(*command("sim", "checkpoint-disk/run"), folder=folder, env=env)
        line = last_line(done)
        if CAN_MOUNT:
            assert line.startswith("checkpoint step-0000006 could not be written: No space left on")
            assert line.endswith("then resume=auto goes on from step-0000004")
            names = {path.name for path in (disk / "run" / "checkpoints").iterdir()}
            assert names == {"step-0000002", "step-0000004"}  # nothing half written
            assert all(checkpoint.problem(path, hashes=True) is None
                       for path in checkpoint.found(disk / "run" / "checkpoints"))  # fmt: skip
            subprocess.run(["mount", "-o", f"remount,size={9 * one}", disk], check=True)
            goes_on(folder, whole, "checkpoint-disk/run")
        else:
            assert "checkpoint step-0000002 could not be written: File too large" in line


def test_a_disk_that_is_full_at_the_student_keeps_the_last_checkpoint(folder, whole) -> None:
    if not CAN_MOUNT:
        return  # one limit for all files cannot pass a checkpoint and stop the smaller student
    room = size_of(whole / "checkpoints" / "step-0000006") + size_of(whole / "student") // 2
    disk = folder / "student-disk"
    with small_disk(disk, room + 40_000):
        args = ["student-disk/run", "checkpoint.every_steps=0"]
        line = last_line(stepdistill(*command("sim", *args), folder=folder))
        assert line.startswith("the student could not be written: No space left on device")
        assert line.endswith("then resume=auto goes on from step-0000006")
        assert not list((disk / "run").glob("*student*"))
        subprocess.run(["mount", "-o", f"remount,size={4 * room}", disk], check=True)
        goes_on(folder, whole, "student-disk/run", "checkpoint.every_steps=0")


def test_a_disk_that_is_full_at_a_row_keeps_whole_rows(folder, whole) -> None:
    disk = folder / "log-disk"
    with limited(disk, 5 * size_of(whole)):
        fault = "fill:3" if CAN_MOUNT else "size:1500"
        line = last_line(broken(folder, fault, "sim", "log-disk/run", "checkpoint.every_steps=0"))
        text = (disk / "run" / "log.jsonl").read_text()
        assert text.endswith("}\n") and all(json.loads(line) for line in text.splitlines())
        if CAN_MOUNT:  # rows fit into the page that the log has, so it may be the checkpoint
            assert "could not be written: No space left on device" in line
            (disk / "run" / "filler").unlink()
            goes_on(folder, whole, "log-disk/run", "checkpoint.every_steps=0")
        else:
            assert line.startswith("log.jsonl could not be written: File too large")


def test_rows_that_do_not_fit_leave_the_log_as_it_was(tmp_path, monkeypatch) -> None:
    """Half a row was taken by the disk, then no more."""
    from stepdistill.run.log import Log

    log = Log(tmp_path, tensorboard=False)
    log.row(1, {"losses": {"a": 1.0}})
    before, handle = log.path.read_bytes(), log._handle

    class Full:
        fileno, truncate = handle.fileno, handle.truncate

        def write(self, line: bytes) -> int:
            if len(line) < 20:
                raise OSError(28, os.strerror(28))
            return handle.write(line[: len(line) // 2])

    monkeypatch.setattr(log, "_handle", Full())
    with pytest.raises(OSError, match="No space left on device: .*log.jsonl"):
        log.row(2, {"losses": {"a": 2.0}})
    assert log.path.read_bytes() == before
    handle.close()


def test_a_run_folder_that_takes_no_files_is_one_line(folder) -> None:
    disk = folder / "fixed"
    if CAN_MOUNT:
        with small_disk(disk, 1 << 20):
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            done = stepdistill(*command("sim", "fixed/run"), folder=folder)
            assert not list(disk.iterdir())
    else:
        disk.mkdir(mode=0o555)
        done = stepdistill(*command("sim", "fixed/run"), folder=folder)
    assert last_line(done).startswith("run=fixed/run could not be written: ")
    assert "see that the disk has room and can be written to, then start again" in done.err


# Checkpoints --------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_damaged_checkpoints_are_named_and_the_next_one_is_taken(folder, whole) -> None:
    run = folder / "damaged"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "student")
    flip(run / "checkpoints" / "step-0000006" / "critic.safetensors")
    short = run / "checkpoints" / "step-0000004" / "student.safetensors"
    short.write_bytes(short.read_bytes()[:-1])
    done = stepdistill(*command("sim", "damaged", "resume=auto"), folder=folder)
    assert done.code == 0
    first, second, third = done.err.splitlines()[:3]
    assert first == (
        "passed over checkpoint step-0000006: critic.safetensors is damaged: its content is not "
        "what was written"
    )
    assert second.startswith("passed over checkpoint step-0000004: student.safetensors has ")
    assert third.startswith("removed checkpoint") or third == "resumed from step-0000002"
    assert weights(run) == weights(whole)


def test_another_network_than_the_checkpoint_s_is_one_line(folder, root) -> None:
    assets, teacher = root / "stepdistill" / "assets", folder / "teacher-folder"
    shutil.copytree(assets / "digits-dit", teacher)
    args = command("sim", "moved", "teacher=teacher-folder")
    assert stepdistill(*args, "steps=2", folder=folder).code == 0
    shutil.rmtree(teacher)
    shutil.copytree(assets / "digits-unet", teacher)
    line = last_line(stepdistill(*args, "resume=auto", folder=folder))
    assert line.startswith("the student of the checkpoint is another network than the teacher is ")
    assert line.endswith("set teacher back to what it was, or start a new run")
    line = last_line(stepdistill("export", "moved", "--out", "x", folder=folder))
    assert line.startswith("moved/student is another network than teacher=teacher-folder is now: ")


@pytest.mark.parametrize(
    ("numbers", "code"),
    [((signal.SIGTERM,), 143), ((signal.SIGINT,), 130), ((signal.SIGINT, signal.SIGTERM), 130)],
    ids=["term", "int", "both"],
)
def test_signals_while_saving_wait_for_the_save(folder, whole, numbers, code) -> None:
    name = "signals-" + "-".join(map(str, map(int, numbers)))
    child = Child(
        command("sim", f"{name}/run", "checkpoint.every_steps=3"), folder, {FAULT: "slow:0.3"}
    )
    marker = folder / "saving"
    child.when(marker.exists)
    for number in numbers:
        child.signal(number)
    done = child.wait()
    marker.unlink()
    assert done.code == code and "the state was saved" in done.err.splitlines()[-1]
    (saved,) = checkpoint.found(folder / name / "run" / "checkpoints")
    assert saved.name == "step-0000003" and checkpoint.problem(saved, hashes=True) is None
    goes_on(folder, whole, f"{name}/run", "checkpoint.every_steps=3")


# Two processes ------------------------------------------------------------------------------------


TWO: dict[str, tuple[str, Callable[[str], bool]]] = {
    "refuse:2": ("resume=never", lambda line: line.startswith("checkpoint step-0000002 could not")),
    "teacher:1": ("resume=never", lambda line: "the output of the teacher digits-dit is" in line),
}


@pytest.mark.parametrize("fault", TWO)
def test_where_one_process_fails_all_end(folder, fault) -> None:
    more, expected = TWO[fault]
    run = f"two-{fault.partition(':')[0]}"
    children = ranks(command("sim", run, more), folder, fault=fault)
    done = [child.wait(60) for child in children]
    assert expected(last_line(done[0])), done
    last_line(done[1])
    if fault.startswith("refuse"):
        other = "another process of the job could not go on; its own line tells why"
        assert last_line(done[1]) == other
    assert not (folder / run / "student").exists()
