"""The benchmark's table and the demo's judgement."""

from __future__ import annotations

import pytest

from stepdistill.commands import bench
from stepdistill.commands.demo import BOUNDS, METHODS, judge
from stepdistill.eval.runner import Row
from stepdistill.run.errors import CheckFailed, UserError


@pytest.mark.parametrize("method", ["sim", "phased_dmd"])
def test_bench_names_every_part_and_forms_the_ratio(method: str, capsys) -> None:
    small = ["batch_size=16", "device=cpu"]
    medians = bench.run("step", f"{method}-digits", small, rounds=4, threads=1)
    needed = [v for k, v in medians.items() if k.startswith(("pass", "optimizer"))]
    assert medians["ratio"] == pytest.approx(medians["step"] / sum(needed))
    assert {"data", "clip, check, ema student", "optimizer critic"} <= set(medians)
    shown = capsys.readouterr().out
    assert "step / (passes + optimizers)" in shown and "teacher" in shown


def test_bench_knows_only_steps() -> None:
    with pytest.raises(UserError, match="known is step"):
        bench.run("jump", "sim-digits", [], rounds=3, threads=1)


def row(method: str, steps: int, fd: float, diversity: float = 5.8) -> Row:
    return Row(
        model=method,
        method=method,
        steps=steps,
        reference="digits",
        features="digits",
        feature_sha="0",
        num=2000,
        seed=0,
        fd=fd,
        diversity=diversity,
    )


TEACHER = [row("teacher", n, fd) for n, fd in ((1, 6.5), (2, 3.7), (4, 1.3), (32, 0.3))]


def test_every_method_of_the_demo_has_a_bound() -> None:
    assert {method for method, _ in BOUNDS} == set(METHODS)


@pytest.mark.parametrize("method,steps", list(BOUNDS))
def test_a_row_at_its_bound_passes_and_one_beyond_fails(method: str, steps: int, capsys) -> None:
    bound = BOUNDS[method, steps]
    judge(TEACHER, [row(method, steps, 0.3 * bound.ratio * 0.999)], full=True)
    with pytest.raises(CheckFailed, match=f"{method} at {steps} steps: r "):
        judge(TEACHER, [row(method, steps, 0.3 * bound.ratio * 1.01)], full=True)
    wide = 5.8 * (1 + bound.diversity * 1.05)
    with pytest.raises(CheckFailed, match="diversity"):
        judge(TEACHER, [row(method, steps, 0.2, wide)], full=True)


def test_a_row_worse_than_the_teacher_at_its_steps_fails(capsys) -> None:
    with pytest.raises(CheckFailed, match="worse than the teacher's 3.70"):
        judge(TEACHER, [row("consistency", 2, 3.8)], full=True)
