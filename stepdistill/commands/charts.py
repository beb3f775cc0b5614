"""Charts as inline SVG: no script, colours and fonts from the page's style sheet.

A chart is drawn in its own units, near the size in pixels at which it is shown. Colours come from
classes: ``m0``, ``m1``, ... set a method's colour, the rest is neutral.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDE = 20.0  # a log axis from this ratio of largest to smallest on
_FINEST = 300  # points of a line that are drawn at most
_LINE = 15.0  # distance of two labels below each other


@dataclass(frozen=True)
class Series:
    """One method's points in a chart.

    Args:
        name: shown beside the last point.
        colour: class that sets the colour, as m0.
        points: pairs (x, y) with x rising.
    """

    name: str
    colour: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Scale:
    """A map from values to chart units.

    Args:
        low: value at ``start``.
        high: value at ``stop``, above ``low``.
        start: chart unit.
        stop: chart unit.
        log: equal ratios instead of equal differences; ``low`` is positive then.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Three to six round values inside, where there are as many."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for leads in ((1, 2, 5), (1, 3), (1,)):
                found = [lead * 10.0**power for power in powers for lead in leads]
                found = [value for value in found if self.low <= value <= self.high]
                if 2 <= len(found) <= 6:
                    return found
            if len(found) > 6:
                return found[:: math.ceil(len(found) / 6)]
        return _even_ticks(self.low, self.high)


def fit(values: Iterable[float], start: float, stop: float) -> Scale:
    """A scale that holds all values with some air: log where they are positive and range widely."""
    known = list(values) or [0.0, 1.0]
    low, high = min(known), max(known)
    if low > 0 and high / low > WIDE:
        air = (high / low) ** 0.08
        return Scale(low / air, high * air, start, stop, log=True)
    air = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    floor = 0.0 if 0 <= low < 0.6 * high else low - air
    return Scale(floor, high + air, start, stop)


def number(value: float) -> str:
    """Three significant digits, without an exponent where that reads well."""
    size = abs(value)
    if size >= 99.95:
        form = ",.0f" if size < 1e6 else ".1e"
    elif size >= 9.995:
        form = ".1f"
    else:
        form = ".2f" if size >= 0.0995 or size == 0 else ".2g"
    return format(value, form).replace("-", "−")


def time_chart(
    series: Series,
    *,
    what: str,
    seconds: float,
    among: Sequence[float] = (),
    reference: tuple[str, float] | None = None,
    measured: bool = False,
    unit: str = "seconds",
    band: tuple[float, float] | None = None,
) -> str:
    """A line over seconds of training, or over steps.

    Args:
        series: the line; values that are not finite are left out.
        what: name of the value.
        seconds: right end of the axis.
        among: other values that the axis has to hold, so that charts can be compared.
        reference: label and height of a dashed line.
        measured: every point is a measurement and gets a dot; else the line is noisy and gets its
            running mean on top.
        unit: of the axis: seconds or steps.
        band: lowest and highest value of the area behind the line.
    """
    points = finite(series.points)
    width, height = 400.0, 220.0
    if not points:
        return _svg(f"{what} of {series.name}: not measured", width, height, [_nothing(width)])
    x = Scale(0.0, seconds if seconds > 0 else 1.0, 46.0, width - 50)
    y = fit([value for _, value in points] + list(among) + list(band or ()), height - 40, 14.0)
    parts = [] if band is None else [_area(x, y, band)]
    parts += _axes(x, y, f"{unit} of training")
    name = f"{what} of {series.name} over {unit} of training: "
    name += f"{number(points[0][1])} at first, {number(points[-1][1])} at the end"
    if reference is not None and y.low <= reference[1] <= y.high:
        height_there = y(reference[1])
        parts.append(_line(x.start, height_there, x.stop, height_there, "dashed"))
        parts.append(_text(x.start + 6, height_there - 7, reference[0], "name teacher"))
        name += f"; {reference[0]}: {number(reference[1])}"
    bold = points if measured else running_mean(points)
    if bold is not points:
        parts.append(_path(points, x, y, "raw"))
    parts.append(_path(bold, x, y, "line"))
    dots = points if measured else bold[-1:]
    short = "s" if unit == "seconds" else unit
    parts += [_dot(x(at), y(value), f"{number(value)} at {at:.0f} {short}") for at, value in dots]
    at, value = bold[-1]
    parts.append(_text(x(at) + 8, y(value) + 4, number(value), "value"))
    return _svg(name, width, height, parts, series.colour)


