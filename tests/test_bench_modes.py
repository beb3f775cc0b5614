"""The benchmark of modes: what it counts, and its table."""

from __future__ import annotations

import re

import pytest
import torch

from stepdistill.commands import modes
from stepdistill.proof.modes import STEPS, Shares, entries, grid_teacher, shares, untrained
from stepdistill.trainers.find import trainer
from tests.children import stepdistill


def test_shares_of_known_samples() -> None:
    law = grid_teacher().mixture
    own, k = law.sample(
        torch.randn(20000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        torch.linspace(0, 1 - 1e-9, 20000, dtype=torch.float64),
    )
    full = shares(own, law)
    assert (full.covered, full.near) == (25, pytest.approx(1, abs=1e-3))
    assert full.mass < 0.01 and full.sliced < 0.02 and full.least > 0.97
    lost = shares(own[k != 7], law)
    assert lost.covered == 24 and lost.least == pytest.approx(0, abs=1e-3)
    assert lost.mass == pytest.approx(1 / 25, abs=2e-3)
    point = shares(law.means[3].expand(100, 2), law)
    assert (point.covered, point.mass) == (1, pytest.approx(24 / 25, abs=1e-6))
    away = shares(law.means[0] - 4.5 * law.stds[0, 0] * torch.tensor([[1.0, 0.0]]), law)
    assert away.near == 0


@pytest.mark.parametrize("shift", [1.0, 0.4])
def test_students_have_the_same_times_and_updates(shift) -> None:
    teacher = grid_teacher(shift)
    grids = []
    for entry in entries(shift):
        cls = trainer(entry.method)
        config = cls.Config(
            method=entry.method, run="unused", teacher="grid", steps=20, **dict(entry.keys)
        )
        made = cls(config, teacher.oracle)
        grids.append(made.grids()[STEPS])
        turns = [made.prepare(step) or made.turns(step) for step in range(20)]
        names = [turn.player for step in turns for turn in step]
        assert sum(name.startswith("student") for name in names) == 20
    assert grids[0] == grids[1]
    for grid in grids[3:]:
        assert grid[::2] == pytest.approx(grids[0][::2])
    if shift == 1:
        assert all(grid == pytest.approx(grids[0]) for grid in grids)


def test_what_stands_beside_the_students() -> None:
    found = untrained()
    assert list(found) == [
        "the law's own samples",
        "teacher, fresh noise",
        "teacher, predicted noise",
    ]
    assert found["the law's own samples"].mass < 0.01 < found["teacher, fresh noise"].mass


def test_the_table_has_mean_and_spread() -> None:
    found = {
        "a": [
            Shares(20, 0.1, 0.2, 0.3, 0.9, 10, (0.4, 0.2)),
            Shares(22, 0.1, 0.4, 0.3, 0.9, 20, (0.6, 0.2)),
        ]
    }
    text = modes.section(found, {"b": Shares(25, 1, 0, 0, 1)}, "0,1", 50)
    assert text.startswith("## Twenty-five modes\n")
    assert "stepdistill bench modes --updates 50 --seeds 0,1`" in text
    rows = [line for line in text.splitlines() if re.match(r"\| [ab] ", line)]
    assert rows[0].startswith("| a | 21.0 ± 1.4 | 0.100 ± 0.000 | 0.300 ± 0.141 |")
    assert rows[0].endswith("| 0.50, 0.20 | 15 |")
    assert rows[1].startswith("| b | 25.0 | 1.000 | 0.000 |")
    head = next(line for line in text.splitlines() if line.startswith("| student"))
    assert {line.count("|") for line in (head, *rows)} == {9}


def test_the_command_trains_and_writes_the_section(tmp_path) -> None:
    file = tmp_path / "BENCHMARKS.md"
    file.write_text("# Benchmarks\n\n## Other\n\nkept\n\n## Twenty-five modes\n\nold\n")
    args = "bench modes --updates 10 --seeds 3 --workers 1 --markdown BENCHMARKS.md".split()
    done = stepdistill(*args, folder=tmp_path)
    assert done.code == 0, done.err
    text = file.read_text()
    assert "kept" in text and "old" not in text and text.count("## Twenty-five modes") == 1
    for entry in entries():
        assert f"| {entry.name} | " in text
        assert f"{entry.name}, seed 3: " in done.err
    done = stepdistill("bench", "modes", "--seeds", "a", folder=tmp_path)
    assert done.code == 2 and "--seeds a: write whole numbers by commas" in done.err
