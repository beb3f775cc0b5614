"""What small students that are told where a step ends add to the teacher's own output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHORTEST = 1e-6  # of the times by which a step's length is divided


class Steps(nn.Module):
    """One affine map a class, a cubic spline in time and in the share of it that a step takes.

    Outputs [B, D] from x [B, D]. In these two numbers, each 0 to 1, every step is a point of a
    square, and derivatives are finite also where a step has no length.

    Args:
        dim: coordinates D.
        rows: classes, that of no class included; 1 where there are none.
        cells: of the splines in time, and in the share.
    """

    def __init__(self, dim: int, rows: int, cells: tuple[int, int] = (8, 5)) -> None:
        super().__init__()
        self.dim, self.cells = dim, cells
        sizes = [count + 3 for count in cells]
        self.maps = nn.Parameter(torch.zeros(rows, *sizes, dim * (dim + 1)))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None, way: Tensor) -> Tensor:
        """See the class; t [B] and the step's length, way [B], in [0, 1]."""
        share = way / t.clamp_min(SHORTEST)
        first, second = splines(t, self.cells[0]), splines(share, self.cells[1])
        row = torch.zeros(len(x), dtype=torch.long, device=x.device) if label is None else label
        flat = torch.einsum("bi,bj,bijm->bm", first, second, self.maps[row])
        return affine(flat, x)


def splines(v: Tensor, cells: int) -> Tensor:
    """Cubic B-splines [B, cells + 3] on [0, 1] in so many cells, at numbers v [B] in it.

    By the recursion of Cox and de Boor, with knots that repeat at the ends.
    """
    inner = torch.linspace(0, 1, cells + 1, device=v.device, dtype=v.dtype)
    knots = nn.functional.pad(nn.functional.pad(inner, (3, 0)), (0, 3), value=1.0)
    place = (v.detach() * cells).long().clamp(0, cells - 1)
    found = nn.functional.one_hot(place + 3, cells + 6).to(v)
    for degree in (1, 2, 3):
        widths = knots[degree:] - knots[:-degree]
        rising = (v[:, None] - knots[:-degree]) / torch.where(widths > 0, widths, 1)
        parts = torch.where(widths > 0, rising, 0) * found
        left = torch.where(widths > 0, found, 0) - parts
        found = parts[:, :-1] + left[:, 1:]
    return found


def affine(flat: Tensor, x: Tensor) -> Tensor:
    """A x + b of maps flattened to [B, D (D + 1)]."""
    maps = flat.unflatten(1, (x.shape[1], -1))
    moved: Tensor = torch.einsum("bij,bj->bi", maps[..., :-1], x) + maps[..., -1]
    return moved