def ladder_chart(
    teacher: Series, students: Sequence[Series], *, width: float, height: float
) -> str:
    """FD over number of steps, both as ratios: the teacher's line, its best as a dashed one.

    Args:
        teacher: its FD by number of steps, not empty and positive like all others.
        students: theirs, none empty.
        width: in pixels.
        height: in pixels.
    """
    points = [point for series in (teacher, *students) for point in series.points]
    steps = sorted({step for step, _ in points})
    alone = [one for one in students if len(one.points) == 1 and one.points[0][0] == steps[0]]
    room = max([8 * len(one.name) for one in alone] + [16]) + 12
    last = steps[-1] if steps[-1] > steps[0] else 2 * steps[0]
    x = Scale(steps[0], last, 38.0 + room, width - 40, log=True)
    values = [value for _, value in points]
    y = Scale(min(values) / 1.25, max(values) * 1.2, height - 44, 18.0, log=True)
    first, best = teacher.points[0], teacher.points[-1]
    parts = _axes(x, y, "steps to draw an image", steps, left=38.0)
    parts.append(_line(38.0, y(best[1]), x.stop, y(best[1]), "dashed"))
    parts += [_series(series, x, y) for series in (teacher, *students)]
    parts.append(_text(x(first[0]) + 10, y(first[1]) + 1, teacher.name, "name teacher"))
    parts.append(_text(x(best[0]) + 10, y(best[1]) + 4, number(best[1]), "value"))
    before = [one for one in students if one in alone or one.points[-1][0] == steps[-1]]
    parts += _labels([(one, "end" if one in before else "start") for one in students], x, y)
    name = "FD by number of steps. " + "; ".join(
        f"{one.name}: " + ", ".join(f"{number(value)} at {step:g}" for step, value in one.points)
        for one in (teacher, *students)
    )
    return _svg(name, width, height, parts, "ladder")


def squares(steps: int) -> str:
    """As many small squares as steps, at most 8 in a row and 64 in all."""
    shown = min(steps, 64)
    columns, rows = min(shown, 8), math.ceil(shown / 8)
    path = "".join(f"M{6 * (n % 8)} {6 * (n // 8)}h4v4h-4z" for n in range(shown))
    width, height = 6 * columns - 2, 6 * rows - 2
    return (
        f'<svg class="squares" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' aria-hidden="true"><path d="{path}"/></svg>'
    )


def count(steps: float) -> str:
    """Write a number of steps, as 4 steps."""
    return f"{steps:g} step{'' if steps == 1 else 's'}"


