"""The demo's report: whole, escaped, self-contained, and right whatever is missing."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from stepdistill.commands import charts
from stepdistill.commands.report import Curve, Grid, write_report
from stepdistill.commands.report_table import Figures
from stepdistill.run.errors import UserError

VOID = {"br", "img", "meta"}
BARE = {"path", "line", "circle"}  # of SVG, written <path/>


class Page(HTMLParser):
    """Checks that tags nest and keeps what a test asks for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag}: an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs) -> None:
        assert tag in BARE, tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data) -> None:
        if "style" not in self.open:
            self.texts.append(data)
        if "td" in self.open:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def row(method: str, steps: int, fd: float | None, **more) -> dict:
    base = {
        "model": f"the-{method}",
        "method": method,
        "steps": steps,
        "features": "digits",
        "fd": fd,
        "kid": 0.0012,
        "diversity": 5.8,
        "num": 2000,
        "train_seconds": None if method == "teacher" else 118.4,
    }
    return base | more


ROWS = [
    row("teacher", 1, 45.12, diversity=4.4),
    row("teacher", 4, 7.31),
    row("teacher", 32, 1.803, diversity=5.8),
    row("sim", 1, 2.61, diversity=5.7),
    row("reflow", 1, 6.84),
    row("reflow", 4, 3.21),
    row("phased_dmd", 4, 1.55),
]
LOSS = [(0.1 * n, 3.0 * math.exp(-0.01 * n)) for n in range(1, 500)]
CURVES = [Curve("sim", LOSS, [(10.0, 60.0), (20.0, 9.0), (30.0, 2.6)], 1.803)]


def png(width: int = 73, height: int = 37) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height), 128).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def page(tmp_path):
    """Writes a report with the given parts and reads it."""

    def write(**parts) -> Page:
        base = {
            "title": "Digits",
            "intro": "One.\n\nTwo.",
            "rows": ROWS,
            "grids": [Grid("sim, 1 step", "FD 2.61", png())],
            "curves": CURVES,
            "facts": {"Command": "make demo", "Seed": "0"},
        }
        path = tmp_path / "report.html"
        write_report(path, **(base | parts))
        assert [file.name for file in tmp_path.iterdir()] == ["report.html"]  # nothing temporary
        html = path.read_text("utf-8")
        found = Page(html)
        body = html.split("</style>")[1]
        assert not re.search(r"\b(nan|inf|None)\b", re.sub(r'base64,[^"]*', "", body), re.I)
        return found

    return write


def body_rows(page: Page) -> dict[tuple[int, str], list[str]]:
    """Cells of the table by (which group, method)."""
    found, group = {}, -1
    for cells in page.rows[1:]:
        group += not cells
        if cells:
            found[group, cells[0].split(" ")[0]] = cells
    return found


def test_every_row_is_there_with_the_teachers_beside_it(page) -> None:
    rows = body_rows(page())
    assert len(rows) == len(ROWS)
    assert list(rows)[:3] == [(0, "teacher"), (0, "sim"), (0, "reflow")]  # the teacher, then by FD
    assert list(rows)[-1] == (2, "teacher")
    name, fd, ratio, beside, kid, diversity, seconds = rows[0, "sim"]
    assert name == "sim the-sim"
    assert (fd, ratio, kid, seconds) == ("2.61", "1.45×", "1.20", "118 s")
    assert beside == "45.1 17.3× as far"
    assert diversity == "5.70−1.7 %"
    assert rows[0, "teacher"][1:4] == ["45.1", "25.0×", "–"]
    assert rows[0, "teacher"][-1] == "–"


def test_better_than_the_teacher_is_marked_and_worse_is_said(page) -> None:
    rows = body_rows(page(rows=[*ROWS, row("dmd", 4, 9.0)]))
    assert [key for key, cells in rows.items() if "better than the teacher" in cells[0]] == [
        (1, "phased_dmd")
    ]
    assert [key for key, cells in rows.items() if "the teacher is better" in cells[3]] == [
        (1, "dmd")
    ]


