"""The page of a run: whole, self-contained, and right while the run still goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from stepdistill.commands.run_report import report, verdict
from stepdistill.run.bands import MEANINGS, Band
from stepdistill.run.errors import UserError
from tests.children import stepdistill
from tests.test_report import Page

SMALL = "steps=4 batch_size=4 log.every_steps=1 log.tensorboard=false sample.every_steps=1".split()
SMALL += "sample.num=4 sample.teacher_steps=1 eval.every_steps=2 eval.num=65".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("page")
    for method in ("phased_dmd", "reflow"):
        pairs = ["pairs.num=8", "pairs.steps=1"] if method == "reflow" else []
        done = stepdistill(
            "train", f"{method}-digits", f"run={method}", *SMALL, *pairs, folder=base
        )
        assert done.code == 0, done
    return base


def test_the_page_of_a_run(folder) -> None:
    done = stepdistill("report", "phased_dmd", folder=folder)
    assert (done.code, done.out) == (0, "phased_dmd/report.html\n"), done
    html = (folder / "phased_dmd" / "report.html").read_text("utf-8")
    page = Page(html)
    text = re.sub(r"\s+", " ", page.text)
    for word in ("finished", "0 updates skipped", "digits-dit", "torch ", "sha256", "phase_steps"):
        assert word in text
    for name, meaning in MEANINGS.items():
        assert name in text and meaning.text in text and meaning.above in text
    pictures = [item for tag, item in page.tags if tag == "img"]
    assert len(pictures) == 3 and all(p["src"].startswith("data:image/png;") for p in pictures)
    assert text.count("steps of training") >= 9 and "fd-digits/4" in text
    assert len([item for tag, item in page.tags if item.get("class") == "band"]) == 4
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "base"}
    assert "//" not in re.sub(r'base64,[^"]*', "", html)
    again = stepdistill("report", "phased_dmd", folder=folder)
    assert again.code == 2 and "report.html exists; choose another file with --out" in again.err
    assert stepdistill("report", "phased_dmd", "--overwrite", folder=folder).code == 0
    assert stepdistill("report", "phased_dmd", "--out", "x.html", folder=folder).code == 0
    assert (folder / "x.html").read_text("utf-8") == html


def test_a_run_without_a_fake_score_or_not_yet_finished(folder, tmp_path) -> None:
    text = Page(report(folder / "reflow", tmp_path / "a.html").read_text("utf-8")).text
    assert "student/loss" in text and "student/lag" not in text and "skipped_share" in text
    assert re.search(r"straightness 0\.\d{4} \(teacher\) and 0\.\d{4} \(student\)", text)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "log.jsonl"):
        content = (folder / "phased_dmd" / name).read_text()
        (run / name).write_text(content)
    lines = (run / "log.jsonl").read_text().splitlines()
    nulls = json.loads(lines[0])
    nulls["losses"] = dict.fromkeys(nulls["losses"])
    (run / "log.jsonl").write_text(json.dumps(nulls) + "\n" + lines[1] + "\n")
    text = Page(report(run).read_text("utf-8")).text
    assert "2 of 4 steps so far" in text


def test_what_cannot_be_reported(folder, tmp_path) -> None:
    with pytest.raises(UserError, match="no config.yaml, so this is no run"):
        report(tmp_path)
    (tmp_path / "config.yaml").write_text((folder / "reflow" / "config.yaml").read_text())
    with pytest.raises(UserError, match=r"log.jsonl has no rows: the first comes after"):
        report(tmp_path)
    with pytest.raises(UserError, match="no folder .*nowhere; make it first"):
        report(folder / "reflow", tmp_path / "nowhere" / "a.html")


def test_a_verdict_is_on_the_settled_rows() -> None:
    rows = [{"step": i, "losses": {"student/lag": 9.0 if i < 2 else 0.1}} for i in range(8)]
    assert verdict(rows, "student/lag", Band(-0.5, 0.5)) == (
        "good",
        "100% of the settled rows within −0.50 to 0.50; last 0.10",
    )
    assert verdict(rows, "student/lag", Band(0.2, 0.5))[0] == "bad"
    assert verdict(rows, "student/lag", None) == ("", "no band to compare with")
    assert verdict([], "student/lag", Band(0, 1)) == ("", "too few rows yet")
