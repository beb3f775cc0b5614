"""The proving ground: every method holds, and every planted bug is found by method and figure.

Methods of :data:`WHOLE` are proven in all their cases, and the first of some others is, so that
every kind of fixed point is there; ``make proof`` proves all of all, which a change of a method or
of numerics must pass. That the numerics of none have changed is held by tests/test_golden.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stepdistill.cli import app
from stepdistill.proof.ground import Outcome, plan
from stepdistill.proof.rows import Row
from stepdistill.proof.trial import Case, proofs
from stepdistill.run.errors import UserError
from stepdistill.trainers.find import methods
from stepdistill.trainers.fixed_point import FixedPoint
from tests.bugs import BUG, BUGS
from tests.children import ByMethod, Child, Done, stepdistill
from tests.helpers import make, mlp_teacher

METHODS = [method.name for method in methods()]
KEYS = "method teacher student_steps quantity expected measured tolerance passed seconds".split()
WHOLE = GUIDED = ("sim", "dmd", "phased_dmd", "consistency", "reflow")
PROVEN = ("denoising", "crd", "opd", "scm", "scott", "kd", *WHOLE)
MIXTURE = """kind: gaussian_mixture
weights: [2, 1]
means: [[-0.8], [0.9]]
stds: [0.6, 0.5]
"""
CAUGHT = {  # bug -> the method, setting and teacher that show it, and the figure that falls short
    "biased_phased_target": ("phased_dmd", "two phases", "gaussian", "mean at level 0.6"),
    "no_grad_fake_score": ("sim", "score", "gaussian", "passes not as declared"),
    "unshared_exit": ("dmd", "two steps", "gaussian", "two processes against one"),
    "swapped_pairs": ("reflow", "pairs", "gaussian", "map error"),
    "averaged_on_critic_steps": ("dmd", "one step", "gaussian", "average of weights"),
    "guided_twice": ("dmd", "one step", "classes", "guided mean"),
    "one_cell_off": ("consistency", "grid", "gaussian", "gain, axis 1"),
    "half_coefficients": ("reflow", "pairs", "gaussian", "time from its own log-SNR"),
    "stale_target": ("consistency", "heun, averaged target", "gaussian", "map error"),
    "wrong_axes": ("sim", "score", "gaussian", "two processes against one"),
}


def cases_of(method: str) -> list[Case]:
    """The cases in which a method is proven here."""
    return plan([method])[: None if method in WHOLE else 1]


def prove(folder: Path, *args: str, bug: str | None = None, seconds: float = 900) -> Done:
    """The command in a child, with a bug planted or without."""
    return Child(["prove", *args], folder, {BUG: bug} if bug else {}).wait(seconds)


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> ByMethod[tuple[Done, Path]]:
    """``prove`` of a method's cases as a user runs it, and where."""
    base = tmp_path_factory.mktemp("proven")

    def make(method: str) -> tuple[Done, Path]:
        args = f"--method {method} --json rows.json --markdown PROOF.md --bands healthy.json"
        workers = "2" if method == PROVEN[0] else "1"
        folder, (case, *rest) = base / method, cases_of(method)
        if not rest:
            args += f" --teacher {case.teacher}"
        own = ["--setting", case.setting] if not rest else []
        return prove(folder, *args.split(), *own, "--workers", workers, seconds=1800), folder

    return ByMethod(make)


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "rows.json").read_text())


@pytest.mark.parametrize("method", PROVEN)
def test_methods_reach_what_theory_says(proven, method) -> None:
    done, folder = proven[method]
    assert done.code == 0, done.err
    rows = rows_of(folder)
    assert [Case(*key) for key in dict.fromkeys(map(case_of, rows))] == cases_of(method)
    assert done.out.splitlines()[-1] == f"prove: all {len(rows)} figures hold"
    for row in rows:
        assert set(KEYS) <= set(row)
        assert row["passed"] is (abs(row["measured"] - row["expected"]) <= row["tolerance"]) is True
        assert row["seconds"] > 0


def case_of(row: dict) -> tuple[str, str, str]:
    return row["method"], row["setting"], row["teacher"]


@pytest.mark.parametrize(
    ("method", "quantity", "steps"),
    [
        ("consistency", "map error", {1, 2, 4}),
        ("consistency", "gain, axis 1", {1}),
        ("reflow", "map error", {1, 2, 4}),
        ("reflow", "straightness, of the teacher's", {32}),
        ("reflow", "mode shares", {1}),
        ("reflow", "error to the flow itself", {1}),
        ("reflow", "loss on pairs, of that on shuffled ones", {None}),
        ("reflow", "transport saved, of straightness and loss floor", {None}),
        ("dmd", "W2", {1, 2}),
        ("phased_dmd", "W2", {2, 3}),
        ("sim", "least mode", {1}),
        *((name, "guided mean", set()) for name in GUIDED),
    ],
)
def test_the_figures_that_must_be_there_are(proven, method, quantity, steps) -> None:
    rows = rows_of(proven[method][1])
    found = {row["student_steps"] for row in rows if row["quantity"] == quantity}
    assert found and found >= steps


@pytest.mark.parametrize(
    ("method", "settings"),
    [("sim", {"score", "full"}), ("phased_dmd", {"two phases", "three phases"})],
)
def test_the_settings_that_must_be_there_are(proven, method, settings) -> None:
    assert {row["setting"] for row in rows_of(proven[method][1])} >= settings


@pytest.mark.parametrize("method", PROVEN)
def test_page_tables_and_bands_are_written(proven, method) -> None:
    _, folder = proven[method]
    assert method in (folder / "out" / "proof" / "report.html").read_text()
    assert method in (folder / "PROOF.md").read_text()
    bands = json.loads((folder / "healthy.json").read_text())["bands"]
    assert set(bands) >= {method} & {"sim", "dmd", "phased_dmd"}
    assert all(band["low"] < band["high"] for one in bands.values() for band in one.values())


