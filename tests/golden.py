"""The losses of every method's first twenty steps, kept in tests/golden/METHOD.json.

    python -m tests.golden [METHOD ...]            # says how far the losses are from the files
    python -m tests.golden --write [METHOD ...]    # and then writes the files anew

It ends with 1 if anything differs, also where it wrote. A file is to change only together with
what a method computes; the tests compare, and write nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepdistill.losses.distance import Distance
from stepdistill.trainers.find import methods, trainer
from tests.helpers import SEEING, batch_of, cases, make, mlp_teacher, seeing_teacher

FOLDER = Path(__file__).with_name("golden")
STEPS, SLACK = 20, 1e-6
KEPT = re.compile(r"\w+/(loss|gap|direction|distance|grad_norm)")
STEADY = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-2}
SMOOTH = {"optim": STEADY, "critic": STEADY, "discriminator": STEADY}
SMOOTH |= {"weight": "one"}
HUBER = {"kind": "pseudo_huber", "scale": 1.0}
"""Settings, where a method has them, under which rounding stays what it is: an Adam whose first
updates are no signs, a distance without a kink, and no weight that grows as a gap closes."""

WIDE = {"difference_step": 0.5, "norm_floor": 1.0}
"""In place of a proof's short differences, which enlarge rounding by four over their step."""

Curve = dict[str, list[float | None]]
"""Values by name, one a step; None at steps that do not log the name."""


@dataclass(frozen=True)
class Difference:
    """Where two curves are furthest apart; relative where the old value is above 1."""

    size: float
    step: int
    name: str
    old: float | None
    new: float | None

    def __str__(self) -> str:
        """One line of words."""
        return f"{self.size:.2g} at step {self.step}, {self.name}: {self.old} -> {self.new}"


def smooth(method: str) -> dict[str, Any]:
    """The settings above that a method has."""
    fields = trainer(method).Config.model_fields
    found = {key: value for key, value in SMOOTH.items() if key in fields}
    distances = [key for key in ("distance", "metric") if key in fields]
    return found | {
        key: HUBER
        for key in distances
        if isinstance(fields[key].get_default(call_default_factory=True), Distance)
    }


def curve(method: str, keys: dict[str, Any], *, jitter: float = 0.0) -> Curve:
    """Train on the small teacher and keep the losses: CPU, fp32, one thread.

    ``jitter`` is a relative change of the teacher's weights, as another rounding would make it.
    """
    if keys.get("derivative") == "upwind":
        keys = keys | WIDE
    teacher = seeing_teacher() if method in SEEING else mlp_teacher()
    generator = torch.Generator().manual_seed(1)
    for param in teacher.net.parameters():
        param.data *= 1 + jitter * torch.randn(param.shape, generator=generator)
    made, found = make(method, teacher, steps=STEPS, **{**smooth(method), **keys}), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in range(STEPS):
            made.prepare(step)
            for name, value in made.step(step, batch_of(made, step)).items():
                if KEPT.fullmatch(name):
                    number = float(f"{float(value):.9g}")  # all that fp32 holds
                    found.setdefault(name, [None] * STEPS)[step] = number
    finally:
        torch.set_num_threads(threads)
    return found


def curves(method: str) -> dict[str, Curve]:
    """The curve of every case of a method."""
    return {case: curve(method, keys) for case, keys in cases(method).items()}


def kept(method: str) -> dict[str, Curve]:
    """What the file of a method holds; nothing where there is none."""
    file = FOLDER / f"{method}.json"
    return json.loads(file.read_text(encoding="utf-8"))["cases"] if file.is_file() else {}


def differences(old: Curve, new: Curve) -> Iterator[Difference]:
    """Every step of every name of the old curve; what is missing on one side is infinitely far."""
    for name, values in old.items():
        for step, (a, b) in enumerate(zip(values, new.get(name, [None] * STEPS), strict=True)):
            if a is None or b is None:
                size = 0.0 if a is b else math.inf
            else:
                size = abs(a - b) / max(1.0, abs(a))
            yield Difference(math.inf if math.isnan(size) else size, step, name, a, b)


def furthest(old: Curve, new: Curve) -> Difference:
    """The largest of the :func:`differences`."""
    return max(differences(old, new), key=lambda difference: difference.size)


def compare(old: dict[str, Curve], new: dict[str, Curve]) -> Iterator[tuple[str, bool]]:
    """A line on every case, and whether it is as it was; a name that is new is only told."""
    for case in sorted({*old, *new}):
        if case not in old or case not in new:
            yield f"{case}: {'new' if case in new else 'gone'}", False
            continue
        apart = furthest(old[case], new[case])
        fresh = sorted(set(new[case]) - set(old[case]))
        told = f"; not in the file: {', '.join(fresh)}" if fresh else ""
        yield f"{case}: {apart}{told}", apart.size <= SLACK


def write(method: str, found: dict[str, Curve]) -> None:
    """Write the file of a method, one line a name."""
    made = f"torch {torch.__version__} on {platform.machine()}, CPU, fp32, one thread"
    text = json.dumps({"made_with": made, "cases": found}, indent=1)
    text = re.sub(r"\[[^\[\]]*\]", lambda row: f"[{' '.join(row[0][1:-1].split())}]", text)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{method}.json").write_text(text + "\n", encoding="utf-8")


def main(args: Sequence[str]) -> int:
    """The command; 0 if all is as it was."""
    names = [method.name for method in methods()]
    parser = argparse.ArgumentParser("python -m tests.golden", description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(names))
    parser.add_argument("--write", action="store_true", help="write the files anew")
    asked, same = parser.parse_args(args), True
    if unknown := set(asked.methods) - set(names):
        parser.error(f"unknown method {', '.join(sorted(unknown))}")
    for method in asked.methods or names:
        found = curves(method)
        for line, kept_as_it_was in compare(kept(method), found):
            print(f"{method} {line}{'' if kept_as_it_was else '  DIFFERS'}")
            same &= kept_as_it_was
        if asked.write:
            write(method, found)
    return int(not same)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
