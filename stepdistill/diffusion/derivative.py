"""Total derivatives of a network along a path of states: by forward mode, or by a difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepdistill.diffusion.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser, Prediction
from stepdistill.diffusion.process import expand

Way = Literal["jvp", "difference"]
View = Callable[[Prediction], Tensor]


@torch.no_grad()
def along(
    den: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Cond,
    velocity: Tensor,
    view: View,
    *,
    way: Way = "jvp",
    step: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """A view of what ``den`` says of x_t, and its derivative in t along dx_t/dt = velocity.

    The network is called itself and not by its wrapper, in fp32 also within autocast, and nothing
    here has a graph. Forward mode is one call, with attention in its plain form; the difference
    is two, of first order in its step.

    Args:
        den: the network.
        x_t: states [B, ...] at times t [B].
        velocity: dx_t/dt of the path, in the process's own time [B, ...].
        view: what is looked at of a prediction: [B, ...].
        way: "jvp", or "difference" backwards in time.
        step: of the difference, in times; a sample at an earlier time takes its whole time.

    Returns:
        The view and its derivative, each [B, ...].
    """

    def at(state: Tensor, time: Tensor) -> Tensor:
        return view(den(state, time, cond))

    x_t, t, velocity = x_t.float(), t.float(), velocity.float()
    with _bare(den), torch.autocast(x_t.device.type, enabled=False):
        if way == "jvp":
            with sdpa_kernel(SDPBackend.MATH):
                both: Any = torch.func.jvp(at, (x_t, t), (velocity, torch.ones_like(t)))
            return both[0], both[1]
        h = t.clamp_max(step).clamp_min(1e-6)
        wide = expand(h, x_t)
        value = at(x_t, t)
        return value, (value - at(x_t - wide * velocity, (t - h).clamp_min(0))) / wide


@contextmanager
def _bare(den: Denoiser) -> Iterator[None]:
    """Calls in this context go to the network itself."""
    call = den._call
    den.route(None)
    try:
        yield
    finally:
        den.route(call)
