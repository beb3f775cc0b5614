"""What prove leaves behind to be read: a page with pictures, and the same figures in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from stepdistill.commands import proof_words as words
from stepdistill.commands.charts import number
from stepdistill.commands.proof_charts import paths, pictures
from stepdistill.commands.proof_words import figure
from stepdistill.commands.report import facts_section
from stepdistill.commands.report_style import html_page
from stepdistill.proof.ground import SHOWN, Outcome
from stepdistill.proof.rows import Row
from stepdistill.run.files import write_text

_COLOURS = 6
_HEAD = (
    "<thead><tr><th>quantity</th><th>expected</th><th>measured</th><th>tolerance</th>"
    "<th>verdict</th></tr></thead>"
)


def write_page(path: Path, outcomes: Sequence[Outcome], facts: Mapping[str, str]) -> None:
    """Write one page that needs nothing but a browser; an older one is replaced.

    Args:
        path: of the HTML file, in a folder that exists.
        outcomes: of all cases, those of a method one after another.
        facts: versions, command, time: what it takes to do it again.
    """
    rows = [row for outcome in outcomes for row in outcome.rows]
    places = {id(outcome): f"case-{n}" for n, outcome in enumerate(outcomes)}
    body = [_header(outcomes, places), _ground(outcomes)]
    for n, (name, own) in enumerate(words.by_method(outcomes).items()):
        body.append(_method(name, f"method-{n}", f"m{n % _COLOURS}", own, places))
    body.append(facts_section(facts))
    write_text(path, html_page(f"Proof: {words.headline(rows)}", "\n".join(body)))


# The page's head ----------------------------------------------------------------------------------


def _header(outcomes: Sequence[Outcome], places: Mapping[int, str]) -> str:
    rows = [row for outcome in outcomes for row in outcome.rows]
    failing = [outcome for outcome in outcomes if outcome.short]
    methods = words.by_method(outcomes)
    state = "worse" if failing or not rows else ""
    trainings = f"{len(outcomes):,} training{'' if len(outcomes) == 1 else 's'}"
    lead = f"{len(methods)} method{'' if len(methods) == 1 else 's'} in {trainings}, held to "
    lead += "what theory says that they reach"
    if failing:
        right = sum(row.passed for row in rows)
        lead += f". {right:,} figures hold; those that fall short come first"
    lines = "".join(_line(n, name, own, places) for n, (name, own) in enumerate(methods.items()))
    glance = f'<div class="lines">{lines}</div>'
    if failing:
        groups = "".join(_failing(outcome, places[id(outcome)]) for outcome in failing)
        glance = (
            '<div><h2>Falls short</h2><div class="small">'
            "Beside the verdict: the error, in tolerances.</div>"
            f'<table class="proof">{_HEAD}<tbody>{groups}</tbody></table>'
            f"</div><div><h2>Everything</h2>{glance}</div>"
        )
    return (
        f'<header><h1 class="{state}">{words.headline(rows)}</h1><p class="intro">{lead}.</p>'
        f'<div class="proofs{"" if failing else " whole"}">{glance}</div></header>'
    )


def _failing(outcome: Outcome, place: str) -> str:
    name = escape(f"{outcome.case.method}, {words.setting(outcome)}")
    head = f'<tr class="group"><th colspan="5"><a href="#{place}">{name}</a></th></tr>'
    return head + "".join(_row(row, far=True) for row in outcome.short)


def _line(n: int, name: str, outcomes: Sequence[Outcome], places: Mapping[int, str]) -> str:
    """A method at a glance: a square a figure, a row of them a case."""
    cases = "".join(
        f'<li><a href="#{places[id(one)]}">{escape(words.setting(one))}</a>{_squares(one)}</li>'
        for one in outcomes
    )
    return (
        f'<div><h3 class="key m{n % _COLOURS}"><a href="#method-{n}">{escape(name)}</a></h3>'
        f"<ul>{cases}</ul></div>"
    )


def _squares(outcome: Outcome) -> str:
    """Figures as squares: those that hold small, those that fall short large."""
    if not outcome.rows:
        return "<small>not judged</small>"
    good = "".join(f"M{9 * n + 1} 3h6v6h-6z" for n, row in enumerate(outcome.rows) if row.passed)
    bad = "".join(f"M{9 * n} 2h8v8h-8z" for n, row in enumerate(outcome.rows) if not row.passed)
    width, title = 9 * len(outcome.rows) - 1, words.held(outcome.rows)
    return (
        f'<svg class="verdicts" role="img" aria-label="{title}" viewBox="0 0 {width} 12" '
        f'width="{width}" height="12"><title>{title}</title>'
        f'<path class="holds" d="{good}"/><path class="short" d="{bad}"/></svg>'
    )


def _ground(outcomes: Sequence[Outcome]) -> str:
    paragraphs = "".join(f"<p>{escape(text)}</p>" for text in words.ground())
    taught = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>"
        for name, text in words.teachers(outcomes).items()
    )
    return (
        f"<section><h2>The proving ground</h2>{paragraphs}"
        '<p>In the pictures, colour is the student and <span class="key mt">grey</span> is theory. '
        f"They show at most {SHOWN} samples, at the fewest and at the most sampling steps of a "
        f"training; those of the first class where a teacher has classes.</p><dl>{taught}</dl>"
        "</section>"
    )


# Methods ------------------------------------------------------------------------------------------


def _method(
    name: str, place: str, colour: str, outcomes: Sequence[Outcome], places: Mapping[int, str]
) -> str:
    rows = [row for outcome in outcomes for row in outcome.rows]
    cases = "".join(_case(one, colour, places[id(one)]) for one in outcomes)
    return (
        f'<section id="{place}"><h2 class="key {colour}">{escape(name)}</h2>'
        f"<p>{escape(words.theory(outcomes))}</p>{_state(rows)}{cases}</section>"
    )


def _case(outcome: Outcome, colour: str, place: str) -> str:
    name = f"{outcome.case.method}, {words.setting(outcome)}"
    drawn = "".join(
        f"<figure>{one.svg}<figcaption>{escape(one.caption)}</figcaption></figure>"
        for one in (
            *pictures(name, colour, outcome.clouds),
            *paths(name, colour, outcome.lines),
        )
    )
    shown = f'<div class="clouds">{drawn}</div>' if drawn else ""
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in outcome.notes)
    body = "".join(_row(row) for row in outcome.rows)
    table = f'<table class="proof">{_HEAD}<tbody>{body}</tbody></table>' if body else ""
    return (
        f'<article class="case" id="{place}"><header><h3>{escape(words.setting(outcome))}</h3>'
        f"{_state(outcome.rows)}"
        f'<div class="small">{outcome.steps:,} training steps, {number(outcome.seconds)} s</div>'
        f"</header>{shown}<div>{table}{notes}</div></article>"
    )


def _state(rows: Sequence[Row]) -> str:
    good = bool(rows) and all(row.passed for row in rows)
    return f'<div class="state {"good" if good else "bad"}">{words.held(rows)}</div>'


def _row(row: Row, *, far: bool = False) -> str:
    """A figure's row; how far it is off, if asked, in tolerances."""
    at = words.steps(row.student_steps)
    taken = f" <small>{at}</small>" if at else ""
    off = ""
    if far and row.measured is not None and row.tolerance > 0:
        ratio = abs(row.measured - row.expected) / row.tolerance
        off = f"<small>{number(ratio)}×</small>"
    cells = "".join(
        f'<td data-label="{label}">{figure(value).replace("-", "−")}</td>'
        for label, value in (
            ("expected", row.expected),
            ("measured", row.measured),
            ("tolerance", row.tolerance),
        )
    )
    return (
        f'<tr class="{"holds" if row.passed else "short"}"><td class="quantity">'
        f"{escape(row.quantity)}{taken}</td>{cells}"
        f'<td class="verdict">{words.verdict(row)}{off}</td></tr>'
    )