def finite(points: Iterable[Point]) -> list[Point]:
    """The points whose both numbers are finite."""
    return [(at, value) for at, value in points if math.isfinite(at) and math.isfinite(value)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """Fewer points with the same outline: of each run of neighbours the lowest and highest."""
    run = math.ceil(2 * len(points) / _FINEST)
    if run <= 2:
        return list(points)
    kept = []
    for start in range(0, len(points), run):
        here = points[start : start + run]
        ends = {min(here, key=lambda point: point[1]), max(here, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def running_mean(points: list[Point]) -> list[Point]:
    """Means over a 25th of the points around each; the points themselves if they are few."""
    if len(points) < 50:
        return points
    half = max(1, len(points) // 50)
    total = [0.0]
    for _, value in points:
        total.append(total[-1] + value)
    means = []
    for place, (at, _) in enumerate(points):
        start, stop = max(0, place - half), min(len(points), place + half + 1)
        means.append((at, (total[stop] - total[start]) / (stop - start)))
    return means


def _even_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(lead * size for lead in (1, 2, 5, 10) if lead * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(
    x: Scale, y: Scale, title: str, at: Sequence[float] | None = None, left: float | None = None
) -> list[str]:
    left = x.start if left is None else left
    base, parts = y.start, []
    for value in y.ticks():
        parts.append(_line(left, y(value), x.stop, y(value), "rule"))
        parts.append(_text(left - 8, y(value) + 4, f"{value:g}".replace("-", "−"), "tick", "end"))
    for value in x.ticks() if at is None else at:
        parts.append(_line(x(value), base, x(value), base + 4, "mark"))
        parts.append(_text(x(value), base + 18, f"{value:g}", "tick", "middle"))
    parts.append(_line(left, base, x.stop, base, "axis"))
    parts.append(_text(x.stop, base + 36, title, "tick", "end"))
    return parts


def _series(series: Series, x: Scale, y: Scale) -> str:
    dots = (
        _dot(x(step), y(value), f"{series.name}, {count(step)}: FD {number(value)}", 4.5)
        for step, value in series.points
    )
    return f'<g class="{series.colour}">{_path(series.points, x, y, "line")}{"".join(dots)}</g>'


def _labels(ends: Sequence[tuple[Series, str]], x: Scale, y: Scale) -> list[str]:
    """Names beside the last points; those at the same place pushed apart, in order of height."""
    parts = []
    for column in sorted({(series.points[-1][0], side) for series, side in ends}):
        here = [one for one, side in ends if (one.points[-1][0], side) == column]
        here.sort(key=lambda series: -series.points[-1][1])
        places = apart([y(series.points[-1][1]) for series in here])
        shift = 11 if column[1] == "start" else -11
        for series, place in zip(here, places, strict=True):
            text = _text(x(column[0]) + shift, place + 4, series.name, "name", column[1])
            parts.append(f'<g class="{series.colour}">{text}</g>')
    return parts


def apart(places: Sequence[float]) -> list[float]:
    """Rising places moved as little as need be to lie a line of text apart."""
    blocks: list[list[float]] = []  # mean and count of those that touch
    for place in places:
        blocks.append([place, 1])
        while len(blocks) > 1:
            (above, many), (below, few) = blocks[-2:]
            if below - above >= _LINE * (many + few) / 2:
                break
            blocks[-2:] = [[(above * many + below * few) / (many + few), many + few]]
    return [
        mean + _LINE * (n - (count - 1) / 2) for mean, count in blocks for n in range(int(count))
    ]


def _path(points: Sequence[Point], x: Scale, y: Scale, kind: str) -> str:
    if len(points) < 2:
        return ""
    steps = (f"{x(at):.1f} {y(value):.1f}" for at, value in thinned(points))
    return f'<path class="{kind}" d="M{"L".join(steps)}"/>'


def _dot(x: float, y: float, title: str, radius: float = 3.2) -> str:
    title = f"<title>{escape(title)}</title>"
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}">{title}</circle>'


def _area(x: Scale, y: Scale, band: tuple[float, float]) -> str:
    top, bottom = y(band[1]), y(max(band[0], y.low))
    title = f"<title>healthy: {number(band[0])} to {number(band[1])}</title>"
    ends = f"M{x.start:.1f} {top:.1f}H{x.stop:.1f}V{bottom:.1f}H{x.start:.1f}Z"
    return f'<path class="band" d="{ends}">{title}</path>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text class="{kind}" {place} text-anchor="{anchor}">{escape(text)}</text>'


def _nothing(width: float) -> str:
    return _text(width / 2, 100, "not measured", "tick", "middle")


def _svg(name: str, width: float, height: float, parts: Sequence[str], kind: str = "") -> str:
    return (
        f'<svg class="chart {kind}" role="img" viewBox="0 0 {width:g} {height:g}">'
        f"<title>{escape(name)}</title>{''.join(parts)}</svg>"
    )
