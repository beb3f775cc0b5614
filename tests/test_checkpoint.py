"""Checkpoints are whole or passed over; logs survive a cut."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from stepdistill.run import checkpoint
from stepdistill.run.checkpoint import MARK, STATE
from stepdistill.run.errors import UserError
from stepdistill.run.log import Log, Meter
from tests.children import CONTEXT

PARTS = {
    "student": {"net.w": torch.arange(6.0).reshape(2, 3), "optim.0.step": torch.tensor(3.0)},
    "critic": {"net.w": torch.full((4,), 0.1, dtype=torch.float64)},
}
META = {"updates": {"student": 3}, "best": {}, "config": {"seed": 1}}


def save(folder: Path, step: int) -> Path:
    return checkpoint.save(folder, step, PARTS, META)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def damage(path: Path) -> None:
    """Change the content, not the size."""
    path.write_bytes(b"\xff" * path.stat().st_size)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path) -> None:
    path = save(tmp_path / "checkpoints", 12)
    assert path == tmp_path / "checkpoints" / "step-0000012"
    listed = {"critic.safetensors", "student.safetensors", STATE}
    assert {file.name for file in path.iterdir()} == listed | {MARK}
    mark = json.loads((path / MARK).read_text())
    assert mark == {
        name: {
            "bytes": (path / name).stat().st_size,
            "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest(),
        }
        for name in listed
    }
    saved = checkpoint.load(path)
    assert saved.step == 12
    assert {key: saved.meta[key] for key in META} == META
    assert saved.tensors.keys() == PARTS.keys()
    for part, tensors in PARTS.items():
        assert saved.tensors[part].keys() == tensors.keys()
        for name, value in tensors.items():
            got = saved.tensors[part][name]
            assert got.dtype == value.dtype and torch.equal(got, value)


def test_what_cannot_be_written_leaves_nothing(tmp_path) -> None:
    good = save(tmp_path, 1)
    before = (good / "student.safetensors").read_bytes()
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 2, PARTS, {"best": object()})
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 1, PARTS, {"best": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]
    assert checkpoint.problem(good) is None
    assert (good / "student.safetensors").read_bytes() == before


TORN = {
    "no mark": (lambda p: (p / MARK).unlink(), f"it has no {MARK}: its writing was cut short"),
    "empty mark": (lambda p: (p / MARK).write_text(""), f"its {MARK} is damaged"),
    "half a mark": (lambda p: truncate(p / MARK), f"its {MARK} is damaged"),
    "a mark of bytes": (lambda p: damage(p / MARK), f"its {MARK} is damaged"),
    "a mark that lists nothing": (lambda p: (p / MARK).write_text("{}"), f"its {MARK} is damaged"),
    "a mark that is a list": (lambda p: (p / MARK).write_text("[1]"), f"its {MARK} is damaged"),
    "short weights": (
        lambda p: truncate(p / "student.safetensors"),
        "student.safetensors has {size} bytes instead of {whole}",
    ),
    "no weights": (lambda p: (p / "critic.safetensors").unlink(), "critic.safetensors is missing"),
    "no state": (lambda p: (p / STATE).unlink(), f"{STATE} is missing"),
    "a file": (lambda p: (checkpoint.remove(p), p.write_text("")), "no such folder"),
}


@pytest.mark.parametrize("case", TORN)
def test_torn_ones_are_named_and_passed_over(tmp_path, case) -> None:
    good, torn = save(tmp_path, 4), save(tmp_path, 8)
    weights = torn / "student.safetensors"
    whole = weights.stat().st_size
    tear, why = TORN[case]
    tear(torn)
    why = why.format(size=whole - 8, whole=whole)
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == good
    assert said == [f"passed over checkpoint step-0000008: {why}"]
    with pytest.raises(UserError) as caught:
        checkpoint.load(torn)
    assert str(caught.value).startswith(f"checkpoint {torn}: {why}; resume=auto")
    if torn.is_dir():
        assert checkpoint.problem(save(tmp_path, 8)) is None  # made again over the torn one


def test_the_newest_of_none(tmp_path) -> None:
    said: list[str] = []
    assert checkpoint.newest(tmp_path / "nothing", said.append) is None
    assert checkpoint.found(tmp_path / "nothing") == []
    (save(tmp_path, 1) / MARK).unlink()
    assert checkpoint.newest(tmp_path, said.append) is None
    assert len(said) == 1


@pytest.mark.parametrize("name", ["student.safetensors", STATE])
def test_damage_that_keeps_the_size_is_passed_over_too(tmp_path, name) -> None:
    """One bit among the weights loads without a word; its hash tells."""
    good, path = save(tmp_path, 1), save(tmp_path, 2)
    content = bytearray((path / name).read_bytes())
    content[-3] ^= 1
    (path / name).write_bytes(content)
    assert checkpoint.problem(path) is None  # by sizes alone
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == good
    why = f"{name} is damaged: its content is not what was written"
    assert said == [f"passed over checkpoint step-0000002: {why}"]
    with pytest.raises(UserError, match=f"checkpoint {path}: {why}; resume=auto takes"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["student.safetensors", STATE])
def test_marks_without_hashes_still_load(tmp_path, name) -> None:
    """As earlier versions wrote them; damage that cannot be read is one line there too."""
    path = save(tmp_path, 1)
    sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.name != MARK}
    (path / MARK).write_text(json.dumps(sizes))
    assert checkpoint.newest(tmp_path, print) == path
    assert checkpoint.load(path).step == 1
    damage(path / name)
    with pytest.raises(UserError, match=f"checkpoint {path}: damaged: ") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_not_there(tmp_path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder; resume=auto takes"):
        checkpoint.load(tmp_path / "nowhere")


def test_prune_keeps_the_newest_and_the_best(tmp_path) -> None:
    for step in (1, 2, 3, 4, 5, 10):
        save(tmp_path, step)
    truncate(tmp_path / "step-0000005" / STATE)
    left = tmp_path / ".step-0000003.abcd.part"
    left.mkdir()
    (left / "student.safetensors").write_text("")
    checkpoint.prune(tmp_path, 2, "step-0000002")
    kept = [path.name for path in checkpoint.found(tmp_path)]
    assert kept == [f"step-{step:07d}" for step in (10, 5, 4, 2)]  # the torn one counts for nothing
    assert not left.exists()
    checkpoint.prune(tmp_path, 1, None)
    kept = [path.name for path in checkpoint.found(tmp_path)]
    assert kept == ["step-0000010", "step-0000005"]


def test_going_back_removes_what_is_later(tmp_path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    said: list[str] = []
    checkpoint.drop_after(tmp_path, 2, said.append)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-0000002", "step-0000001"]
    assert said == ["removed checkpoint step-0000003: the run goes on from step 2"]


def _save_for_ever(folder: str) -> None:
    big = {"student": {"w": torch.zeros(300_000)}}
    for step in range(1, 10**6):
        checkpoint.save(Path(folder), step % 3, big, META)
        checkpoint.prune(Path(folder), 2, None)


def test_killed_while_saving_the_newest_one_is_whole(tmp_path) -> None:
    """Whatever the moment, resuming finds a complete checkpoint that loads."""
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        child = CONTEXT.Process(target=_save_for_ever, args=(str(folder),))
        child.start()
        while len(checkpoint.found(folder)) < 2:
            assert child.is_alive()
            time.sleep(0.001)
        time.sleep(0.013 * attempt)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        newest = checkpoint.newest(folder, lambda _: None)
        assert newest is not None
        assert checkpoint.load(newest).tensors["student"]["w"].shape == (300_000,)
        save(folder, 9)
        checkpoint.prune(folder, 1, None)
        names = {path.name for path in folder.iterdir()}
        assert {name for name in names if name.startswith(".")} == set()


# The log ------------------------------------------------------------------------------------------


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_log_goes_on_where_the_checkpoint_was(tmp_path) -> None:
    log = Log(tmp_path, tensorboard=False)
    for step in (1, 2, 3, 4):
        log.row(step, {"losses": {"loss": step / 2}})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "seconds": 9.1, "los')
    seconds = [json.loads(line)["seconds"] for line in _lines(tmp_path)[:4]]
    again = Log(tmp_path, step=3, tensorboard=False)
    assert again.seconds == seconds[2]
    assert again.clock() >= seconds[2]
    again.row(4, {"losses": {"loss": 7.0}})
    again.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert rows(tmp_path)[3]["losses"] == {"loss": 7.0}
    assert rows(tmp_path)[3]["seconds"] >= seconds[2]


def _lines(folder: Path) -> list[str]:
    return (folder / "log.jsonl").read_text().splitlines()


def test_rows_are_strict_json(tmp_path) -> None:
    log = Log(tmp_path)
    nan, inf = float("nan"), float("inf")
    log.row(1, {"losses": {"a": nan, "b": inf, "c": 0.5}, "skipped": 1})
    log.close()
    (line,) = _lines(tmp_path)
    assert "NaN" not in line and "Infinity" not in line
    row = json.loads(line)
    assert row["losses"] == {"a": None, "b": None, "c": 0.5}
    assert (row["step"], row["skipped"]) == (1, 1)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_meter_gives_means_and_starts_over() -> None:
    meter = Meter()
    assert meter.means()[0] == []
    meter.add({"a": torch.tensor(1.0), "b": torch.tensor(4.0)})
    meter.add({"a": torch.tensor(2.0)})
    names, values = meter.means()
    assert dict(zip(names, values.tolist(), strict=True)) == {"a": 1.5, "b": 4.0}
    assert meter.means()[0] == []
