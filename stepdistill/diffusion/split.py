"""Split: a teacher of two networks, one for the noisier times and one for the cleaner ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import expand


class Split(Denoiser):
    """A denoiser whose answer at a time is that of the network that owns the time.

    Asked of times on both sides it asks both networks and takes each row from the one that owns
    it; :meth:`only` and :meth:`at` ask one. ``net`` is the noisier side's.

    Args:
        high: owns the times above ``boundary``.
        low: owns the rest.
        boundary: a time of their process.

    Raises:
        ValueError: they differ in process, output, sample shape or classes.
    """

    def __init__(self, high: Denoiser, low: Denoiser, boundary: float) -> None:
        other = _difference(high, low)
        if other is not None:
            raise ValueError(other)
        super().__init__(
            high.net,
            high.process,
            high.head.name,
            adapter=high.adapter,
            classes=high.classes,
            null_label=high.null_label,
        )
        self.parts = nn.ModuleList([high, low])
        self.boundary = boundary
        self._asked: int | None = None

    def part(self, place: int) -> Denoiser:
        """The noisier side's denoiser, 0, or the other, 1."""
        found = self.parts[place]
        assert isinstance(found, Denoiser)
        return found

    def at(self, level: float) -> Denoiser:
        """The denoiser that owns the time ``level``."""
        return self.part(0 if level > self.boundary + 1e-9 else 1)

    @contextmanager
    def only(self, place: int) -> Iterator[None]:
        """While open, all times asked of are of one side: one network is called."""
        self._asked = place
        try:
            yield
        finally:
            self._asked = None

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Denoiser.raw`."""
        if self._asked is not None:
            return self.part(self._asked).raw(x_t, t, cond)
        high, low = (self.part(place).raw(x_t, t, cond) for place in (0, 1))
        return torch.where(expand(t > self.boundary, high), high, low)


def _difference(high: Denoiser, low: Denoiser) -> str | None:
    """What keeps two denoisers from being parts of one, in words."""
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64) * high.process.t_max
    pairs = {
        "corruption": (high.process.name, low.process.name),
        "sample shape": (high.sample_shape, low.sample_shape),
        "output": (high.head.name, low.head.name),
        "classes": (high.classes, low.classes),
        "label of no class": (high.null_label, low.null_label),
    }
    for name, (one, two) in pairs.items():
        if one != two:
            return f"its {name} is {two}, the other's {one}"
    if not torch.allclose(high.process.log_snr(t), low.process.log_snr(t), rtol=1e-5, atol=1e-5):
        return "its noise schedule is another"
    return None
