"""The benchmark of students: who takes part, what is kept of it, and its table."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stepdistill.commands import students
from stepdistill.commands.entries import entries_of, whole_numbers
from stepdistill.commands.fleet import Fleet
from stepdistill.commands.read import read_config
from stepdistill.commands.students import Bench
from stepdistill.commands.students_table import replace_section, section
from stepdistill.eval.runner import Row
from stepdistill.run.errors import CheckFailed, UserError
from tests.helpers import figures

ONE_STEP = {"sim", "sid", "dmd", "dmd2", "consistency", "reflow", "gdd", "ladd", "add", "mdt_dist"}


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    """A benchmark whose trainings only note what they were asked for, and succeed."""
    (tmp_path / "calls").mkdir()

    def run(self: Fleet, *arguments: str) -> int:
        assert arguments[0] == students.__name__
        file = Path(arguments[2])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"seconds_a_step": 1.5, "pass_seconds": 0.5}))
        return 0

    def train(self: Fleet, config: str, folder: Path, *keys: str) -> int:
        (tmp_path / "calls" / folder.name).write_text(" ".join([config, *keys]))
        return int("seed=9" in keys)

    def deliver(folder: Path, *_, steps: tuple[int, ...], **__) -> list[Row]:
        return [figures(folder.name, number, 0.5) for number in steps]

    monkeypatch.setattr(Fleet, "run", run)
    monkeypatch.setattr(Fleet, "train", train)
    monkeypatch.setattr(students, "deliver", deliver)
    return made(tmp_path)


def made(folder: Path, seconds: float = 10, num: int = 100) -> Bench:
    return Bench(folder / "out", folder / "record.json", None, seconds, num)  # type: ignore[arg-type]


def test_all_that_shorten_take_part_and_learn_the_law_of_one_teacher() -> None:
    one, four = entries_of(None, [1], "0,1,1"), entries_of(None, [4], "0")
    assert {entry.method for entry in one} >= ONE_STEP
    assert {entry.method for entry in four} >= {"phased_dmd", "flash_dmd", "sim", "reflow"}
    assert not {entry.method for entry in one + four} & {"opd", "opd-diverse", "crd", "teacher"}
    assert len(one) == 2 * len({entry.name for entry in one if entry.seed == 0})
    for entry in one:
        config = read_config(entry.config, entry.keys)[1]
        assert config.teacher == students.TEACHER
        assert config.guides_law is (entry.method == "sid_lsg")


def test_one_run_serves_every_number_of_steps_where_it_can() -> None:
    (one,), (four,) = (entries_of(["reflow-digits"], [steps], "0") for steps in (1, 4))
    assert one.run == four.run and one.plan == four.plan and one.name != four.name
    (one,), (four,) = (entries_of(["sim-digits"], [steps], "0") for steps in (1, 4))
    assert one.run != four.run and "student_steps=4" in four.keys


@pytest.mark.parametrize(
    ("name", "steps", "line"),
    [
        ("teacher-digits-dit", 1, "denoising makes no teacher faster"),
        ("opd-digits", 1, "opd makes no teacher faster"),
        ("phased_dmd-digits", 1, "its student has no 1 steps"),
        ("flash_dmd-digits", 2, "matched_steps=2 leaves none"),
    ],
)
def test_a_config_that_cannot_take_part_says_why(name, steps, line) -> None:
    with pytest.raises(UserError, match=f"--config {name}: {line}"):
        entries_of([name], [steps], "0")


def test_a_run_has_the_steps_of_its_plan_and_is_not_made_again(bench, tmp_path) -> None:
    entries = entries_of(["sim-digits"], [1], "0,1")
    rows = bench.rows(entries)
    assert [found.fd for found in rows] == [0.5, 0.5]
    calls = {path.name: path.read_text() for path in (tmp_path / "calls").iterdir()}
    assert set(calls) == {entry.run for entry in entries}
    assert all("steps=7" in call and "eval.every_steps=0" in call for call in calls.values())
    for path in (tmp_path / "calls").iterdir():
        path.unlink()
    assert made(tmp_path).rows(entries) == rows  # read from the file
    assert not list((tmp_path / "calls").iterdir())


def test_what_is_recorded_is_told_without_training(bench, tmp_path) -> None:
    (entry,) = entries_of(["sim-digits"], [1], "0")
    bench.rows([entry])
    again = made(tmp_path)
    assert again.holds(entry)
    assert not again.holds(replace(entry, seed=1))
    assert not again.holds(replace(entry, settings="other"))
    asked = {"names": ["sim-digits"], "seconds": 10, "seeds": "0,1", "num": 100}
    asked |= {"record": tmp_path / "record.json", "markdown": tmp_path / "B.md", "recorded": True}
    assert [row.fd for row in students.students(tmp_path / "out", steps="1", **asked)] == [0.5]
    assert len(list((tmp_path / "calls").iterdir())) == 1
    with pytest.raises(UserError, match="record.json holds no student of these in 2 steps"):
        students.students(tmp_path / "out", steps="2", **asked)


def test_changed_settings_are_trained_anew_and_said(bench, tmp_path, capsys) -> None:
    (entry,) = entries_of(["sim-digits"], [1], "0")
    bench.rows([entry])
    other = replace(entry, settings="other")
    again = made(tmp_path)
    again.rows([other])
    assert capsys.readouterr().err.count("sim-digits-k1") == 2  # its plan and its figures
    assert len(list((tmp_path / "calls").iterdir())) == 2
    assert again.record.figures[entry.name].settings == "other"


def test_a_student_of_any_number_of_steps_is_trained_once_for_all(bench, tmp_path) -> None:
    entries = entries_of(["consistency-digits", "pcm-digits"], [1, 2, 4], "0")
    rows = bench.rows(entries)
    assert [row.steps for row in rows] == [1, 2, 4] * 2
    calls = [path.name for path in (tmp_path / "calls").iterdir()]
    assert len([name for name in calls if name.startswith("consistency-digits-s0")]) == 1
    assert len([name for name in calls if name.startswith("pcm-digits-k")]) == 3
    assert set(bench.record.plans) == {
        "consistency-digits",
        *(f"pcm-digits-k{n}" for n in (1, 2, 4)),
    }


def test_every_shipped_teacher_has_students_of_its_own() -> None:
    (dit,), (unet,) = (
        entries_of(["sim-digits"], [1], "0", teacher=name) for name in ("digits-dit", "digits-unet")
    )
    assert (dit.name, unet.name) == ("sim-digits-k1-s0", "sim-digits@unet-k1-s0")
    assert read_config(unet.config, unet.keys)[1].teacher == "digits-unet"
    assert dit.plan != unet.plan and dit.settings != unet.settings
    with pytest.raises(
        UserError, match="--teacher digits-unit: not shipped; did you mean digits-unet"
    ):
        entries_of(["sim-digits"], [1], "0", teacher="digits-unit")


def test_a_teacher_s_own_config_takes_part_in_place_of_the_common_one() -> None:
    dit, unet = (
        {entry.method: entry for entry in entries_of(None, [2], "0", teacher=name)}
        for name in ("digits-dit", "digits-unet")
    )
    assert (dit["scm"].config, unet["scm"].config) == ("scm-digits", "scm-digits-unet")
    assert (dit["sim"].config, unet["sim"].config) == ("sim-digits", "sim-digits")
    assert (unet["scm"].name, unet["scm"].keys) == ("scm-digits-unet-k2-s0", ())
    (named,) = entries_of(["scm-digits"], [2], "0", teacher="digits-unet")
    assert (named.config, named.name) == ("scm-digits", "scm-digits@unet-k2-s0")
    assert (named.method, unet["scm"].method) == ("scm", "scm")
    with pytest.raises(UserError, match="is of the teacher digits-unet; give --teacher digits-u"):
        entries_of(["scm-digits-unet"], [2], "0")


def test_overrides_are_of_all_that_take_part(capsys) -> None:
    plain, other = (
        entries_of(["ect-digits", "sim-digits"], [2], "0", overrides=keys)
        for keys in ((), ("batch_size=32", "start=0.68"))
    )
    for one, two in zip(plain, other, strict=True):
        config = read_config(two.config, two.keys)[1]
        assert (config.batch_size, config.start) == (32, 0.68)
        assert two.plan.startswith(f"{one.student}-batch_size=32-start=0.68")
        assert one.settings != two.settings and one.method == two.method
    for key, mend in {"seed=3": "give --seeds", "guidance=2": "leave it out: all learn"}.items():
        with pytest.raises(UserError, match=f"^{key}: the benchmark sets it; {mend}"):
            entries_of(["ect-digits"], [1], "0", overrides=[key])
    with pytest.raises(UserError, match="no config takes part"):
        entries_of(None, [1], "0", family="trajectory", overrides=["batch_sise=32"])
    assert (
        capsys.readouterr().err.count("ect-digits is left out: override batch_sise=32: unknown key")
        == 1
    )
    walks = [figures("teacher", 32, 0.5)]
    told = {"teacher": "digits-dit", "seconds": 9, "num": 100, "guided": (), "steps": 1}
    title = section(walks, walks, overrides=["batch_size=32", "optim={lr: 1}"], **told)
    assert title.startswith("## Students of digits-dit in 1 step with batch_size=32 'optim")
    assert "--seconds 9 batch_size=32 'optim={lr: 1}'`" in title


def test_a_family_takes_part_by_its_name() -> None:
    found = {entry.method for entry in entries_of(None, [4], "0", family="trajectory")}
    assert found >= {"consistency", "pcm", "scm", "flow_map"} and not found & {"sim", "reflow"}
    with pytest.raises(UserError, match="--family trajectories: unknown; did you mean trajectory"):
        entries_of(None, [1], "0", family="trajectories")


@pytest.mark.parametrize("text", ["0", "1,two", "", "-1"])
def test_numbers_of_steps_are_whole(text) -> None:
    with pytest.raises(UserError, match=f"--steps {text}: write whole numbers from 1 on"):
        whole_numbers("--steps", text)


def test_what_finished_is_kept_when_another_run_fails(bench, tmp_path) -> None:
    with pytest.raises(CheckFailed, match=r"did not finish: sim-digits-k1-s9-\w+$"):
        bench.rows(entries_of(["sim-digits"], [1], "0,9"))
    assert list(made(tmp_path).record.figures) == ["sim-digits-k1-s0"]


def test_a_record_of_another_budget_or_of_nothing_is_refused(bench, tmp_path) -> None:
    bench.keep()
    with pytest.raises(UserError, match="holds students of 10 s judged by 100 samples"):
        made(tmp_path, seconds=20)
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(UserError, match="not a record of this benchmark"):
        made(tmp_path)


def test_a_plan_counts_the_time_of_a_step_in_that_of_a_pass(tmp_path) -> None:
    file = tmp_path / "plan.json"
    students.time_steps("sim-digits", file, ["batch_size=8", "device=cpu"])
    found = json.loads(file.read_text())
    assert found["seconds_a_step"] > 0 and found["pass_seconds"] > 0
    bench, entry = made(tmp_path), entries_of(["sim-digits"], [1], "0")[0]
    first = bench.plan(entry, seconds_a_step=0.5, pass_seconds=0.1)
    assert (first.steps, bench.record.pass_seconds) == (20, 0.1)
    slow = bench.plan(entry, seconds_a_step=1.0, pass_seconds=0.2)  # the same on half a machine
    assert (slow.steps, slow.seconds_a_step, bench.record.pass_seconds) == (20, 0.5, 0.1)
    bench.keep()
    assert made(tmp_path).record.pass_seconds == 0.1


def test_the_table_is_by_fd_with_spread_and_replaces_its_own_section(tmp_path) -> None:
    teacher = [figures("teacher", 1, 8.0), figures("teacher", 32, 0.5, 5.0)]
    rows = [figures("b", 1, 0.6), figures("b", 1, 0.8), figures("a", 1, 0.4, 5.5)]
    keys = {"teacher": "digits-dit", "steps": 1, "seconds": 300, "num": 100, "guided": {"b"}}
    text = section(rows, teacher, **keys)
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert lines[0].startswith("| `a` | 0.40 | 0.80 | 5.50 (+10.0%) | 1 |")
    assert re.match(r"\| `b`, guided \| 0\.70 ± 0\.14 \| 1\.40 ± 0\.28 \|.*\| 2 \|", lines[1])
    file = tmp_path / "B.md"
    file.write_text("# Benchmarks\n\n## Another\n\nstays\n")
    for _ in range(2):
        replace_section(file, text)
    assert (
        file.read_text().count("## Students of digits-dit in 1 step") == 1
        and "stays" in file.read_text()
    )


def test_children_that_an_interrupt_leaves_are_ended() -> None:
    fleet = Fleet(2)
    fleet.cores = 2

    def work(name: str) -> int:
        if name == "waits":
            return fleet.run("timeit", "-n1", "-r1", "import time; time.sleep(600)")
        while not fleet.children:
            time.sleep(0.05)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fleet.each(work, ["breaks", "waits"])
    (child,) = fleet.children
    assert child.wait(60) != 0
    assert fleet.run("timeit") == 1 and len(fleet.children) == 1  # none is begun any more
