"""Pictures of the proving ground: a student's samples beside theory's, as inline SVG.

Colours are the style sheet's: the student's that of its method, theory's neutral.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from stepdistill.commands.charts import Point, Scale
from stepdistill.proof.ground import Cloud, Lines

BINS = 40
WIDTH, HEIGHT = 240.0, 196.0  # of a plot over a line, in pixels
SIDE = 240.0  # of a plot of the plane
_LEFT, _RIGHT, _TOP, _BASE = 30.0, 6.0, 8.0, 24.0
_BEYOND = 0.5  # samples widen a plot by this share of theory's range at most, on each side
_TALLEST = 1.8  # bars are cut at this multiple of the law's highest density

Span = tuple[float, float]


@dataclass(frozen=True)
class Drawn:
    """One picture.

    Args:
        svg: the picture.
        caption: what it shows, and what was left out.
    """

    svg: str
    caption: str


@dataclass(frozen=True)
class Sound:
    """The samples of a cloud that are finite.

    Args:
        z: noise.
        x: the student's.
        expected: theory's; of the same noise as x, one by one, if the cloud is paired.
        lost: how many of the student's are not finite.
        dim: coordinates.
    """

    z: list[list[float]]
    x: list[list[float]]
    expected: list[list[float]]
    lost: int
    dim: int

    @classmethod
    def of(cls, cloud: Cloud) -> Sound:
        """What of a cloud can be drawn."""
        dim = max((len(point) for point in (*cloud.x, *cloud.expected)), default=0)
        mine = [i for i, point in enumerate(cloud.x) if _finite(point) and _finite(cloud.z[i])]
        lost = len(cloud.x) - len(mine)
        if cloud.paired:
            mine = [i for i in mine if _finite(cloud.expected[i])]
            theirs = [cloud.expected[i] for i in mine]
        else:
            theirs = [point for point in cloud.expected if _finite(point)]
        return cls([cloud.z[i] for i in mine], [cloud.x[i] for i in mine], theirs, lost, dim)


def pictures(name: str, colour: str, clouds: Sequence[Cloud]) -> Iterator[Drawn]:
    """The pictures of a case: of its fewest and its most steps.

    Args:
        name: of the case.
        colour: class that sets the student's colour, as m0.
        clouds: all of the case, in any order.
    """
    by_steps = {cloud.steps: cloud for cloud in clouds}
    chosen = [by_steps[n] for n in sorted({min(by_steps), max(by_steps)})] if by_steps else []
    sound = [Sound.of(cloud) for cloud in chosen]
    frame = window(sound)
    for cloud, points in zip(chosen, sound, strict=True):
        steps = f"{cloud.steps} step{'' if cloud.steps == 1 else 's'}"
        if not points.x:
            nothing = _text(SIDE / 2, 60, "no sample is finite", "middle")
            title = f"{name}, {steps}: no sample is finite"
            yield Drawn(_svg(title, colour, 120, [nothing]), f"{steps}: {len(cloud.x)} lost")
        elif points.dim == 1:
            yield _density(f"{name}, {steps}", colour, cloud, points, frame[0])
            yield _map(f"{name}, {steps}", colour, cloud, points, frame[0])
        else:
            yield _plane(f"{name}, {steps}", colour, cloud, points, frame)


def window(sound: Sequence[Sound]) -> list[Span]:
    """The range of each of the first two coordinates: theory's, widened within limits to hold
    the student's samples."""
    dim = min(2, max((one.dim for one in sound), default=0))
    spans = []
    for k in range(dim):
        theirs = [point[k] for one in sound for point in one.expected]
        mine = [point[k] for one in sound for point in one.x]
        low, high = min(theirs or mine, default=0.0), max(theirs or mine, default=0.0)
        room = _BEYOND * (high - low) or 1.0
        low, high = max(low - room, min([low, *mine])), min(high + room, max([high, *mine]))
        air = 0.04 * (high - low) or 0.5
        spans.append((low - air, high + air))
    return spans


def bins(values: Sequence[float], span: Span, count: int = BINS) -> list[float]:
    """Densities of a histogram: heights times width add up to the share of values in the span.

    Args:
        values: finite, not empty.
        span: lowest and highest place.
        count: number of bins.
    """
    width = (span[1] - span[0]) / count
    heights = [0.0] * count
    for value in values:
        if span[0] <= value <= span[1]:
            heights[min(count - 1, int((value - span[0]) / width))] += 1 / (len(values) * width)
    return heights


def equal(spans: Sequence[Span], side: float = SIDE) -> tuple[Scale, Scale]:
    """Scales of the plane of one unit length, both spans centred within."""
    size = max(high - low for low, high in spans)
    (left, right), (below, above) = (
        ((low + high - size) / 2, (low + high + size) / 2) for low, high in spans
    )
    length = side - _LEFT - _RIGHT
    x = Scale(left, right, _LEFT, _LEFT + length)
    return x, Scale(below, above, _TOP + length, _TOP)


