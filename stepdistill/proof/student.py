"""Small students: the teacher's own output and a correction that begins at zero.

So they begin as the teacher, like every student, and a fake score is exact again once the
student's law is the teacher's. On Gaussians the correction is affine, which holds the answer
exactly; elsewhere it is a small network.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.oracles.denoiser import Oracle, OracleAdapter
from stepdistill.proof.steps import Steps, affine
from stepdistill.run.rng import seeded

Kind = Literal["table", "smooth", "spline", "network"]

WIDE = 96  # hidden layers of networks that are told where a step ends, a function of more


class Table(nn.Module):
    """One affine map a class and grid time, linear in between: outputs [B, D] from x [B, D].

    Args:
        dim: coordinates D.
        labels: labels that it knows, that of no class included; 0 for none.
        cells: intervals of the grid over [0, 1].
    """

    def __init__(self, dim: int, labels: int, cells: int = 32) -> None:
        super().__init__()
        self.dim, self.cells = dim, cells
        self.maps = nn.Parameter(torch.zeros(max(1, labels), cells + 1, dim * (dim + 1)))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """See the class; t [B] in [0, 1]."""
        place = (t * self.cells).clamp(0, self.cells)
        low = place.long().clamp_max(self.cells - 1)
        row = torch.zeros_like(low) if label is None else label
        part = (place - low)[:, None]
        flat = torch.lerp(self.maps[row, low], self.maps[row, low + 1], part)
        return affine(flat, x)


class Smooth(nn.Module):
    """One affine map a class, a polynomial in time: outputs [B, D] from x [B, D].

    Args:
        dim: coordinates D.
        labels: labels that it knows, that of no class included; 0 for none.
        terms: Chebyshev polynomials that it is made of.
    """

    def __init__(self, dim: int, labels: int, terms: int = 6) -> None:
        super().__init__()
        self.dim, self.terms = dim, terms
        self.maps = nn.Parameter(torch.zeros(max(1, labels), terms, dim * (dim + 1)))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """See the class; t [B] in [0, 1]."""
        order = torch.arange(self.terms, device=t.device)
        basis = torch.cos((2 * t - 1).clamp(-1, 1).acos()[:, None] * order)
        row = torch.zeros(len(x), dtype=torch.long, device=x.device) if label is None else label
        return affine(torch.einsum("bk,bkm->bm", basis, self.maps[row]), x)


class Spline(nn.Module):
    """One affine map a class and knot, cubic B-splines of time: outputs [B, D] from x [B, D].

    Its derivative in time is as smooth as what it must learn, and each time has its own four maps,
    of splines that are all alike: those of :class:`Steps`, which end in the knots, learn slower.

    Args:
        dim: coordinates D.
        labels: labels that it knows, that of no class included; 0 for none.
        cells: intervals between knots over [0, 1].
    """

    def __init__(self, dim: int, labels: int, cells: int = 12) -> None:
        super().__init__()
        self.dim, self.cells = dim, cells
        self.maps = nn.Parameter(torch.zeros(max(1, labels), cells + 3, dim * (dim + 1)))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """See the class; t [B] in [0, 1]."""
        place = (t * self.cells).clamp(0, self.cells)
        low = place.long().clamp_max(self.cells - 1)
        u = place - low
        rising, falling = -3 * u**3 + 3 * u**2 + 3 * u + 1, 3 * u**3 - 6 * u**2 + 4
        shares = torch.stack([(1 - u) ** 3, falling, rising, u**3], dim=1) / 6
        row = torch.zeros_like(low) if label is None else label
        near = low[:, None] + torch.arange(4, device=t.device)
        return affine(torch.einsum("bk,bkm->bm", shares, self.maps[row[:, None], near]), x)


class Network(nn.Module):
    """Three hidden layers: outputs [B, D] from x [B, D], time and class.

    Args:
        dim: coordinates D.
        labels: labels that it knows, that of no class included; 0 for none.
        width: of the hidden layers.
        ends: whether it is told where a step ends; then nothing is added to one without length.
    """

    def __init__(self, dim: int, labels: int, width: int = 64, ends: bool = False) -> None:
        super().__init__()
        self.dim, self.labels, self.ends = dim, labels, ends
        sizes = [dim + (8 if ends else 4) + labels, width, width, width]
        pairs = zip(sizes, sizes[1:], strict=False)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.leave = nn.Linear(width, dim)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | None, way: Tensor | None = None
    ) -> Tensor:
        """See the class; t [B] and the step's length, way [B], in [0, 1]."""
        times = torch.stack([t] if way is None else [t, t - way], dim=1)
        angle = math.pi * torch.cat([times, 2 * times], dim=1)
        parts = [x, angle.sin(), angle.cos()]
        if self.labels and label is not None:
            parts.append(nn.functional.one_hot(label, self.labels).to(x))
        h = torch.cat(parts, dim=1)
        for layer in self.layers:
            h = nn.functional.silu(layer(h))
        out: Tensor = self.leave(h)
        return out if way is None else out * way[:, None]


