"""The benchmark's table and the demo's judgement."""

from __future__ import annotations

import pytest

from stepdistill.commands import bench, doctor
from stepdistill.commands.bench_table import keep
from stepdistill.commands.demo import METHODS, RATIOS, SPREADS, judge
from stepdistill.run.errors import CheckFailed
from stepdistill.trainers.find import methods
from tests.helpers import figures


@pytest.mark.parametrize(
    ("override", "held"),
    [
        ("sim-digits", "4 (teacher, student, critic, average)"),
        ("consistency-digits target=ema", "4 (teacher, student, average, target)"),
        ("teacher-digits-dit", "2 (student, average)"),
    ],
)
def test_bench_says_what_is_held(override: str, held: str, capsys) -> None:
    config, *more = override.split()
    bench.run(config, [*more, "batch_size=4", "device=cpu"], rounds=2, threads=1)
    assert f"networks held: {held}" in " ".join(capsys.readouterr().out.split())


def test_doctor_reads_the_last_phase_and_the_passes() -> None:
    made = doctor.digits_trainers()
    assert set(made) == {method.name for method in methods()}
    line = bench.held_line(made["phased_dmd"])
    assert line == "5 (teacher, critic, student, average, expert)"
    assert bench.passes_line(made["denoising"]) == "student train x 1"


@pytest.mark.parametrize("method", ["sim", "phased_dmd"])
def test_bench_names_every_part_and_forms_the_ratio(method: str, capsys) -> None:
    small = ["batch_size=16", "device=cpu"]
    medians = bench.run(f"{method}-digits", small, rounds=4, threads=1)
    needed = [v for k, v in medians.items() if k.startswith(("pass", "optimizer"))]
    assert medians["ratio"] == pytest.approx(medians["step"] / sum(needed))
    assert {"data", "clip, check, ema student", "optimizer critic"} <= set(medians)
    shown = capsys.readouterr().out
    assert "step / (passes + optimizers)" in shown and "teacher" in shown


def test_rows_of_steps_are_kept_by_their_settings(tmp_path) -> None:
    file = tmp_path / "B.md"
    file.write_text("# Benchmarks\n\n## Other\n\nkept\n")
    some = {"step": 0.1, "ratio": 1.02, "student peak": 110.0, "student alone": 100.0}
    keep(file, "sim-digits", (), 128, some, (1.0, 1.04), 20, 1)
    keep(file, "dmd2-digits", ("batch_size=16",), 16, some | {"critic ratio": 1.01}, (1, 1), 9, 1)
    keep(file, "sim-digits", (), 128, some | {"step": 0.2}, (1.0, 1.04), 20, 1)
    text = file.read_text()
    assert "kept" in text and text.count("## What a step costs") == 1
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows[0].startswith("| `dmd2-digits batch_size=16` | 16 | 100.0 | 1.020 (1.000 to 1.000)")
    assert rows[1].startswith("| `sim-digits` | 128 | 200.0 | 1.020 (1.000 to 1.040) | 1.100 |  |")
    assert "| 1.100 | 1.010 | 9, 1 |" in rows[0] and len(rows) == 2
    head = next(line for line in text.splitlines() if line.startswith("| config"))
    assert {line.count("|") for line in (head, *rows)} == {9}


def test_bench_step_writes_its_row(tmp_path) -> None:
    file = tmp_path / "B.md"
    small = ["batch_size=4", "device=cpu"]
    bench.run("consistency-digits", small, rounds=2, threads=1, markdown=file)
    assert "| `consistency-digits batch_size=4 device=cpu` | 4 |" in file.read_text()


TEACHER = [figures("teacher", n, fd) for n, fd in ((1, 6.5), (2, 3.7), (4, 1.3), (32, 0.3))]


def test_every_method_of_the_demo_has_a_bound() -> None:
    assert {method for method, _ in RATIOS} == set(METHODS) == set(SPREADS)


@pytest.mark.parametrize("method,steps", list(RATIOS))
def test_a_row_at_its_bound_passes_and_one_beyond_fails(method: str, steps: int, capsys) -> None:
    most = 0.3 * RATIOS[method, steps]
    judge(TEACHER, [figures(method, steps, most * 0.999)], full=True)
    with pytest.raises(CheckFailed, match=f"{method} at {steps} steps: r "):
        judge(TEACHER, [figures(method, steps, most * 1.01)], full=True)


@pytest.mark.parametrize("method", METHODS)
def test_too_wide_a_row_fails_at_any_number_of_steps(method: str, capsys) -> None:
    judge(TEACHER, [figures(method, 2, 0.2, 5.8 * (1 + SPREADS[method] * 0.95))], full=True)
    with pytest.raises(CheckFailed, match="diversity"):
        judge(TEACHER, [figures(method, 2, 0.2, 5.8 * (1 + SPREADS[method] * 1.05))], full=True)


def test_a_row_worse_than_the_teacher_at_its_steps_fails(capsys) -> None:
    with pytest.raises(CheckFailed, match="worse than the teacher's 3.70"):
        judge(TEACHER, [figures("consistency", 2, 3.8)], full=True)
