"""The losses of every method's first steps are those that are kept, to 1e-6."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from tests import golden
from tests.golden import SLACK, STEPS, Curve, compare, curve, curves, furthest, kept, main
from tests.helpers import cases
from tests.recipes import METHODS


@cache
def now(method: str) -> dict[str, Curve]:
    """The curves of every case of a method, for all tests of it; they are not to be changed."""
    return curves(method)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_losses_are_those_kept(method) -> None:
    command = f"python -m tests.golden --write {method}"
    assert kept(method), f"{method} has no golden losses yet; run `{command}`"
    wrong = [line for line, same in compare(kept(method), now(method)) if not same]
    assert not wrong, "\n".join([*wrong, f"where this was meant: `{command}`"])


@pytest.mark.parametrize("method", METHODS)
def test_rounding_stays_below_what_is_compared(method) -> None:
    """Another CPU sums in another order; weights that differ by 1e-7 of themselves stand for it.
    Weights that differ by 1e-3 are seen."""
    found = now(method)
    for case, keys in cases(method).items():
        assert furthest(found[case], curve(method, keys, jitter=1e-7)).size < SLACK, case
    assert furthest(found[case], curve(method, keys, jitter=1e-3)).size > 10 * SLACK


def test_threads_and_repetition_change_nothing() -> None:
    method, threads = METHODS[0], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert curves(method) == now(method)  # to the bit; what is kept is another CPU's
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_every_file_is_a_methods_and_holds_losses_that_move() -> None:
    assert {path.stem for path in golden.FOLDER.glob("*")} == set(METHODS)
    for method in METHODS:
        for rows in kept(method).values():
            assert any(name.startswith("student") for name in rows)
            assert any(name.endswith("/grad_norm") for name in rows)
            assert all(len(values) == STEPS for values in rows.values())
            for name, values in rows.items():
                numbers = {value for value in values if value is not None}
                assert len(numbers) > 2 and all(map(math.isfinite, numbers)), name


# The comparison itself ----------------------------------------------------------------------------


def row(*values: float | None) -> list[float | None]:
    return [*values, *[0.5] * (STEPS - len(values))]


@pytest.mark.parametrize(
    ("old", "new", "size"),
    [
        (row(0.1), row(0.1 + 2e-6), 2e-6),
        (row(100.0), row(100.0 + 2e-4), 2e-6),
        (row(-100.0), row(-100.0), 0.0),
        (row(1.0), row(math.nan), math.inf),
        (row(None, 1.0), row(1.0, 1.0), math.inf),
        (row(None, 1.0), row(None, 1.0), 0.0),
    ],
)
def test_a_difference_is_relative_above_one(old, new, size) -> None:
    apart = furthest({"a/loss": row(), "b/loss": old}, {"a/loss": row(), "b/loss": new})
    assert apart.size == pytest.approx(size, rel=1e-3)
    assert size == 0 or (apart.step, apart.name) == (0, "b/loss")


def test_names_that_are_new_are_told_and_those_that_are_gone_differ() -> None:
    one, two = {"a/loss": row()}, {"a/loss": row(), "b/gap": row()}
    ((line, same),) = compare({"case": one}, {"case": two})
    assert same and line.endswith("not in the file: b/gap")
    ((line, same),) = compare({"case": two}, {"case": one})
    assert not same and "inf at step 0, b/gap" in line
    assert list(compare({}, {"case": one})) == [("case: new", False)]
    assert list(compare({"case": one}, {})) == [("case: gone", False)]


def test_the_command_tells_before_it_writes_and_writes_only_when_told(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(golden, "FOLDER", tmp_path / "golden")
    method, case = METHODS[0], next(iter(cases(METHODS[0])))
    assert main([method]) == 1 and not golden.FOLDER.exists()
    assert f"{method} {case}: new  DIFFERS" in capsys.readouterr().out.splitlines()
    assert main([method, "--write"]) == 1
    assert main([method]) == 0
    assert f"{method} {case}: 0 at step 0, " in capsys.readouterr().out
    file = golden.FOLDER / f"{method}.json"
    text = file.read_text()
    assert torch.__version__ in text
    made = curves(method)
    name = next(iter(made[case]))
    made[case][name][7] += 0.25
    golden.write(method, made)
    assert main([method]) == 1
    assert f" at step 7, {name}: " in capsys.readouterr().out
    assert file.read_text() != text
    assert main([method, "--write"]) == 1
    assert file.read_text() == text
    with pytest.raises(SystemExit):
        main(["nonsense"])