# The pictures -------------------------------------------------------------------------------------


def _density(name: str, colour: str, cloud: Cloud, points: Sound, span: Span) -> Drawn:
    curve = [(at, height) for at, height in cloud.curve if _finite((at, height))]
    places = [at for at, height in curve if height > 1e-3 * max(height for _, height in curve)]
    span = (min([span[0], *places]), max([span[1], *places]))
    mine = bins([point[0] for point in points.x], span)
    if not curve and points.expected:  # no density is known: theory's own histogram
        curve = _outline(bins([point[0] for point in points.expected], span), span)
    top = max([height for _, height in curve], default=0.0)
    most = min(max(mine), _TALLEST * top) if top else max(mine)
    x = Scale(*span, _LEFT, WIDTH - _RIGHT)
    y = Scale(0.0, 1.06 * max(most, top), HEIGHT - _BASE, _TOP)
    bars = [(at, min(height, most)) for at, height in _outline(mine, span)]
    inside = [(at, height) for at, height in curve if span[0] <= at <= span[1]]
    parts = [
        f'<path class="bars" d="{_track(bars, x, y)}Z"/>',
        *_bottom(x, HEIGHT - _BASE),
        f'<path class="theory" d="{_track(inside, x, y)}"/>' if inside else "",
    ]
    what = "samples and density" + ("; bars are cut" if most < max(mine) else "")
    caption = _caption(cloud, points, _outside(points.x, [span]), what)
    title = f"{name}: histogram of {len(points.x)} samples behind the density that theory gives"
    return Drawn(_svg(title, colour, HEIGHT, parts), caption)


def _map(name: str, colour: str, cloud: Cloud, points: Sound, span: Span) -> Drawn:
    noise = [point[0] for point in points.z]
    most = 1.05 * max(map(abs, noise)) or 1.0
    x = Scale(-most, most, _LEFT, WIDTH - _RIGHT)
    y = Scale(*span, HEIGHT - _BASE, _TOP)
    mine = list(zip(noise, (point[0] for point in points.x), strict=True))
    shown = [point for point in mine if span[0] <= point[1] <= span[1]]
    parts = [*_left(x, y), *_bottom(x, HEIGHT - _BASE)]
    what = "noise to image; which is free"
    if cloud.paired:
        theirs = list(zip(noise, (point[0] for point in points.expected), strict=True))
        what = "noise to image"
        if _single(theirs):
            parts.append(f'<path class="theory" d="{_track(sorted(theirs), x, y)}"/>')
        else:
            what += "; later noise counts too"
            parts += [_gaps(theirs, mine, x, y), _dots("quiet", theirs, x, y)]
    parts.append(_dots("mine", shown, x, y))
    title = f"{name}: where each of {len(mine)} noises goes"
    title += ", beside where theory sends it" if cloud.paired else ""
    caption = _caption(cloud, points, len(mine) - len(shown), what)
    return Drawn(_svg(title, colour, HEIGHT, parts), caption)


def _plane(name: str, colour: str, cloud: Cloud, points: Sound, spans: Sequence[Span]) -> Drawn:
    x, y = equal(spans)
    mine, theirs = ([(point[0], point[1]) for point in one] for one in (points.x, points.expected))
    parts = [*_left(x, y), *_bottom(x, y.start), _dots("quiet", theirs, x, y)]
    if cloud.paired:
        parts.append(_gaps(theirs, mine, x, y))
    shown = [one for one in mine if x.low <= one[0] <= x.high and y.low <= one[1] <= y.high]
    parts.append(_dots("mine", shown, x, y))
    what = "each joined to theory’s image" if cloud.paired else "samples over theory’s"
    if points.dim > 2:
        what += f", first 2 of {points.dim} coordinates"
    title = f"{name}: {len(mine)} samples in the plane, {'joined to' if cloud.paired else 'over'} "
    title += "theory’s" + (f", first 2 of {points.dim} coordinates" if points.dim > 2 else "")
    caption = _caption(cloud, points, len(mine) - len(shown), what)
    return Drawn(_svg(title, colour, y.start + _BASE, parts), caption)


def _caption(cloud: Cloud, points: Sound, outside: int, what: str) -> str:
    steps = f"{cloud.steps} step{'' if cloud.steps == 1 else 's'}"
    left = f"; {points.lost} of {len(cloud.x)} not finite, left out" if points.lost else ""
    return f"{steps}: {what}{left}" + (f"; {outside} outside" if outside else "")