def test_header_names_the_best_at_each_number_of_steps(page) -> None:
    found = page()
    header = found.text.split("Distance to the data")[0]
    assert header.index("1.45×") < header.index("sim") < header.index("0.86×")
    assert "FD 1.55" in header and "FD 6.84" not in header
    assert [item["class"] for tag, item in found.tags if tag == "li"] == ["", "good"]


def test_says_what_fd_is(page) -> None:
    text = re.sub(r"\s+", " ", page().text)
    assert "between 2,000 samples and the 1,797 digits of scikit-learn" in text
    assert "It is not FID" in text


def test_needs_nothing_from_outside(page, tmp_path) -> None:
    found = page()
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "iframe", "object", "base"}
    html = (tmp_path / "report.html").read_text("utf-8")
    assert "//" not in re.sub(r'base64,[^"]*', "", html)
    assert not re.search(r"@import|url\(", html)
    sources = [item[key] for _, item in found.tags for key in ("src", "href") if key in item]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert "prefers-color-scheme: dark" in html


def test_escapes_whatever_it_is_given(page) -> None:
    evil = '<script>"&'
    rows = [*ROWS, row(evil, 1, 2.0, model=evil), row("sim", 2, 2.0, features=evil)]
    found = page(
        title=evil,
        intro=evil,
        rows=rows,
        grids=[Grid(evil, evil, png())],
        curves=[Curve(evil, LOSS, [(1.0, 2.0)], 1.8)],
        facts={evil: evil},
    )
    assert "script" not in {tag for tag, _ in found.tags}
    assert found.text.count(evil) >= 12


def test_charts_have_names_and_stay_inside(page) -> None:
    found = page()
    pictures = [item for tag, item in found.tags if tag == "svg" and item.get("role") == "img"]
    assert len(pictures) == 4  # the ladder twice, loss and FD
    assert "sim: 2.61 at 1" in found.text
    assert "FD of sim over seconds of training: 60.0 at first, 2.60 at the end" in found.text
    for tag, item in found.tags:
        if tag == "circle":
            assert 0 < float(item["cx"]) < 640 and 0 < float(item["cy"]) < 420


@pytest.mark.parametrize(
    "curve",
    [
        Curve("sim", [], [], 1.8),
        Curve("sim", [(5.0, 0.3)], [(5.0, 2.6)], 1.8),
        Curve("sim", [(0.0, 0.0)], [(0.0, 1.8)], 1.8),
        Curve("sim", [(1.0, -2.0), (2.0, -2.0)], [(1.0, 4.0), (2.0, 4.0)], math.nan),
        Curve("sim", [(1.0, math.nan), (2.0, math.inf)], [(1.0, math.inf), (2.0, 2.0)], 1.8),
        Curve("sim", [(n, (-1.0) ** n * 10.0**n) for n in range(9)], [(1.0, 1e7)], 1e-3),
    ],
    ids=["empty", "one point", "zeros", "flat and negative", "not finite", "wide"],
)
def test_curves_of_any_kind(page, curve: Curve) -> None:
    found = page(curves=[curve])
    known = [value for _, value in curve.loss if math.isfinite(value)]
    assert ("not measured" in found.text) == (not known)


def test_missing_figures_show_as_dashes(page) -> None:
    bare = row("dmd", 2, None, kid=None, diversity=None, train_seconds=None)
    rows = body_rows(page(rows=[*ROWS, bare, row("sim", 2, math.nan, kid=math.inf)]))
    assert rows[1, "dmd"][1:] == ["–"] * 6
    assert rows[1, "sim"][1:5] == ["–"] * 4


def test_parts_that_are_empty_are_left_out(page) -> None:
    found = page(rows=ROWS[:1], grids=[], curves=[], facts={})
    assert [tag for tag, _ in found.tags].count("section") == 1


