"""Ratios of a log and their healthy bands: identities, the rows of many processes, and warnings."""

from __future__ import annotations

import json
import math

import pytest
import torch

from stepdistill.run.bands import ASSET, MEANINGS, Band, Watchman, learn, load, plain, series, write
from stepdistill.run.errors import UserError
from stepdistill.run.health import Divergence
from stepdistill.run.log import Meter
from stepdistill.run.ratios import figures, gap_parts, sample_parts
from tests.helpers import noise

SHAPE = (4096, 8)


def ratios(fake, real, x, weight=None) -> dict[str, float]:
    parts = gap_parts(fake, real, x, x, weight)
    return figures({f"student/{name}": float(value) for name, value in parts.items()})


def law() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean samples, what a converged fake score says of them, and a teacher's estimate.

    Of x = m + r with r independent of what is seen, E[x | seen] = m.
    """
    m, r, u = noise(1, SHAPE), noise(2, SHAPE), noise(3, SHAPE)
    return m + r, m, m - 0.5 * u


@pytest.mark.parametrize("stale", [0.0, 0.3, 0.8])
def test_lag_is_the_stale_share_of_the_gap(stale: float) -> None:
    """The fake score shows more of a gap than there is: that of the student as it was."""
    x, aim, real = law()
    fake = real + (aim - real) / (1 - stale)
    found = ratios(fake, real, x)
    assert found["student/lag"] == pytest.approx(stale, abs=0.02)


def test_where_the_student_has_closed_the_gap_all_of_it_is_lag() -> None:
    x, aim, _ = law()
    assert ratios(aim + noise(3, SHAPE), aim, x)["student/lag"] == pytest.approx(1, abs=0.02)


def test_excess_is_what_a_step_along_the_gap_takes_away() -> None:
    x, aim, real = law()
    fake = real + 1.7 * (aim - real)
    found = ratios(fake, real, x)
    better = fake - found["student/lag"] * (fake - real)
    before, after = ((d - x).square().mean() for d in (fake, better))
    assert found["critic/excess"] == pytest.approx(float(1 - after / before), rel=1e-3)
    assert float(after) == pytest.approx(1.0, abs=0.02)  # the floor: the variance of r


def test_a_fake_score_that_found_half_of_the_gap_has_a_lag_of_minus_one() -> None:
    x, aim, real = law()
    assert ratios(real + 0.5 * (aim - real), real, x)["student/lag"] == pytest.approx(-1, abs=0.02)


def test_nothing_to_compare_gives_noughts() -> None:
    x = noise(0, SHAPE)
    found = ratios(x, x, x)
    assert found == {"student/gap_norm": 0.0, "student/lag": 0.0, "critic/excess": 0.0}
    assert math.isnan(ratios(x * math.nan, x, x)["student/lag"])


def test_figures_of_samples() -> None:
    x = torch.tensor([[-1.0, -0.995, 0.0, 0.5], [1.0, 0.98, 0.2, 0.3]])
    parts = {f"student_2/{name}": float(value) for name, value in sample_parts(x).items()}
    found = figures(parts)
    assert found["student_2/saturation"] == 3 / 8
    assert found["student_2/sample_mean"] == pytest.approx(float(x.mean()))
    assert found["student_2/sample_std"] == pytest.approx(float(x.std(correction=0)))
    assert not [name for name in found if "." in name]


def test_ratios_of_two_halves_are_those_of_the_whole() -> None:
    """Means of parts over processes and steps, then the ratio."""
    x, aim, real = law()
    fake = real + (1 + noise(5, (SHAPE[0], 1))) * (aim - real)
    meter = Meter()
    for half in range(2):
        part = slice(half * 2048, (half + 1) * 2048)
        meter.add({f"student/{k}": v for k, v in gap_parts(
            fake[part], real[part], x[part], x[part]).items()})  # fmt: skip
    names, values = meter.means()
    found = figures(dict(zip(names, values.tolist(), strict=True)))
    assert found == pytest.approx(ratios(fake, real, x), rel=1e-5)


def test_a_mean_leaves_out_what_is_not_finite() -> None:
    meter = Meter()
    for value in (1.0, math.nan, 3.0, math.inf):
        meter.add({"a": torch.tensor(value), "b": torch.tensor(math.nan)})
    meter.add({"c": torch.tensor(2.0), "a": torch.tensor(5.0)})
    names, values = meter.means()
    found = dict(zip(names, values.tolist(), strict=True))
    assert found["a"] == 3.0 and math.isnan(found["b"]) and found["c"] == 2.0


# Bands --------------------------------------------------------------------------------------------


def log(values: list[float], name: str = "student/lag") -> list[dict]:
    return [{"step": i + 1, "losses": {name: value}} for i, value in enumerate(values)]


def test_bands_are_learnt_from_settled_rows_and_widened() -> None:
    early, late = [50.0] * 25, [0.2 + 0.004 * n for n in range(76)]
    runs = {"sim": {"a": log(early + late)}, "dmd": {"b": log([0.3] * 8, "student_2/gap_norm")}}
    bands = learn(runs)
    low, high = 0.2 + 0.05 * 0.3, 0.5 - 0.05 * 0.3
    lag = bands["sim"]["student/lag"]
    assert lag.high == pytest.approx(high + 0.5 * (high - low), abs=0.01)
    assert lag.low == -lag.high  # it has two sides
    assert bands["dmd"] == {"student/gap_norm": Band(0.0, pytest.approx(0.3 * 1.05))}
    assert learn(runs, widen=0)["sim"]["student/lag"].high == pytest.approx(high, abs=0.01)


def test_phases_are_settled_one_by_one() -> None:
    rows = log([9.0, 1.0, 1.0, 1.0]) + log([9.0, 1.0, 1.0, 1.0], "student_2/lag")
    assert learn({"m": {"r": rows}}, widen=0)["m"]["student/lag"].high == 1.0
    assert list(series(rows, "student/lag")) == ["student/lag", "student_2/lag"]
    assert plain("student_12/lag") == "student/lag" and plain("critic/lag") == "critic/lag"


def test_bands_come_back_as_written(tmp_path) -> None:
    path, bands = tmp_path / "bands.json", {"sim": {"student/lag": Band(-0.5, 0.5)}}
    write(path, bands, "by hand")
    assert load(path) == bands
    assert json.loads(path.read_text())["made"] == "by hand"
    path.write_text("[]")
    with pytest.raises(UserError, match="bands.json: not a file of healthy bands"):
        load(path)


def test_the_shipped_bands_are_of_ratios_that_are_explained() -> None:
    bands = load()
    assert {"sim", "dmd", "phased_dmd"} <= set(bands)
    assert all(set(found) <= set(MEANINGS) for found in bands.values())
    assert all(band.low <= 0 < band.high for found in bands.values() for band in found.values())
    assert "digits" in json.loads(ASSET.read_text())["made"]


def test_a_ratio_outside_is_said_once_after_some_rows_in_a_row() -> None:
    man = Watchman({"student/lag": Band(-0.5, 0.5)}, rows=3, total=40)
    values = [9.0] * 10 + [0.9, 0.9, 0.1, 0.9, -0.9, -0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
    said = [
        (i + 1, line) for i, v in enumerate(values) for line in man.look(i + 1, {"student/lag": v})
    ]
    ((step, line),) = said
    assert step == 19  # the first ten rows are not settled; three in a row on one side
    assert line == (
        "step 19: student/lag 0.9 is above the healthy 0.5: the fake score lags; raise "
        "critic_steps or critic.lr, or lower optim.lr"
    )
    again = Watchman({"student/lag": Band(-0.5, 0.5)}, rows=3, total=40, said=man.said)
    assert not [again.look(step, {"student/lag": 0.9}) for step in range(40) if
                again.look(step, {"student/lag": 0.9})]  # fmt: skip


# Divergence ---------------------------------------------------------------------------------------


def first_word(values: list[float], factor: float = 100, rows: int = 3) -> tuple[int, int] | None:
    """The row at which a loss is said to grow, and the step before it began."""
    watch = Divergence(factor, rows)
    for step, value in enumerate(values, 1):
        if watch.look(step, {"critic/loss": value}, skipped=False):
            return step, watch.calm
    return None


def test_a_loss_that_grows_is_seen_at_its_second_row() -> None:
    calm = [2.0, 1.0, 1.0, 1.0]
    assert first_word([*calm, 3.0, 30.0, 300.0, 3000.0]) == (8, 4)
    assert first_word([*calm, 1.0, math.nan, math.nan]) == (7, 4)
    assert first_word([*calm, 300.0, 1.0, 300.0, 1.0]) is None  # a row that comes back
    assert first_word([1e-3, 2.0, 2.0, 2.0, 2.0, 2.0]) is None  # no mean is as low as its first row
    assert first_word([0.0] * 4 + [1.0] * 4) is None


def test_rows_with_skipped_updates_may_lack_numbers_and_phases_begin_anew() -> None:
    watch = Divergence(100, 2)
    for step in range(4):
        assert watch.look(step, {"critic/loss": math.nan}, skipped=True) is None
    for step in range(4, 8):
        assert watch.look(step, {"critic/loss": 0.01}, skipped=False) is None
    for step in range(8, 12):
        losses = {"student_2/gap": 0.1, "critic/loss": 5.0}
        assert watch.look(step, losses, skipped=False) is None