class Corrected(nn.Module):
    """The output of a frozen oracle, or nothing, plus a correction.

    Args:
        base: the oracle's network; it is shared by copies and is no part of what is trained.
        fix: the correction.
        span: the process's largest time.
    """

    def __init__(self, base: nn.Module | None, fix: nn.Module, span: float) -> None:
        super().__init__()
        self.held, self.fix, self.span = (base,), fix, span  # the tuple keeps it out of the tree
        self.values: Mapping[str, Tensor] | None = None
        self.twin: nn.Module | None = None  # the correction of samples that are the student's own
        self.rise: nn.Module | None = None  # what is added to it for each unit of guidance
        self.walk: nn.Module | None = None  # the same for what tells a number of steps

    def __deepcopy__(self, memo: dict[int, Any]) -> Corrected:
        other = Corrected(self.held[0], copy.deepcopy(self.fix, memo), self.span)
        parts = (self.twin, self.rise, self.walk)
        other.twin, other.rise, other.walk = copy.deepcopy(parts, memo)
        return other

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return (int(self.fix.dim),)  # type: ignore[arg-type]

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Raw output [B, D] at states [B, D] and process times [B]."""
        told = () if self.values is None or "end" not in self.values else (self.values["end"],)
        fix: Tensor = self.fix(x_t, t / self.span, label, *told)
        if self.twin is not None and self.values is not None and "twin" in self.values:
            own = self.twin(x_t, t / self.span, label)
            fix = torch.where(self.values["twin"][:, None] > 0, own, fix)
        if self.rise is not None and self.values is not None:
            units = 1 / (1 - self.values["guidance"]) - 1
            fix = fix + units[:, None] * self.rise(x_t, t / self.span, label)
        if self.walk is not None and self.values is not None:
            fix = fix + self.values["steps"][:, None] * self.walk(x_t, t / self.span, label)
        return fix if self.held[0] is None else self.held[0](x_t, t, label) + fix


class StudentAdapter(OracleAdapter):
    """``net(x_t, t, label)``."""

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """(D,)."""
        return tuple(net.shape)  # type: ignore[arg-type]

    def extend(self, net: nn.Module, numbers: Sequence[str]) -> None:
        """See :meth:`Adapter.extend`: its correction becomes one that is told; it is still 0."""
        fix: Any = net.fix
        with seeded(0):
            if "end" in numbers:
                net.fix = (
                    Network(fix.dim, fix.labels, width=WIDE, ends=True)
                    if isinstance(fix, Network)
                    else Steps(fix.dim, len(fix.maps))
                )
            if "twin" in numbers:
                twin = Network(fix.dim, fix.labels) if isinstance(fix, Network) else None
                net.twin = twin or Smooth(fix.dim, len(fix.maps))
            if "guidance" in numbers:
                net.rise = copy.deepcopy(fix)
            if "steps" in numbers:
                net.walk = copy.deepcopy(fix)

    def numbers(self, net: nn.Module) -> tuple[str, ...]:
        """See :meth:`Adapter.numbers`."""
        fix = net.fix
        ends = isinstance(fix, Steps) or (isinstance(fix, Network) and fix.ends)
        held = {"end": ends, "twin": net.twin is not None, "guidance": net.rise is not None}
        held["steps"] = net.walk is not None
        return tuple(name for name, told in held.items() if told)

    @contextmanager
    def telling(self, net: Any, values: Mapping[str, Tensor]) -> Iterator[None]:
        """See :meth:`Adapter.telling`."""
        net.values = values
        try:
            yield
        finally:
            net.values = None


class Student(Denoiser):
    """A small network that is given the state and the process's own time as they are."""

    def raw(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        """See :meth:`Denoiser.raw`."""
        with self.told(t, cond):
            return self.adapter(self.called(), x_t, t, cond).float()


def begin(oracle: Oracle, kind: Kind, *, fresh: bool = False, seed: int = 0) -> Student:
    """A student of an oracle.

    Args:
        oracle: the teacher, of samples that are vectors.
        kind: "table", "smooth" and "spline" are affine in the state, "network" is not.
        fresh: begin from nothing, not as the teacher.
        seed: of its hidden weights.
    """
    (dim,) = oracle.sample_shape
    labels = len(oracle.classes) + 1 if oracle.classes else 0
    with seeded(seed):
        kinds: dict[Kind, Callable[[int, int], nn.Module]] = {
            "table": Table,
            "smooth": Smooth,
            "spline": Spline,
            "network": Network,
        }
        fix = kinds[kind](dim, labels)
    base = None if fresh else copy.deepcopy(oracle.net).requires_grad_(False)
    net = Corrected(base, fix, oracle.process.t_max)
    return Student(
        net,
        oracle.process,
        oracle.head.name,
        adapter=StudentAdapter(),
        classes=oracle.classes,
        null_label=oracle.null_label,
    )
