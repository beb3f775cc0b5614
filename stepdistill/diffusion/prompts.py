"""Prompts by number: what the labels of a network that reads text stand for.

A text model is conditioned on rows of a table, as one with classes is on its labels: the last row
is that of no prompt. So whatever is drawn, kept, guided or dropped by label is by prompt too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stepdistill.adapters.cond import Cond

EMBEDDED = ("text", "mask", "pooled", "second", "sizes")  # what a row may hold


class Prompts:
    """Embeddings of prompts, kept in the type that they were made in.

    Args:
        captions: the prompts.
        rows: their embeddings [N + 1, ...], the last row that of no prompt.

    Raises:
        ValueError: rows for another number of prompts, or none.
    """

    def __init__(self, captions: Sequence[str], rows: Cond) -> None:
        self.captions = tuple(captions)
        self.kept = {torch.device("cpu"): rows}
        found = {len(value) for name in EMBEDDED if (value := getattr(rows, name)) is not None}
        if found != {len(self.captions) + 1}:
            raise ValueError(
                f"embeddings for {', '.join(map(str, sorted(found))) or 'no'} rows, and there are "
                f"{len(self.captions)} prompts and that of none"
            )

    @property
    def null(self) -> int:
        """The number of no prompt."""
        return len(self.captions)

    @property
    def rows(self) -> Cond:
        """The embeddings where they were made."""
        return self.kept[torch.device("cpu")]

    def digest(self) -> str:
        """Hash of captions and of their embeddings' kinds; on other machines digits differ."""
        found = ((name, getattr(self.rows, name)) for name in EMBEDDED)
        kinds = [(name, list(value.shape[1:])) for name, value in found if value is not None]
        return hashlib.sha256(json.dumps([self.captions, kinds]).encode()).hexdigest()[:16]

    def fill(self, cond: Cond) -> Cond:
        """Conditions whose labels [B] are numbers of prompts with the embeddings in their place.

        The table is taken to the labels' device when it is first asked there. Conditions that have
        embeddings already are let be.

        Raises:
            ValueError: neither labels nor embeddings.
        """
        if cond.text is not None:
            return cond
        if cond.label is None:
            raise ValueError("every sample needs the number of its prompt (cond.label)")
        device = cond.label.device
        if device not in self.kept:
            self.kept[device] = self.rows.map(lambda value: value.to(device))
        told = self.kept[device].rows(cond.label)
        own = {name: getattr(told, name) for name in EMBEDDED}
        return replace(cond, label=None, **own)

    def dump(self) -> bytes:
        """Captions and embeddings as a safetensors file."""
        found = {name: getattr(self.rows, name) for name in EMBEDDED}
        kept = {name: value.contiguous() for name, value in found.items() if value is not None}
        return save(kept, metadata={"captions": json.dumps(self.captions)})

    @classmethod
    def load(cls, file: Path) -> Prompts:
        """Read what :meth:`dump` gave.

        Raises:
            ValueError: another file.
        """
        rows: dict[str, Tensor] = {}
        try:
            with safe_open(file, "pt") as kept:
                captions = json.loads((kept.metadata() or {})["captions"])
                rows = {name: kept.get_tensor(name) for name in kept.keys() if name in EMBEDDED}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{file}: holds no prompts ({error}); make it again") from error
        return cls(captions, Cond(**rows))