@pytest.mark.parametrize(
    ("width", "kind", "shown"),
    [(73, "small", 219), (91, "small", 273), (280, "small", 280), (546, "large", 273)],
)
def test_pictures_are_scaled_by_whole_factors(page, width: int, kind: str, shown: int) -> None:
    found = page(grids=[Grid("a", "", png(width, 37))])
    (picture,) = [item for tag, item in found.tags if tag == "img"]
    assert (picture["width"], picture["height"]) == (str(width), "37")
    assert (picture["class"], picture["style"]) == (kind, f"width:{shown}px")


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({"rows": ROWS[3:]}, "no row with method"),
        ({"rows": [row("teacher", 4, 0.0)]}, "no row with method"),
        ({"grids": [Grid("a", "", b"GIF89a")]}, "grid 'a' is not a PNG"),
    ],
)
def test_refuses_what_it_cannot_show(page, tmp_path, parts, line: str) -> None:
    with pytest.raises(UserError, match=line):
        page(**parts)
    assert not list(tmp_path.iterdir())


def test_figures() -> None:
    figures = Figures.of(ROWS[::-1])
    assert (figures.most, figures.best, list(figures.teacher)) == (32, 1.803, [1, 4, 32])
    assert figures.ratio(ROWS[3]) == pytest.approx(2.61 / 1.803)
    assert figures.beside(ROWS[5]) == 7.31
    assert figures.beside(row("sim", 3, 2.0)) is None
    assert figures.spread(ROWS[3]) == pytest.approx(-100 / 58)
    assert [best["method"] for best in figures.best_by_steps()] == ["sim", "phased_dmd"]


@pytest.mark.parametrize(
    ("values", "log"),
    [([1, 21], True), ([1, 19], False), ([0, 21], False), ([-1, 50], False), ([3], False)],
)
def test_axis_is_log_where_values_are_positive_and_wide(values, log: bool) -> None:
    scale = charts.fit(values, 200.0, 10.0)
    assert scale.log == log
    assert 10 < scale(max(values)) <= scale(min(values)) <= 200
    assert len(scale.ticks()) >= 2
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks())


@pytest.mark.parametrize("span", [1.01, 3, 8, 40, 700, 3e4, 1e9, 1e30])
def test_number_of_ticks_on_a_log_axis(span: float) -> None:
    assert 2 <= len(charts.Scale(0.7, 0.7 * span, 0, 1, log=True).ticks()) <= 7


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    assert charts.apart([10, 100]) == [10, 100]
    assert charts.apart([10, 10]) == [2.5, 17.5]
    assert charts.apart([10, 20, 30, 200]) == [5, 20, 35, 200]
    assert charts.apart([0, 20, 20]) == pytest.approx([-1.6667, 13.3333, 28.3333], abs=1e-3)


def test_thinned_lines_keep_their_outline() -> None:
    few = [(0.0, 1.0), (1.0, 2.0), (2.0, 0.0)]
    assert charts.thinned(few) == few
    noisy = [(float(n), (-1.0) ** n * n) for n in range(10_000)]
    thin = charts.thinned(noisy)
    assert len(thin) <= 300 and thin == sorted(thin) and set(thin) <= set(noisy)
    assert {(9999.0, -9999.0), (9998.0, 9998.0)} <= set(thin)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (1.804, "1.80"),
        (9.996, "10.0"),
        (45.12, "45.1"),
        (99.96, "100"),
        (12345.6, "12,346"),
        (0.01234, "0.012"),
        (-0.5, "−0.50"),
        (2.5e7, "2.5e+07"),
    ],
)
def test_numbers_read_well(value: float, text: str) -> None:
    assert charts.number(value) == text


def test_running_mean() -> None:
    few = [(float(n), 1.0) for n in range(49)]
    assert charts.running_mean(few) is few
    line = [(float(n), 2.0 * n) for n in range(100)]
    mean = charts.running_mean(line)
    assert mean[50] == (50.0, 100.0)
    assert mean[0] == (0.0, 2.0)  # of the first three


@pytest.mark.parametrize(("steps", "shown"), [(1, 1), (4, 4), (32, 32), (1000, 64)])
def test_squares(steps: int, shown: int) -> None:
    assert charts.squares(steps).count("M") == shown
