"""The page and the Markdown of ``prove``: whole, escaped, and right whatever came out."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from html import escape, unescape
from xml.etree import ElementTree

import pytest

from stepdistill.commands.proof_charts import Sound, bins, equal, paths, pictures, window
from stepdistill.commands.proof_page import write_markdown, write_page
from stepdistill.commands.proof_words import figure, headline, theory
from stepdistill.proof.ground import Cloud, Lines, Outcome
from stepdistill.proof.rows import Row
from stepdistill.proof.trial import Case
from stepdistill.trainers.fixed_point import FixedPoint

ODD = 'a<b>|"c" & d_'
FACTS = {"versions": "torch <2>", "command": "stepdistill prove --all"}
NAN = math.nan


def row(case: Case, quantity: str, measured: float | None, passed: bool, steps=1) -> Row:
    return Row(
        method=case.method,
        setting=case.setting,
        teacher=case.teacher,
        student_steps=steps,
        quantity=quantity,
        expected=0.0,
        measured=measured,
        tolerance=0.02,
        passed=passed,
        seconds=3.0,
    )


def points(count: int, dim: int, seed: int = 0) -> list[list[float]]:
    draw = random.Random(seed)
    return [[draw.gauss(0, 1) for _ in range(dim)] for _ in range(count)]


def cloud(dim: int, *, steps: int = 1, paired: bool = True, count: int = 50) -> Cloud:
    z = points(count, dim)
    theirs = [[2 * value for value in one] for one in z] if paired else points(count, dim, 1)
    curve = [(k / 10, math.exp(-((k / 10) ** 2) / 2) / 2.5) for k in range(-40, 41)]
    mine = [[(2.1 if paired else 1.1) * value for value in one] for one in z]
    return Cloud(steps, z, mine, theirs, paired, curve if dim == 1 and not paired else [])


def outcome(method: str, setting: str, teacher: str, point: FixedPoint, **more) -> Outcome:
    case = Case(method, setting, teacher)
    rows = [row(case, "map error", 0.01, True), row(case, "average of weights", 0.0, True, None)]
    made = Outcome(case, rows, [], [], point, seconds=3.21, steps=1234)
    return replace(made, **more)


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    case = Case("reflow", ODD, "plane|file.yaml")
    bad = [row(case, ODD, 0.05, False, 4), row(case, "energy", None, False, 2)]
    broken = cloud(2)
    broken.x[3] = [NAN, 0.0]
    broken.x[4] = [math.inf, math.inf]
    straight = FixedPoint("map", straight=True)
    return [
        outcome("denoising", "flow", "gaussian", FixedPoint("field")),
        outcome(
            "reflow", "pairs", "gmm1d", straight, clouds=[cloud(1, steps=n) for n in (1, 2, 4)]
        ),
        outcome("reflow", ODD, "plane|file.yaml", straight, rows=bad, clouds=[broken]),
        outcome("dmd", "one step", "gmm1d", FixedPoint("law"), clouds=[cloud(1, paired=False)]),
        outcome(
            "dmd",
            "guided",
            "space",
            FixedPoint("law", covers=True),
            clouds=[cloud(3, paired=False)],
            notes=[f"class 0: {ODD} has no closed form"],
        ),
        outcome("dmd", "nothing", "space", FixedPoint("law"), rows=[]),
    ]


@pytest.fixture(scope="module")
def page(outcomes, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("proof") / "report.html"
    write_page(path, outcomes, FACTS)
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def markdown(outcomes, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("proof") / "docs" / "PROOF.md"
    write_markdown(path, outcomes, FACTS)
    return path.read_text("utf-8")


def drawings(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(one) for one in re.findall(r"<svg.*?</svg>", text, re.S)]


def starts(svg: ElementTree.Element, kind: str) -> list[tuple[float, float]]:
    """Where the subpaths of a path begin."""
    (path,) = (one for one in svg if one.get("class") == kind)
    found = re.findall(r"M([-\d.]+) ([-\d.]+)", path.get("d"))
    return [(float(x), float(y)) for x, y in found]


# The page -----------------------------------------------------------------------------------------


def test_page_needs_nothing_and_escapes_names(page: str) -> None:
    assert page.startswith("<!DOCTYPE html>") and page.endswith("</html>\n")
    assert not re.search(r"<script|<link|src=|url\(|@import", page)
    assert "<b>|" not in page and escape(ODD) in page
    assert "torch &lt;2&gt;" in page and "<code>stepdistill prove --all</code>" in page
    main = page[page.index("<main>") : page.index("</main>") + 7]
    ElementTree.fromstring(main)  # tags nest, nothing is left open


def test_header_names_every_figure_that_falls_short_before_all_else(page: str) -> None:
    head = page[: page.index("</header>")]
    assert "2 of 10 figures fall short" in head and "8 figures hold" in head
    body = head[head.index("<main>") :]
    table = body[body.index("<table") : body.index("</table>")]
    assert table.count('<tr class="short">') == 2 and "holds" not in table
    assert f"{escape(ODD)} <small>4 steps" in table and "2.50×" in table
    assert "energy <small>2 steps" in table and "not finite" in table
    assert body.index("<table") < body.index('class="lines"')
    assert re.search(r'href="#(case-2)"', table) and 'id="case-2"' in page


def test_header_without_shortfalls(outcomes, tmp_path) -> None:
    write_page(tmp_path / "p.html", outcomes[:2], {})
    text = (tmp_path / "p.html").read_text("utf-8")
    head = text[text.index("<main>") : text.index("</header>")]
    assert "All 4 figures hold" in head and "<table" not in head
    assert "falls short" not in text
    write_page(tmp_path / "none.html", [], {})
    assert "Nothing could be judged" in (tmp_path / "none.html").read_text("utf-8")


def test_every_row_is_there_with_its_verdict(page: str, outcomes) -> None:
    cases = re.findall(r'<article class="case".*?</article>', page, re.S)
    assert len(cases) == len(outcomes)
    for text, one in zip(cases, outcomes, strict=True):
        assert len(re.findall(r'<tr class="(?:holds|short)">', text)) == len(one.rows)
        assert text.count(">falls short<") == len(one.short)
        for each in one.rows:
            assert escape(each.quantity) in text
        assert "1,234 training steps, 3.21 s" in text
        assert all(escape(note) in text for note in one.notes)
    assert "nothing could be judged" in cases[-1]


def test_squares_count_the_figures(page: str, outcomes) -> None:
    svgs = [one for one in drawings(page) if one.get("class") == "verdicts"]
    judged = [one for one in outcomes if one.rows]
    assert len(svgs) == len(judged)
    for svg, one in zip(svgs, judged, strict=True):
        assert len(starts(svg, "short")) == len(one.short)
        assert len(starts(svg, "holds")) == len(one.rows) - len(one.short)


def test_pictures_are_labelled_and_of_fewest_and_most_steps(page: str) -> None:
    svgs = [one for one in drawings(page) if "cloud" in one.get("class")]
    labels = [one.get("aria-label") for one in svgs]
    assert labels == [one[0].text for one in svgs] and all(labels)
    assert [label for label in labels if "2 steps" in label] == []
    assert sum(label.startswith("reflow, pairs on gmm1d") for label in labels) == 4
    assert len(svgs) == 4 + 1 + 2 + 1
    assert "first 2 of 3 coordinates" in labels[-1]


def test_pages_and_tables_are_the_same_again(page: str, markdown: str, outcomes, tmp_path) -> None:
    write_page(tmp_path / "p.html", outcomes, FACTS)
    write_markdown(tmp_path / "p.md", outcomes, FACTS)
    assert (tmp_path / "p.html").read_text("utf-8") == page
    assert (tmp_path / "p.md").read_text("utf-8") == markdown


# Pictures -----------------------------------------------------------------------------------------


def drawn(one: Cloud) -> list[tuple[ElementTree.Element, str]]:
    return [(ElementTree.fromstring(p.svg), p.caption) for p in pictures("a <b>", "m0", [one])]


def test_histogram_has_the_mass_of_the_samples_inside() -> None:
    values = [value for (value,) in points(500, 1)]
    assert sum(bins(values, (-9, 9), 30)) * 18 / 30 == pytest.approx(1)
    share = sum(-1 <= value <= 1 for value in values) / 500
    assert sum(bins(values, (-1, 1), 8)) * 2 / 8 == pytest.approx(share)
    assert bins([1.0], (0, 1), 4) == [0, 0, 0, 4]  # the upper end belongs to the last bin


def test_bars_have_unit_area_beside_the_density() -> None:
    """Read off the drawing: in the units of the curve, whose own area is known."""
    (svg, _), _ = drawn(cloud(1, paired=False, count=400))

    def area(kind: str) -> float:
        (path,) = (one for one in svg if one.get("class") == kind)
        ends = [tuple(map(float, p.split())) for p in path.get("d").strip("MZ").split("L")]
        base = max(y for _, y in ends)
        return sum(
            (x2 - x1) * (base - (y1 + y2) / 2)
            for (x1, y1), (x2, y2) in zip(ends, ends[1:], strict=False)
        )

    assert area("bars") / area("theory") == pytest.approx(2.5 / math.sqrt(2 * math.pi), rel=0.02)


def test_plane_has_one_unit_length_and_all_samples() -> None:
    x, y = equal([(-4.0, 2.0), (0.0, 1.0)])
    assert x(1) - x(0) == pytest.approx(y(0) - y(1))
    assert x(-1) == pytest.approx((x.start + x.stop) / 2) and y(0.5) == pytest.approx(
        (y.start + y.stop) / 2
    )
    one = cloud(2)
    ((svg, _),) = drawn(one)
    assert len(starts(svg, "mine")) == len(starts(svg, "quiet")) == 50
    x, y = equal(window([Sound.of(one)]))
    assert starts(svg, "mine")[7] == pytest.approx((x(one.x[7][0]), y(one.x[7][1])), abs=0.06)


def test_pairs_are_joined_and_laws_are_not() -> None:
    ((svg, _),) = drawn(cloud(2))
    assert starts(svg, "gaps") == starts(svg, "quiet")
    ((svg, _),) = drawn(cloud(2, paired=False))
    assert not [one for one in svg if one.get("class") == "gaps"]


def test_map_on_a_line_is_a_curve_unless_later_noise_counts() -> None:
    smooth = cloud(1)
    (_, (svg, _)) = drawn(smooth)
    assert len(starts(svg, "theory")) == 1 and len(starts(svg, "mine")) == 50
    (_, (svg, caption)) = drawn(replace(smooth, expected=points(50, 1, 9)))
    assert "later noise counts too" in caption
    assert len(starts(svg, "quiet")) == len(starts(svg, "gaps")) == 50


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("paired", [True, False])
def test_samples_that_are_not_finite_are_left_out_and_counted(dim: int, paired: bool) -> None:
    one = cloud(dim, paired=paired)
    one.x[3], one.x[8] = [NAN] * dim, [-math.inf] * dim
    for svg, caption in drawn(one):
        assert "2 of 50 not finite" in caption
        text = ElementTree.tostring(svg, "unicode")
        assert not re.search(r"\b(nan|inf)\b", text)
    assert len(starts(svg, "mine")) == 48
    ((svg, caption),) = drawn(replace(one, x=[[NAN] * dim for _ in one.x]))
    assert "no sample is finite" in svg.get("aria-label") and "50 lost" in caption


def test_far_samples_do_not_shrink_the_picture() -> None:
    one = cloud(2, paired=False)
    before = window([Sound.of(one)])
    one.x[0] = [1e30, 1e30]
    ((_, caption),) = drawn(one)
    assert "1 outside" in caption
    assert window([Sound.of(one)])[0][1] < before[0][1] + 5


def test_bars_far_above_the_density_are_cut_and_say_so() -> None:
    one = cloud(1, paired=False)
    assert "cut" not in drawn(one)[0][1]
    (svg, caption), _ = drawn(replace(one, x=[[0.5]] * 50))
    assert "bars are cut" in caption and 'class="theory"' in ElementTree.tostring(svg, "unicode")


def test_one_place_for_all_samples_can_be_drawn() -> None:
    for dim in (1, 2):
        still = [[0.5] * dim] * 5
        for paired in (True, False):
            assert drawn(Cloud(1, still, still, still, paired, []))
            assert drawn(Cloud(1, [[0.0] * dim] * 5, still, still, paired, [(0.5, math.inf)]))
    assert list(pictures("none", "m0", [])) == []


# Words --------------------------------------------------------------------------------------------


def test_markdown_begins_with_its_command_and_has_every_row(markdown: str, outcomes) -> None:
    first = markdown.partition("\n")[0]
    assert "`stepdistill prove --all`" in first
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [row for one in outcomes for row in one.rows]
    assert len(lines) == 2 + len(outcomes) + 2 * 3 + len(rows)
    cells = [len(re.split(r"(?<!\\)\|", line)) - 2 for line in lines]
    assert cells == [6] * (2 + len(outcomes)) + [8] * (2 * 3 + len(rows))
    assert sum("| **falls short** |" in line for line in lines) == 2
    assert sum(line.endswith("| holds |") for line in lines) == len(rows) - 2
    assert "**2 of 2 fall short**" in markdown and "not finite" in markdown
    assert "2 of 10 figures fall short" in markdown


def test_markdown_shows_names_as_they_are(markdown: str) -> None:
    told = r'a\<b\>\|"c" &amp; d\_'
    assert told in markdown and ODD not in markdown
    assert unescape(re.sub(r"\\(.)", r"\1", told)) == ODD
    assert rf"- guided on space: class 0: {told} has no closed form" in markdown
    assert "- versions: torch \\<2\\>" in markdown


def test_a_command_with_backticks_stays_code(tmp_path, outcomes) -> None:
    write_markdown(tmp_path / "p.md", outcomes, {"command": "prove `x`"})
    assert "`` prove `x` ``" in (tmp_path / "p.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not finite"),
        (0.0, "0"),
        (1.0, "1"),
        (0.0504321, "0.05043"),
        (1e-3, "0.001"),
        (-2.236e-7, "-2.2e-7"),
        (3e-12, "3.0e-12"),
    ],
)
def test_figures(value, text: str) -> None:
    assert figure(value) == text


def test_theory_says_what_the_fixed_points_say(outcomes) -> None:
    assert theory(outcomes[:1]).startswith("The network is the exact denoiser")
    told = theory(outcomes[1:3])
    assert "its own image" in told and "Euler’s" in told and "straight" in told
    assert "no mode" in theory(outcomes[3:]) and "no mode" not in theory(outcomes[3:4])
    heun = replace(outcomes[1], point=FixedPoint("map", solver="heun"))
    assert "Euler’s or Heun’s steps" in theory([outcomes[1], heun])
    levels = replace(outcomes[3], point=FixedPoint("law", levels=(0.5,)))
    assert "hands over" in theory([levels])


def test_headlines(outcomes) -> None:
    good, bad = outcomes[0].rows, outcomes[2].rows
    assert headline(good[:1]) == "The one figure holds"
    assert headline(good + bad[:1]) == "1 of 3 figures falls short"


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_paths_of_teacher_and_student_stand_side_by_side(dim) -> None:
    """On a line over time, else in the plane; one that is not finite is left out and told."""
    times = [1.0, 0.5, 0.0]
    lines = [
        Lines(whose, times, [[[value * t] * dim for t in times] for value in (1.0, -2.0, last)])
        for whose, last in (("student", NAN), ("teacher", 3.0))
    ]
    theirs, mine = paths("x", "m0", lines)
    assert "paths of the teacher" in theirs.caption and "not finite" not in theirs.caption
    assert "paths of the student" in mine.caption and "1 not finite, left out" in mine.caption
    assert ("from noise at 0 to image at 1" in mine.caption) == (dim == 1)
    for drawn, kind, count in ((theirs, "theirs", 3), (mine, "way", 2)):
        svg = ElementTree.fromstring(drawn.svg)
        (track,) = [part for part in svg.iter("path") if part.get("class") == kind]
        assert track.get("d").count("M") == count and track.get("d").count("L") == 2 * count
    assert list(paths("x", "m0", [])) == []