# Markdown -----------------------------------------------------------------------------------------


def write_markdown(path: Path, outcomes: Sequence[Outcome], facts: Mapping[str, str]) -> None:
    """Write the figures as Markdown, the same for the same outcomes; an older file is replaced.

    Args:
        path: of the file.
        outcomes: of all cases, those of a method one after another.
        facts: versions, time, and under "command" what wrote this.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(_lines(outcomes, facts)) + "\n")


def _lines(outcomes: Sequence[Outcome], facts: Mapping[str, str]) -> Iterator[str]:
    rows = [row for outcome in outcomes for row in outcome.rows]
    yield f"Written by {_code(facts.get('command', 'stepdistill prove'))}; run it to renew this."
    yield from ("", "# What theory says, and what came out", "")
    yield f"**{words.headline(rows)}.**"
    for text in words.ground():
        yield from ("", _plain(text))
    yield ""
    for key, value in facts.items():
        if key != "command":
            yield f"- {_plain(key)}: {_plain(value)}"
    for name, text in words.teachers(outcomes).items():
        yield f"- teacher {_plain(name)}: {_plain(text)}"
    yield from ("", *_table(["method", "setting", "teacher"], ["figures", "steps", "seconds"]))
    for one in outcomes:
        case = (one.case.method, one.case.setting, one.case.teacher)
        judged = words.held(one.rows)
        judged = f"**{judged}**" if one.short else judged
        cells = [*(_plain(part) for part in case), judged, f"{one.steps:,}", f"{one.seconds:,.0f}"]
        yield _cells(cells)
    for name, own in words.by_method(outcomes).items():
        yield from ("", f"## {_plain(name)}", "", _plain(words.theory(own)), "")
        yield from _figures(own)
        notes = [f"{words.setting(one)}: {note}" for one in own for note in one.notes]
        yield from ([""] if notes else [])
        yield from (f"- {_plain(note)}" for note in notes)


def _figures(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The table of a method."""
    yield from _table(
        ["setting", "teacher", "sampling steps", "quantity"],
        ["expected", "measured", "tolerance"],
        ["verdict"],
    )
    for row in (row for one in outcomes for row in one.rows):
        steps = "" if row.student_steps is None else str(row.student_steps)
        judged = words.verdict(row) if row.passed else f"**{words.verdict(row)}**"
        numbers = [figure(value) for value in (row.expected, row.measured, row.tolerance)]
        named = [_plain(row.setting), _plain(row.teacher), steps, _plain(row.quantity)]
        yield _cells([*named, *numbers, judged])


def _table(left: Sequence[str], right: Sequence[str], last: Sequence[str] = ()) -> list[str]:
    """A table's first two lines; the columns in the middle are set to the right."""
    rules = [*("---" for _ in left), *("---:" for _ in right), *("---" for _ in last)]
    return [_cells([*left, *right, *last]), _cells(rules)]


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = re.sub(r"([\\|`*<>\[\]~#])|(?<!\w)(_)|(_)(?!\w)", r"\\\g<0>", " ".join(text.split()))
    return text.replace("&", "&amp;")


def _code(text: str) -> str:
    """Text as code, fenced by more backticks than it has in a row."""
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"
