"""What `bench step` has measured, as a section of a Markdown file: a row a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from stepdistill.commands.students_table import replace_section
from stepdistill.run.versions import versions

TITLE = "What a step costs"
HEAD = (
    "| config | batch | ms a step | over passes and optimizers | student's peak over its own pass "
    "| critic's turn over its passes | rounds, threads | measured |"
)
TEXT = (
    "By `stepdistill bench step CONFIG [KEY=VALUE ...] --markdown FILE`: a whole step's median "
    "time over that of the bare network passes and optimizer updates which the method declares, "
    "timed in turn in one process (in brackets the middle half of the rounds); the student's turn "
    "at its peak of memory over its forward and backward alone; and, with a discriminator, the "
    "fake score's turn over its passes."
)


def keep(
    file: Path,
    config: str,
    overrides: Sequence[str],
    batch: int,
    figures: Mapping[str, float],
    spread: tuple[float, float],
    rounds: int,
    threads: int,
) -> None:
    """Put a measurement into the file's section, in place of an older one of the same settings.

    Args:
        file: Markdown; made if missing.
        config: its name.
        overrides: its keys that were set.
        batch: size of the batch.
        figures: medians in seconds and ratios by name, as ``bench step`` returns them.
        spread: lowest and highest ratio of the middle half.
        rounds: of the measurement.
        threads: of torch.
    """
    name = f"`{' '.join([config, *overrides])}`"
    low, high = spread
    peak = ratio(figures.get("student peak"), figures.get("student alone"))
    cells = [
        name,
        str(batch),
        f"{1e3 * figures['step']:.1f}",
        f"{figures['ratio']:.3f} ({low:.3f} to {high:.3f})",
        peak,
        f"{figures['critic ratio']:.3f}" if "critic ratio" in figures else "",
        f"{rounds}, {threads}",
        f"{date.today()}, {versions()}",
    ]
    row = f"| {' | '.join(cells)} |"
    rows = [old for old in held(file) if not old.startswith(f"| {name} |")]
    lines = [f"## {TITLE}", "", TEXT, "", HEAD, "| --- |" + " ---: |" * 6 + " --- |"]
    replace_section(file, "\n".join([*lines, *sorted([*rows, row])]))


def ratio(above: float | None, below: float | None) -> str:
    """One figure over another; nothing where there is none."""
    return f"{above / below:.3f}" if above and below else ""


def held(file: Path) -> list[str]:
    """The rows of the file's section."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    _, _, behind = text.partition(f"## {TITLE}\n")
    section = behind.split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| `")]