def paths(name: str, colour: str, lines: Sequence[Lines]) -> Iterator[Drawn]:
    """Paths from noise to image: of the teacher, and beside them the student's of the same noises.

    On a line over time, else in the plane of the first two coordinates.

    Args:
        name: of the case.
        colour: class that sets the student's colour.
        lines: of teacher and student.
    """
    flat = [path for one in lines for path in one.paths if all(map(_finite, path))]
    if not flat:
        return
    dim = min(2, len(flat[0][0]))
    spans = [_span(point[k] for path in flat for point in path) for k in range(dim)]
    for one in sorted(lines, key=lambda one: one.whose != "teacher"):
        drawn = [path for path in one.paths if all(map(_finite, path))]
        if dim == 1:
            x, y = Scale(0.0, 1.0, _LEFT, WIDTH - _RIGHT), Scale(*spans[0], HEIGHT - _BASE, _TOP)
            tracks = [
                [(1 - t, point[0]) for t, point in zip(one.times, path, strict=True)]
                for path in drawn
            ]
        else:
            x, y = equal(spans)
            tracks = [[(point[0], point[1]) for point in path] for path in drawn]
        kind = "theirs" if one.whose == "teacher" else "way"
        ends = _dots("quiet" if kind == "theirs" else "mine", [track[-1] for track in tracks], x, y)
        way = "".join(_track(track, x, y) for track in tracks)
        parts = [*_left(x, y), *_bottom(x, y.start), f'<path class="{kind}" d="{way}"/>', ends]
        lost = len(one.paths) - len(drawn)
        caption = f"paths of the {one.whose}" + (
            ", from noise at 0 to image at 1" if dim == 1 else ""
        )
        caption += f"; {lost} not finite, left out" if lost else ""
        title = f"{name}: {len(drawn)} paths of the {one.whose} from noise to image"
        yield Drawn(_svg(title, colour, y.start + _BASE, parts), caption)


def _span(values: Iterable[float]) -> Span:
    """From the least to the greatest, with some air."""
    found = list(values)
    air = 0.04 * (max(found) - min(found)) or 0.5
    return min(found) - air, max(found) + air


# Parts --------------------------------------------------------------------------------------------


def _finite(point: Iterable[float]) -> bool:
    return all(math.isfinite(value) for value in point)


def _outside(values: Sequence[Sequence[float]], spans: Sequence[Span]) -> int:
    return sum(
        not all(low <= value <= high for value, (low, high) in zip(point, spans, strict=False))
        for point in values
    )


def _single(points: Sequence[Point]) -> bool:
    """Whether points lie on one curve: it turns back and forth by little."""
    heights = [height for _, height in sorted(points)]
    travelled = sum(abs(b - a) for a, b in zip(heights, heights[1:], strict=False))
    return travelled <= 2 * (max(heights) - min(heights))


def _outline(heights: Sequence[float], span: Span) -> list[Point]:
    """A histogram's outline, from the ground and back to it."""
    width = (span[1] - span[0]) / len(heights)
    points = [(span[0], 0.0)]
    for n, height in enumerate(heights):
        points += [(span[0] + n * width, height), (span[0] + (n + 1) * width, height)]
    return [*points, (span[1], 0.0)]


def _place(point: Point, x: Scale, y: Scale) -> str:
    return f"{x(point[0]):.1f} {y(point[1]):.1f}"


def _track(points: Sequence[Point], x: Scale, y: Scale) -> str:
    return "M" + "L".join(_place(point, x, y) for point in points)


def _dots(kind: str, points: Sequence[Point], x: Scale, y: Scale) -> str:
    """All dots in one path: strokes of no length with round ends."""
    return f'<path class="{kind}" d="{"".join(f"M{_place(one, x, y)}h0" for one in points)}"/>'


def _gaps(theirs: Sequence[Point], mine: Sequence[Point], x: Scale, y: Scale) -> str:
    """Lines from theory's points to the student's, the ends held within the plot."""

    def held(point: Point) -> Point:
        return min(max(point[0], x.low), x.high), min(max(point[1], y.low), y.high)

    pairs = zip(theirs, mine, strict=True)
    lines = (f"M{_place(a, x, y)}L{_place(held(b), x, y)}" for a, b in pairs)
    return f'<path class="gaps" d="{"".join(lines)}"/>'


def _bottom(x: Scale, base: float) -> Iterator[str]:
    marks = "".join(f"M{x(value):.1f} {base:.1f}v4" for value in x.ticks())
    yield f'<path class="axis" d="M{x.start:.1f} {base:.1f}H{x.stop:.1f}{marks}"/>'
    for value in x.ticks():
        yield _text(x(value), base + 17, _tick(value), "middle")


def _left(x: Scale, y: Scale) -> Iterator[str]:
    lines = "".join(f"M{x.start:.1f} {y(value):.1f}H{x.stop:.1f}" for value in y.ticks())
    yield f'<path class="rule" d="{lines}"/>'
    for value in y.ticks():
        yield _text(x.start - 6, y(value) + 4, _tick(value), "end")


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(name: str, colour: str, height: float, parts: Iterable[str]) -> str:
    title = escape(name)
    return (
        f'<svg class="chart cloud {colour}" role="img" aria-label="{title}" '
        f'viewBox="0 0 {SIDE:g} {height:g}"><title>{title}</title>{"".join(parts)}</svg>'
    )
