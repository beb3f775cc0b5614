"""The proving ground: every method holds, and every planted bug is found by method and figure."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from stepdistill.proof.ground import plan
from stepdistill.proof.trial import Case, proofs
from stepdistill.run.errors import UserError
from stepdistill.trainers.find import methods
from tests.bugs import BUG, BUGS
from tests.children import Done, stepdistill
from tests.helpers import make, mlp_teacher

METHODS = [method.name for method in methods()]
KEYS = "method teacher student_steps quantity expected measured tolerance passed seconds".split()
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


def prove(folder: Path, *args: str, bug: str | None = None, seconds: float = 900) -> Done:
    """The command in a child, with a bug planted or without."""
    from tests.children import Child

    return Child(["prove", *args], folder, {BUG: bug} if bug else {}).wait(seconds)


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """``prove --all`` as a user runs it, and where."""
    folder = tmp_path_factory.mktemp("proven")
    args = "--all --json rows.json --markdown PROOF.md --bands healthy.json".split()
    return prove(folder, *args, seconds=1800), folder


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "rows.json").read_text())


def test_every_method_reaches_what_theory_says(proven) -> None:
    done, folder = proven
    assert done.code == 0, done.err
    rows = rows_of(folder)
    assert {row["method"] for row in rows} == set(METHODS)
    assert done.out.splitlines()[-1] == f"prove: all {len(rows)} figures hold"
    for row in rows:
        assert set(KEYS) <= set(row)
        assert row["passed"] is (abs(row["measured"] - row["expected"]) <= row["tolerance"]) is True
        assert row["seconds"] > 0


def test_the_figures_that_must_be_there_are(proven) -> None:
    rows = rows_of(proven[1])

    def has(method: str, quantity: str, steps: tuple[int, ...]) -> None:
        found = {
            r["student_steps"] for r in rows if (r["method"], r["quantity"]) == (method, quantity)
        }
        assert found >= set(steps), (method, quantity, found)

    has("consistency", "map error", (1, 2, 4))
    has("consistency", "gain, axis 1", (1,))
    has("reflow", "map error", (1, 2, 4))
    has("reflow", "straightness, of the teacher's", (32,))
    has("dmd", "W2", (1, 2))
    has("phased_dmd", "W2", (2, 6))
    has("sim", "least mode", (1,))
    for method in ("sim", "dmd", "phased_dmd", "consistency", "reflow"):
        assert any(r["method"] == method and r["quantity"] == "guided mean" for r in rows), method
    settings = {(r["method"], r["setting"]) for r in rows}
    assert {("sim", "score"), ("sim", "full")} <= settings
    assert {("phased_dmd", "two phases"), ("phased_dmd", "three phases")} <= settings


def test_page_tables_and_bands_are_written(proven) -> None:
    _, folder = proven
    page = (folder / "out" / "proof" / "report.html").read_text()
    table = (folder / "PROOF.md").read_text()
    for method in METHODS:
        assert method in page and method in table
    bands = json.loads((folder / "healthy.json").read_text())["bands"]
    assert set(bands) >= {"sim", "dmd", "phased_dmd"}
    assert all(band["low"] < band["high"] for one in bands.values() for band in one.values())


@pytest.mark.parametrize("bug", sorted(BUGS))
def test_a_planted_bug_is_found(tmp_path, bug) -> None:
    """With it the figure falls short that holds without it (the test above has all figures)."""
    method, setting, teacher, quantity = CAUGHT[bug]
    args = ["--method", method, "--setting", setting, "--teacher", teacher, "--workers", "1"]
    done = prove(tmp_path, *args, "--json", "rows.json", bug=bug)
    assert done.code == 1, done
    line = done.err.splitlines()[-1]
    assert re.search(
        rf"{method} \({re.escape(setting)}\) on {teacher}.*{re.escape(quantity)}", line
    )
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
        times = point.follow(made.top)
        assert times[0] == pytest.approx(made.top) and times[-1] == 0
        assert list(times) == sorted(times, reverse=True)


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
