"""Healthy bands of the ratios in a log: learnt from runs that went well, kept as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepdistill.run.errors import UserError
from stepdistill.run.files import write_text

ASSET = Path(__file__).resolve().parent.parent / "assets" / "healthy.json"
SHARES = (0.05, 0.95)
WIDEN = 0.5
SETTLED = 0.25  # share of a phase after which its ratios are learnt from and looked at


@dataclass(frozen=True)
class Band:
    """Where a ratio lies in runs that go well."""

    low: float
    high: float

    def side(self, value: float) -> str | None:
        """``above``, ``below``, or None for a value inside."""
        if value > self.high:
            return "above"
        return "below" if value < self.low else None


@dataclass(frozen=True)
class Meaning:
    """What a ratio says.

    Args:
        text: what it is, and how it should be.
        above: what it means to be above the band, and what to do.
        below: the same for below, where a ratio has two sides.
    """

    text: str
    above: str
    below: str = ""


MEANINGS = {
    "student/gap_norm": Meaning(
        "The gap between fake score and teacher, in the student's own distance to the teacher's "
        "estimate; it falls towards 0.",
        "the student does not come closer to the teacher; train longer, or lower optim.lr",
    ),
    "student/lag": Meaning(
        "The share of that gap which is the fake score's delay: 0 if it keeps up, 1 if the student "
        "has closed the gap already, below 0 if the fake score has not found all of it. Where the "
        "gap is small, what is left of it is mostly delay.",
        "the fake score lags; raise critic_steps or critic.lr, or lower optim.lr",
        "the fake score has found only a part of the gap; raise critic_steps or critic.lr",
    ),
    "critic/excess": Meaning(
        "The share of the fake score's loss that lies above its floor, at least.",
        "the fake score is behind its floor; raise critic_steps or critic.lr, or lower optim.lr",
    ),
    "skipped_share": Meaning(
        "The share of updates that were skipped because a gradient was not finite.",
        "gradients are not finite; lower optim.lr, set precision=fp32, or look at the data",
    ),
}
"""Ratios that have a band, and what to do where a run leaves it. The samples' mean, spread and
saturation have none: they are the data's."""

BY_HAND = {"skipped_share": Band(0.0, 0.01)}

Bands = dict[str, dict[str, Band]]
Rows = Sequence[Mapping[str, Any]]


def plain(name: str) -> str:
    """The name of a ratio without its phase: student/lag for student_2/lag."""
    return re.sub(r"^student_\d+/", "student/", name)


def series(rows: Rows, name: str) -> dict[str, list[tuple[int, float]]]:
    """Points (step, value) of a ratio by the name it has in the log, one for each phase."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in (row.get("losses", {}) | _own(row)).items():
            if plain(key) == name and value is not None and math.isfinite(value):
                found.setdefault(key, []).append((row["step"], value))
    return found


def _own(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: row[key] for key in ("skipped_share",) if key in row}


def learn(runs: Mapping[str, Mapping[str, Rows]], widen: float = WIDEN) -> Bands:
    """Bands from the settled parts of runs that went well.

    All ratios are best at 0. A band ends at the 95th percentile of the sizes in all rows but the
    first quarter of every run (of every phase of it), and ``widen`` times their distance from the
    5th percentile further. It begins at 0, or as far below it where the ratio has two sides.

    Args:
        runs: method -> name of a run -> rows of its log.
        widen: as above.
    """
    bands: Bands = {}
    for method, by_run in runs.items():
        for name in sorted(MEANINGS.keys() - BY_HAND.keys()):
            sizes = sorted(
                abs(value)
                for rows in by_run.values()
                for points in series(rows, name).values()
                for _, value in points[math.ceil(SETTLED * len(points)) :]
            )
            if sizes:
                low, high = (_quantile(sizes, share) for share in SHARES)
                end = high + widen * max(high - low, 0.1 * high)
                start = -end if MEANINGS[name].below else 0.0
                bands.setdefault(method, {})[name] = Band(start, end)
    return bands


def _quantile(values: Sequence[float], share: float) -> float:
    """A quantile of sorted values, between the two nearest."""
    place = share * (len(values) - 1)
    first = math.floor(place)
    last = min(first + 1, len(values) - 1)
    return values[first] + (place - first) * (values[last] - values[first])


def write(path: Path, bands: Bands, made: str) -> None:
    """Write bands with a line on how they were made."""
    rounded = {
        method: {
            name: {side: float(f"{value:.3g}") for side, value in asdict(band).items()}
            for name, band in found.items()
        }
        for method, found in bands.items()
    }
    write_text(path, json.dumps({"made": made, "bands": rounded}, indent=1) + "\n")


def load(path: Path = ASSET) -> Bands:
    """The bands of a file; those of the package if none is named.

    Raises:
        UserError: it is not such a file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["bands"]
        return {
            method: {name: Band(**band) for name, band in bands.items()}
            for method, bands in found.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a file of healthy bands; reinstall stepdistill") from error


class Watchman:
    """Says once when a ratio stays outside its band, some rows in a row.

    Args:
        bands: of the method, by the ratio's name.
        rows: how many rows.
        total: steps of a phase; its first quarter is not settled and is not looked at.
        said: names of which it was said before.
    """

    def __init__(
        self, bands: Mapping[str, Band], rows: int, total: int, said: Iterable[str] = ()
    ) -> None:
        self.bands, self.rows, self.total = bands, rows, total
        self.said = list(said)
        self._outside: dict[str, tuple[str, int]] = {}
        self._first: dict[str, int] = {}

    def look(self, step: int, losses: Mapping[str, float]) -> list[str]:
        """Lines for the user about a row, mostly none."""
        lines, player = [], next((n.split("/")[0] for n in losses if n.endswith("/lag")), "")
        begun = self._first.setdefault(player, step)
        for key, value in losses.items():
            name = plain(key)
            band = self.bands.get(name)
            if band is None or name in self.said or step - begun < SETTLED * self.total:
                continue
            side = band.side(value)
            if side is None:
                self._outside.pop(key, None)
                continue
            before, count = self._outside.get(key, (side, 0))
            count = count + 1 if before == side else 1
            self._outside[key] = side, count
            if count >= self.rows:
                self.said.append(name)
                limit = band.high if side == "above" else band.low
                lines.append(
                    f"step {step}: {key} {value:.2g} is {side} the healthy {limit:.2g}: "
                    f"{getattr(MEANINGS[name], side)}"
                )
        return lines
