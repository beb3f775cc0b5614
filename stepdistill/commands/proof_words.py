"""How outcomes of the proving ground are put into words, on the page and in Markdown alike."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from stepdistill.oracles.named import BUILT_IN
from stepdistill.proof.ground import Outcome
from stepdistill.proof.rows import EXACT, SMALL, Row

HOLDS, SHORT = "holds", "falls short"
SOLVERS = {
    "euler": "Euler’s",
    "heun": "Heun’s",
    "dpm": "DPM-Solver++’s",
    "sde": "a stochastic solver’s mean",
}


def figure(value: float | None) -> str:
    """A figure in as few digits as tell it from its neighbours."""
    if value is None:
        return "not finite"
    return (
        f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")
    )


def verdict(row: Row) -> str:
    """The verdict in words."""
    return HOLDS if row.passed else SHORT


def setting(outcome: Outcome) -> str:
    """A case within its method, as "pairs on gmm1d"."""
    return f"{outcome.case.setting} on {outcome.case.teacher}"


def held(rows: Sequence[Row]) -> str:
    """How many of some figures hold, as "all 8 hold" or "3 of 8 fall short"."""
    short = sum(not row.passed for row in rows)
    if not rows:
        return "nothing could be judged"
    if short:
        return f"{short:,} of {len(rows):,} {'falls' if short == 1 else 'fall'} short"
    return f"all {len(rows):,} hold" if len(rows) > 1 else "1 of 1 holds"


def headline(rows: Sequence[Row]) -> str:
    """What came of all figures, in a few words."""
    short = sum(not row.passed for row in rows)
    if not rows:
        return "Nothing could be judged"
    if short:
        return f"{short:,} of {len(rows):,} figures {'falls' if short == 1 else 'fall'} short"
    return f"All {len(rows):,} figures hold" if len(rows) > 1 else "The one figure holds"


def by_method(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of every method, in the order in which they come."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.case.method, []).append(outcome)
    return found


def theory(outcomes: Sequence[Outcome]) -> str:
    """What theory says that a method reaches, from the fixed points of its settings."""
    points = [outcome.point for outcome in outcomes]
    said = []
    maps = [point for point in points if point.kind == "map"]
    if maps:
        names = dict.fromkeys(SOLVERS.get(one.walk.kind, "its solver’s") for one in maps)
        said.append(
            "Every noise has its own image: the end of the teacher’s walk from it, in "
            f"{' or '.join(names)} steps, whose bias it inherits whole"
        )
        if any(point.straight for point in maps):
            said[-1] += "; the paths there are straight, so that one step lands where many do"
        if any(point.ends for point in maps):
            said[-1] += "; told where a step ends, the student lands on that walk there"
    laws = [point for point in points if point.kind == "law"]
    if laws:
        said.append(
            "Only the distribution of the images is given, the teacher’s own; which noise "
            "becomes which image is free"
        )
        if any(point.levels for point in laws):
            said[-1] += "; where one phase hands over to the next, it is the noised data’s"
        if any(point.covers for point in laws):
            said[-1] += "; no mode of the data may be lost on the way"
    if any(point.kind == "field" for point in points):
        said.append("The network is the exact denoiser, at every level of noise")
    return " ".join(f"{one}." for one in said)


def ground() -> list[str]:
    """What the proving ground is, and how it judges: two paragraphs."""
    return [
        "Here every method is trained, by the trainer that trains it on images, on teachers whose "
        "exact denoiser is known in closed form. What the method must reach is then known too, "
        "and each figure is held against that, not against another run.",
        f"A figure holds if it lies within its tolerance of what theory expects: {figure(EXACT)} "
        "where the student can hold the answer exactly and its target is deterministic, "
        f"{figure(SMALL)} for small networks and for what is learnt from random samples; "
        "a few quantities have their own, which is given beside them. Distances between images "
        "and between laws are in units of the spread of the images. The last figures of each "
        "training must hold whatever is learnt: the network passes are those declared, two "
        "processes do as one does, the average of weights is the sum that it should be, and the "
        "process’s clock runs both ways.",
    ]


def teachers(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """The teachers that occur, by name, with what they are."""
    names = dict.fromkeys(outcome.case.teacher for outcome in outcomes)
    return {
        name: (inspect.getdoc(BUILT_IN[name]) or "").partition("\n")[0]
        if name in BUILT_IN
        else "A mixture from this file."
        for name in names
    }


def steps(count: int | None) -> str:
    """A number of sampling steps, as "4 steps"; nothing if none is taken."""
    return "" if count is None else f"{count} step{'' if count == 1 else 's'}"
