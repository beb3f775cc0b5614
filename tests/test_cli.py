"""The command line: exit codes, one line for a user's mistake, and nothing overwritten."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from stepdistill.cli import guarded
from stepdistill.commands.read import read_config
from stepdistill.run.assets import TEACHERS
from stepdistill.run.config import CONFIGS
from stepdistill.run.errors import CheckFailed, Stopped, UserError
from stepdistill.trainers.find import methods
from tests.children import Done, stepdistill

SMALL = "steps=1 batch_size=4 log.tensorboard=false sample.every_steps=0 eval.every_steps=0".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, a taken one, and things that are no runs."""
    base = tmp_path_factory.mktemp("cli")
    done = stepdistill("train", "sim-digits", "run=finished", *SMALL, folder=base)
    assert (done.code, done.out) == (0, "finished\n")
    (base / "empty").mkdir()
    (base / "taken").mkdir()
    (base / "taken" / "thesis.txt").write_text("mine")
    (base / "unfinished").mkdir()
    shutil.copy(base / "finished" / "config.yaml", base / "unfinished")
    (base / "broken.yaml").write_text("method: sim\noptim: [1\n")
    (base / "old").mkdir()
    shutil.copy(base / "finished" / "log.jsonl", base / "old")
    return base


def mistake(done: Done) -> str:
    """The one line of an ended command that was used wrongly."""
    assert done.code == 2, done
    assert done.out == "" and done.err.endswith("\n")
    (line,) = done.err.splitlines()
    assert line.startswith("stepdistill: ")
    return line.removeprefix("stepdistill: ")


TRAIN = ["train", "sim-digits", *SMALL]
MISTAKES = [
    # the command itself
    (["trian"], r"No such command 'trian'. Did you mean 'train'\?; see `stepdistill --help`"),
    (["train"], r"Missing argument .*; see `stepdistill train --help`"),
    (["export", "finished"], r"Missing option '--out'; see `stepdistill export --help`"),
    (["eval", "digits-dit", "--num", "1"], r"Invalid value for '--num': .*greater than or equal"),
    (["train", "sim-digits", "--fast"], r"No such option: --fast"),
    # configs
    (["train", "sim-digit"], r"config sim-digit: no such file; did you mean sim-digits\?"),
    (["train", "broken.yaml"], r"broken.yaml:3: not YAML: "),
    (
        [*TRAIN, "optim.lrr=1"],
        r"override optim.lrr=1: unknown key optim.lrr; did you mean optim.lr",
    ),
    ([*TRAIN, "batch_size=0"], r"override batch_size=0: batch_size=0: input should be greater"),
    ([*TRAIN, "method=simm"], r"method 'simm' is unknown; did you mean sim\?"),
    ([*TRAIN, "eval.steps=3"], r"eval.steps=3: this student samples in 1 steps"),
    ([*TRAIN, "eval.every_steps=1", "eval.features=dino"], r"unknown features dino; known: "),
    ([*TRAIN, "device=gpu"], r"override device=gpu: device='gpu': input should be 'auto', 'cpu'"),
    # teachers, data, runs
    ([*TRAIN, "teacher=nowhere"], r"teacher=nowhere: no such folder; give .* digits-dit"),
    ([*TRAIN, "teacher=./nowhere"], r"teacher=./nowhere: no such folder"),
    ([*TRAIN, "teacher=some/where"], r"teacher=some/where: .*\(shipped teachers: digits-dit"),
    ([*TRAIN, "teacher=empty"], r"teacher=empty: .*no model_index.json"),
    ([*TRAIN, "run=finished"], r"run=finished already holds a run; resume=auto continues it, or"),
    ([*TRAIN, "run=old"], r"run=old already holds a run; resume=auto continues it, or"),
    ([*TRAIN, "run=new", "resume=nowhere"], r"checkpoint nowhere: no such folder; resume=auto"),
    (["train", "consistency-digits", *SMALL, "data.source=nowhere"], r"data.source=nowhere is nei"),
    (["train", "teacher-digits-dit", *SMALL], r".*without a teacher; use `stepdistill teacher`"),
    (["teacher", "sim-digits"], r"sim-digits: a teacher's method is denoising, not sim"),
    (["pairs", "sim-digits"], r"sim-digits: the method sim uses no pairs; reflow does"),
    # what is made of runs
    (["export", "nowhere", "--out", "x"], r"nowhere: no config.yaml, so this is no run"),
    (["export", "unfinished", "--out", "x"], r"unfinished: the run is not finished"),
    (["export", "finished", "--out", "taken"], r"taken exists; choose another folder"),
    (["export", "finished", "--out", "taken", "--overwrite"], r"taken is no pipeline folder"),
    (["export", "finished", "--out", "x", "--steps", "3"], r"steps=3: this student samples in 1"),
    (["sample", "nowhere", "--out", "x"], r"nowhere: no such folder; give a pipeline's folder"),
    (["sample", "empty", "--out", "x"], r"empty has no model_index.json"),
    (["eval", "nowhere"], r"nowhere: no such folder"),
    (["eval", "digits-dit", "--steps", "1,x"], r"--steps 1,x: write numbers with commas"),
    (["eval", "digits-dit", "--steps", "0"], r"--steps 0: steps are 1 or more"),
    (["eval", "digits-dit", "--metrics", "fid2"], r"--metrics fid2: known are fd, "),
    (["eval", "digits-dit", "--reference", "nowhere"], r"data.source=nowhere is neither"),
    (["schema", "simm"], r"method 'simm' is unknown; did you mean sim\?"),
    (["bench", "stop"], r"No such command .stop."),
    (
        ["bench", "students", "--config", "simm-digits"],
        r"--config simm-digits: .*did you mean sim-digits",
    ),
    (["demo", "--method", "simm"], r"--method simm: the demo has sim, "),
]


