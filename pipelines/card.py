"""The model card: README.md of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

ROW_TITLES = ("step", "network", "time", "input scale", "alpha", "sigma", "a", "b")
NOISE_WORDS = {
    "predicted": "the noise that the network predicts (a deterministic walk)",
    "fresh": "fresh Gaussian noise at every step",
    "initial": "the noise that the walk started from",
    "heun": "the noise that the network predicts, by Heun's steps of two passes each",
}


def model_card(
    *,
    title: str,
    folder: str,
    teacher: str,
    method: str,
    data: str,
    command: str,
    default_steps: int,
    classes: Sequence[str] | None = None,
    grids: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    noise: str | None = None,
    stock: str | None = None,
    figures: Sequence[Mapping[str, Any]] = (),
    degrade: Mapping[str, Any] | None = None,
    usage: str | None = None,
) -> str:
    """Markdown with a YAML header.

    Args:
        title: heading.
        folder: what the use example loads: a path or a name on the hub.
        teacher: the model this one was distilled from, or "none".
        method: the training method's name.
        data: what it was trained on.
        command: the command line that made the folder.
        default_steps: number of steps when none is asked for.
        classes: class names by label, if the model takes labels.
        grids: a literal scheduler's grids; None for a stock scheduler.
        noise: that scheduler's noise source: predicted, fresh, initial or heun.
        stock: name of the stock scheduler that walks these grids in its place.
        figures: measured rows, each a mapping from column to value.
        degrade: how the pictures were made small that the model makes large.
        usage: of a pipeline of diffusers' own class, how it is called, in Python.
    """
    tags = ["stepdistill", "diffusers", "image-generation", method]
    header = {"library_name": "diffusers", "tags": tags}
    facts = [("teacher", teacher), ("method", method), ("data", data)]
    facts += [("classes", ", ".join(classes))] if classes else []
    facts += [("input", _input(degrade))] if degrade else []
    facts += [("steps", _steps(default_steps, grids))]
    facts += [("noise between steps", NOISE_WORDS[noise])] if noise else []
    set_to = "set to `walks` of model_index.json" if usage is None else "set as below"
    facts += [("scheduler", f"{stock}, {set_to}")] if stock else []
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {title}",
        table(("", ""), facts),
        "## Use",
        _fenced(usage) if usage else _example(folder, default_steps, classes, small=bool(degrade)),
        *([_carried("scheduler" if usage else "pipeline")] if not (usage and stock) else []),
    ]
    if grids:
        parts += ["## Sampling grid", _grid_text(grids)]
    if figures:
        columns = list(dict.fromkeys(column for row in figures for column in row))
        cells = ([row.get(column, "") for column in columns] for row in figures)
        parts += ["## Figures", table(columns, list(cells))]
    return "\n\n".join([*parts, "## Made by", f"```sh\n{command}\n```"]) + "\n"


def _carried(what: str) -> str:
    return (
        f"The folder carries its own {what} class, which needs torch and diffusers only; "
        "`trust_remote_code=True` lets diffusers run it."
    )


def _fenced(code: str) -> str:
    return f"```python\n{code}```"


def _input(degrade: Mapping[str, Any]) -> str:
    how = f"by halvings ({degrade['kernel']})"
    return f"pictures {degrade['factor']} times smaller each way, {how}"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers are shown to six digits."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _steps(default: int, grids: Mapping[str, Any] | None) -> str:
    if grids is None:
        return f"any number, {default} if none is given"
    return f"{', '.join(sorted(grids, key=int))}; {default} if none is given"


def _example(
    folder: str, default_steps: int, classes: Sequence[str] | None, *, small: bool = False
) -> str:
    some = json.dumps(list(classes or ())[:4], ensure_ascii=False)
    asked = f"class_labels={some}" if classes else "num_images=4"
    asked = 'Image.open("small.png")' if small else asked
    more = "from PIL import Image\n" if small else ""
    where = json.dumps(folder, ensure_ascii=False)
    return (
        "```python\n"
        f"from diffusers import DiffusionPipeline\n{more}"
        f"pipe = DiffusionPipeline.from_pretrained({where}, trust_remote_code=True)\n"
        f"images = pipe({asked}, num_inference_steps={default_steps}).images\n"
        'images[0].save("image.png")\n'
        "```"
    )


def _grid_text(grids: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lead = (
        "The network's output is h = a x + b z for the clean part x and the noise z of its state "
        "alpha x + sigma z; each step solves for x and z and goes to the next row's alpha x + "
        "sigma n. The last step gives x."
    )
    keys, titles = ["time", "scale", "alpha", "sigma", "a", "b"], list(ROW_TITLES)
    if any("end" in row for rows in grids.values() for row in rows):
        keys, titles = [*keys, "end"], [*titles, "end"]
        lead += (
            " The network is also told, by the embedding in extra/, where the step ends: how far "
            "that is, in rectified flow's time."
        )
    tables = []
    for steps in sorted(grids, key=int):
        rows = [
            (i, "model" if row["expert"] == 0 else f"model_{row['expert'] + 1}")
            + tuple(row.get(key, "") for key in keys)
            for i, row in enumerate(grids[steps], start=1)
        ]
        count = f"**{steps} step{'' if steps == '1' else 's'}**"
        tables.append(f"{count}\n\n{table(titles, rows)}")
    return "\n\n".join((lead, *tables))
