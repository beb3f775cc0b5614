"""How straight paths are: in closed form, and by the command."""

from __future__ import annotations

import json
import math

import pytest
import torch

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.process import EDM, RF, VP, Process
from stepdistill.eval.straightness import flow_path, straightness
from stepdistill.oracles.denoiser import Oracle
from tests.children import stepdistill
from tests.helpers import scaled_linear


@pytest.mark.parametrize("process", [RF(), EDM(), VP(scaled_linear())], ids=lambda p: p.name)
@pytest.mark.parametrize("std", [0.5, 2.0])
def test_a_gaussian_s_paths_are_as_straight_as_theory_says(process: Process, std) -> None:
    """In rectified flow's coordinates states go as sqrt((1 - s)^2 std^2 + s^2); the means are over
    1,000 noises and 128 steps."""
    den = Oracle(process, "velocity" if process.name == "rf" else "v", torch.zeros(1, 1), std)
    z = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    found = straightness(*flow_path(den, z, process.t_max, Cond(), steps=128))
    top = float(process.flow_time(torch.tensor([process.t_max], dtype=torch.float64)))
    s = torch.linspace(0, top, 100_001, dtype=torch.float64)
    size = torch.sqrt((1 - s) ** 2 * std**2 + s**2)
    speed = top * (s - (1 - s) * std**2) / size  # of the whole way in one unit of time
    begins = top / size[-1]  # as the walk does, without any image in it
    gap = begins * (speed - (size[-1] - std))
    expected = float(gap.square().mean() * z.square().mean())
    assert found == pytest.approx(expected, rel=0.03)


def test_lines_are_straight() -> None:
    x, z = torch.zeros(3, 2), torch.ones(3, 2)
    path = [x + (z - x) * (1 - k / 8) for k in range(9)]
    times = torch.linspace(1, 0, 9)
    assert straightness(path, times) == pytest.approx(0, abs=1e-12)
    some = [0, 1, 3, 8]  # uneven steps of the same line
    assert straightness([path[k] for k in some], times[some]) == pytest.approx(0, abs=1e-12)
    bent = [*path[:4], path[4] + 0.25, *path[5:]]  # two of eight velocities are 2 off, up and down
    assert straightness(bent, times) == pytest.approx(2 * 2**2 / 8)


def test_the_command_tells_it_of_flows_alone(tmp_path) -> None:
    args = "--num 64 --steps 1 --metrics straightness,diversity --json rows.json".split()
    done = stepdistill("eval", "digits-dit", *args, folder=tmp_path)
    assert done.code == 0, done
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert 0.05 < row["straightness"] < 1 and row["diversity"] > 0
    assert "straightness" in done.out
    keys = "steps=2 batch_size=8 eval.every_steps=0 sample.every_steps=0".split()
    assert stepdistill("train", "dmd-digits", "run=run", *keys, folder=tmp_path).code == 0
    assert stepdistill("export", "run", "--out", "out", folder=tmp_path).code == 0
    done = stepdistill("eval", "out", *args, "--overwrite", "--trust-remote-code", folder=tmp_path)
    assert done.code == 2 and "Traceback" not in done.err
    assert "straightness=out: " in done.err and "a student of few steps" in done.err
    (tmp_path / "images").mkdir()
    done = stepdistill("eval", "images", *args, "--overwrite", folder=tmp_path)
    assert done.code == 2 and "have no paths; give a pipeline" in done.err
    assert math.isfinite(row["straightness"])