def test_all_are_the_cases_of_every_method(tmp_path, monkeypatch) -> None:
    """On one page, from ``prove --all``; what comes of each is in the tests above."""

    def outcome(case: Case, seconds: float | None) -> Outcome:
        values = {"student_steps": 1, "quantity": "W2", "expected": 0.0, "measured": 0.0}
        values |= {"tolerance": 0.1, "passed": True, "seconds": 1.0}
        row = Row(method=case.method, setting=case.setting, teacher=case.teacher, **values)
        return Outcome(case, [row], [], [], FixedPoint("law"))

    cases = [case for method in METHODS for case in plan([method])]
    monkeypatch.setattr("stepdistill.commands.prove.prove_case", outcome)
    monkeypatch.chdir(tmp_path)
    args = "prove --all --workers 1 --json rows.json --markdown PROOF.md --bands healthy.json"
    assert CliRunner().invoke(app, args.split()).exit_code == 0
    assert [Case(*case_of(row)) for row in rows_of(tmp_path)] == cases
    page, table = Path("out/proof/report.html").read_text(), Path("PROOF.md").read_text()
    assert all(method in page and method in table for method in METHODS)


@pytest.mark.parametrize("bug", sorted(BUGS))
def test_a_planted_bug_is_found(tmp_path, bug) -> None:
    """With it the figure falls short that holds without it (the test above has all figures)."""
    method, setting, teacher, quantity = CAUGHT[bug]
    args = ["--method", method, "--setting", setting, "--teacher", teacher, "--workers", "1"]
    done = prove(tmp_path, *args, "--json", "rows.json", bug=bug)
    assert done.code == 1, done
    case = rf"{method} \({re.escape(setting)}\) on {teacher}"
    assert re.search(rf"^prove: {case}.*{re.escape(quantity)} is", done.err, re.MULTILINE)
    assert re.search(rf"short: {case}$", done.err.splitlines()[-1])
    short = {row["quantity"] for row in rows_of(tmp_path) if not row["passed"]}
    assert quantity in short
    assert Case(method, setting, teacher) in plan([method], [setting], teacher)


def test_every_bug_is_one_that_all_would_find() -> None:
    """What shows it is among the cases of ``prove --all``."""
    assert set(CAUGHT) == set(BUGS) and len(BUGS) == 10
    cases = plan([])
    for method, setting, teacher, _ in CAUGHT.values():
        assert Case(method, setting, teacher) in cases


@pytest.mark.parametrize("name", METHODS)
def test_every_method_declares_its_fixed_point_and_proofs(name) -> None:
    assert proofs(name), f"{name} declares no proofs"
    setting = next(iter(proofs(name).values()))
    made = make(name, mlp_teacher(), **dict(setting.keys))
    point = made.fixed_point
    assert point.kind in ("map", "law", "field")
    if point.kind == "map":
        times = [made.top]
        while times[-1] > 0:  # a walk that ends before 0 is a student's step; the next goes on
            walk = point.follow(times[-1])
            assert walk[0] == pytest.approx(times[-1])
            assert all(a > b for a, b in zip(walk, walk[1:], strict=False))
            times.append(walk[-1])
        assert len(times) - 1 in {1, *made.grids()}


# A user's own teacher, and what is refused --------------------------------------------------------


def test_a_user_s_mixture_works_as_well(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text(MIXTURE)
    args = ["--method", "reflow", "--setting", "pairs", "--teacher", "mine.yaml"]
    done = prove(tmp_path, *args, "--json", "rows.json", "--workers", "1")
    assert done.code == 0, done.err
    rows = rows_of(tmp_path)
    assert {row["teacher"] for row in rows} == {"mine.yaml"}
    assert {row["student_steps"] for row in rows if row["quantity"] == "map error"} == {1, 2, 4}
    again = prove(tmp_path, *args, "--json", "rows.json")
    assert again.code == 2 and "rows.json is there already" in again.err


def test_a_budget_shortens_the_training_and_is_judged_all_the_same(tmp_path) -> None:
    args = "--method consistency --setting grid --teacher gmm1d --budget 1 --workers 1".split()
    done = prove(tmp_path, *args)
    assert done.code == 1
    assert "consistency (grid) on gmm1d at 1 steps: map error is" in done.err
    steps = int(re.search(r"(\d+) steps in", done.err)[1])
    assert 10 <= steps < 2000


def test_a_guided_law_without_a_closed_form_is_said_not_skipped(tmp_path) -> None:
    file = "labels: [a, b]\nguidance: 2.0\n"
    (tmp_path / "guided.yaml").write_text(MIXTURE + file)
    args = "--method dmd --teacher guided.yaml --budget 2 --workers 1".split()
    done = prove(tmp_path, *args, "--setting", "one step")
    assert "guided by 2, this law has no closed form" in done.err


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--method", "smi"], "method 'smi' is unknown; did you mean sim?"),
        ([], "name methods by --method, or all of them by --all"),
        (["--all", "--method", "sim"], "name methods by --method, or all of them by --all"),
        (["--method", "sim", "--setting", "scor"], "setting 'scor' is unknown; known are score"),
        (["--method", "sim", "--teacher", "gausian"], "did you mean gaussian?"),
        (["--method", "sim", "--teacher", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_what_cannot_be_proven_is_one_line(tmp_path, args, line) -> None:
    done = stepdistill("prove", *args, folder=tmp_path)
    assert done.code == 2 and done.out == ""
    (text,) = done.err.splitlines()
    assert line in text


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(UserError, match="known are grid"):
        plan(["consistency"], ["gird"])