@pytest.mark.parametrize(("args", "line"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_line_and_code_2_and_changes_nothing(folder, args, line) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*") if path.is_file()}
    assert re.match(line, mistake(stepdistill(*args, folder=folder)))
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*") if path.is_file()}
    assert after == before


def test_help_and_version(folder) -> None:
    for args in ([], ["--help"], ["train", "--help"]):
        done = stepdistill(*args, folder=folder)
        assert (done.code, done.err) == (0, "")
        assert "Usage: stepdistill" in done.out
    assert re.fullmatch(r"stepdistill \d+\.\d+\.\d+\n", stepdistill("--version", folder=folder).out)


def test_the_module_is_the_command(folder) -> None:
    """In fresh interpreters, as users start them."""
    script = Path(sys.executable).with_name("stepdistill")
    for command in ([sys.executable, "-m", "stepdistill"], [str(script)]):
        done = subprocess.run([*command, "schema", "nope"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("stepdistill: method 'nope' is unknown; known are ")
        assert len(done.stderr.splitlines()) == 1


def test_exit_codes(capsys) -> None:
    def raising(error: BaseException) -> int:
        def call() -> None:
            raise error

        return guarded(call)

    assert guarded(lambda: None) == 0
    assert guarded(lambda: 1) == 1
    assert raising(CheckFailed("too\n  far")) == 1
    assert raising(UserError("no")) == 2
    assert raising(Stopped(signal.SIGINT)) == 130
    assert raising(Stopped(signal.SIGTERM)) == 143
    assert raising(KeyboardInterrupt()) == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["stepdistill: too far", "stepdistill: no"]
    assert [line.split(" by ")[1].split(";")[0] for line in lines[2:]] == ["SIGINT", "SIGTERM"]
    with pytest.raises(ZeroDivisionError):  # a fault of the program keeps its traceback
        guarded(lambda: 1 // 0)


def test_methods_and_schema(folder) -> None:
    done = stepdistill("methods", folder=folder)
    assert done.code == 0
    for method in methods():
        assert re.search(rf"^{method.name} +{method.family} +\w", done.out, re.MULTILINE)
        made = json.loads(stepdistill("schema", method.name, folder=folder).out)
        assert {"run", "steps", "optim", "extends"} <= set(made["properties"])
    for path in CONFIGS.glob("*.yaml"):
        method = read_config(path.stem)[1].method
        assert re.search(rf"^{path.stem} +{method} +\S", done.out, re.MULTILINE), path.stem


def test_doctor(folder) -> None:
    done = stepdistill("doctor", folder=folder)
    assert (done.code, done.err) == (0, "")
    for word in ("python", "torch", "diffusers", "device", "xformers", *TEACHERS, "parameters"):
        assert word in done.out
    for method in methods():
        assert re.search(rf"{method.name} .* \d \(\w+", done.out)  # networks held


def test_sample_writes_images_and_keeps_what_is_there(folder) -> None:
    args = ["sample", "digits-dit", "--steps", "2", "--num", "3", "--out", "images"]
    done = stepdistill(*args, "--batch-size", "2", folder=folder)
    assert (done.code, done.out) == (0, "images: 3 images, 2 steps, seed 0\n")
    images = folder / "images"
    names = ["000000.png", "000001.png", "000002.png", "grid.png"]
    assert sorted(path.name for path in images.iterdir()) == names
    assert Image.open(images / names[0]).size == (8, 8)
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    line = mistake(stepdistill(*args, "--seed", "1", folder=folder))
    assert line == "images/grid.png exists; choose another folder or pass --overwrite"
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before
    assert stepdistill(*args, "--seed", "1", "--overwrite", folder=folder).code == 0
    assert (images / names[0]).read_bytes() != before[names[0]]
    assert stepdistill(*args, "--overwrite", folder=folder).code == 0
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before


@pytest.mark.parametrize("spelling", ["stranger", "./stranger", "stranger/", "../{}/stranger"])
def test_code_in_a_folder_runs_only_when_it_is_trusted(folder, root, spelling) -> None:
    """However its path is written."""
    stranger = folder / "stranger"
    if not stranger.exists():
        shutil.copytree(root / "stepdistill" / "assets" / "digits-dit", stranger)
        code = stranger / "pipeline.py"
        code.write_text(f"open({str(folder / 'ran')!r}, 'w')\n{code.read_text()}")
    path = spelling.format(folder.name)
    for command in (["sample", path, "--out", "new"], ["eval", path, "--num", "4"]):
        assert "trust_remote_code" in mistake(stepdistill(*command, folder=folder))
    assert not (folder / "ran").exists()


def test_eval_writes_rows_and_keeps_what_is_there(folder) -> None:
    args = ["eval", "digits-dit", "--steps", "1,2", "--num", "40", "--json", "rows/a.json"]
    done = stepdistill(*args, folder=folder)
    assert done.code == 0, done
    rows = json.loads((folder / "rows" / "a.json").read_text())
    assert [(row["model"], row["steps"], row["num"]) for row in rows] == [
        ("digits-dit", 1, 40),
        ("digits-dit", 2, 40),
    ]
    assert all(row["fd"] > 0 and row["kid"] is not None and row["diversity"] > 0 for row in rows)
    assert mistake(stepdistill(*args, folder=folder)).startswith("rows/a.json exists; choose")
    assert json.loads((folder / "rows" / "a.json").read_text()) == rows
    assert stepdistill(*args, "--overwrite", folder=folder).code == 0
    again = json.loads((folder / "rows" / "a.json").read_text())
    assert [row["fd"] for row in again] == [row["fd"] for row in rows]


def test_a_student_from_run_to_images_and_figures(folder) -> None:
    done = stepdistill("export", "finished", "--out", "student", folder=folder)
    assert done.code == 0 and re.fullmatch(
        r"student: loads in plain diffusers; largest difference [0-9.e-]+\n", done.out
    )
    assert (folder / "student" / "model_index.json").is_file()
    line = mistake(stepdistill("export", "finished", "--out", "student", folder=folder))
    assert line.startswith("student exists; ")
    few = ["--num", "20", "--trust-remote-code"]
    args = ["sample", "student", "--out", "y", *few]
    line = mistake(stepdistill(*args, "--steps", "4", folder=folder))
    assert "steps=4" in line  # this student has one step only
    done = stepdistill(*args, folder=folder)
    assert done.code == 0 and ", 1 steps," in done.out, done
    args = ["--teacher-steps", "2", "--json", "student.json", *few]
    done = stepdistill("eval", "student", *args, folder=folder)
    assert done.code == 0, done
    rows = json.loads((folder / "student.json").read_text())
    shown = [(row["model"], row["method"], row["steps"]) for row in rows]
    assert shown == [
        ("teacher digits-dit", "teacher", 1),
        ("teacher digits-dit", "teacher", 2),
        ("student", "sim", 1),
    ]
    for word in ("teacher digits-dit", "student"):
        assert word in done.out
    done = stepdistill("eval", "y", "--num", "20", "--metrics", "fd,pr", folder=folder)
    assert done.code == 0 and "y" in done.out


def test_an_export_that_draws_otherwise_is_not_written(folder, tmp_path, monkeypatch) -> None:
    """Exit code 1, and what was there before stays."""
    from stepdistill.commands.export import export
    from stepdistill.pipelines.folder import INDEX

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / INDEX).write_text("{}")
    monkeypatch.setattr("stepdistill.commands.export.verify_folder", _differs)
    with pytest.raises(CheckFailed, match="out was not written: differs") as caught:
        export(folder / "finished", tmp_path / "out", overwrite=True)
    assert caught.value.code == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == [INDEX]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _differs(*args: object) -> float:
    from stepdistill.pipelines.verify import VerificationError

    raise VerificationError("differs")
