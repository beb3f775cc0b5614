"""Total derivatives of a network along a path of states: by forward mode, or by differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser, Prediction
from stepdistill.diffusion.dual import Duals
from stepdistill.diffusion.process import Process, expand

# What torch's own rules of forward mode are written in.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)

Way = Literal["jvp", "upwind", "difference", "central", "semi"]
CALLS: dict[Way, int] = {"jvp": 1, "upwind": 3, "difference": 2, "central": 2, "semi": 2}
"""Calls of the network by each way for the derivative alone, see :func:`rate`."""
BACKWARD: tuple[Way, ...] = ("upwind", "difference")
"""Ways that ask the state itself and earlier ones; a call less where the first is known."""
View = Callable[[Prediction], Tensor]
LEAST = 1e-6
"""In flow time: steps that are shorter are none."""


def drift(pred: Prediction) -> Tensor:
    """A prediction's velocity in rectified flow's coordinates, to be looked at."""
    return pred.drift


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
    value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A view of what ``den`` says of x_t, and its derivative in t along dx_t/dt = velocity.

    The network is called itself and not by its wrapper, in fp32 also within autocast, and nothing
    here has a graph. Forward mode is one call, see :func:`slope`; the difference is two, of first
    order in its step and 0 at the first of times, the central one three, of second order but at the
    ends of time. Upwind is three, of second order, and asks earlier times alone. Semi is forward
    mode in the state and a difference in time alone, for networks whose time cannot be
    differentiated or turns fast (rCM, spec 1.10).

    What is learnt by its own derivative in time, as a consistency function is, is carried from
    clean times to noisy ones, as by a wind. Ways that look back, upwind, damp most of what their
    step does not resolve. Forward mode and central differences damp nothing, so that what training
    stirs up there grows, as in a transport equation that is stepped on with a centred scheme.

    Differences step in rectified flow's time, which is as fine at every noise level of every
    process, along the path whose clean and noise parts stay. Where steps of ``cond`` end stays as
    it is.

    Args:
        den: the network.
        x_t: states [B, ...] at times t [B].
        velocity: dx_t/dt of the path, in the process's own time [B, ...].
        view: what is looked at of a prediction: [B, ...].
        way: "jvp", "difference" or "upwind" backwards in time, "central" both ways, or "semi".
        step: of the difference, in flow time, of which upwind takes two; a sample at an earlier
            time takes its whole time.
        value: the view [B, ...] where it is known in fp32, which spares differences a call.

    Returns:
        The view and its derivative, each [B, ...].
    """
    x_t, velocity = x_t.float(), velocity.float()
    t = t.float().clamp_min(den.process.t_min)
    if way == "jvp":
        return slope(den, x_t, t, cond, view, d_x=velocity, d_t=torch.ones_like(t))
    with _bare(den), torch.autocast(x_t.device.type, enabled=False):
        if way == "semi":
            value, moved = slope(den, x_t, t, cond, view, d_x=velocity)
            return value, moved + _behind(den, x_t, t, cond, value, view, "difference", step)
        if value is None:
            value = view(den(x_t, t, cond))
        if way != "central":
            return value, _behind(den, x_t, t, cond, value, view, way, step, velocity)
    return value, rate(den, x_t, t, cond, velocity, view, way=way, step=step)


def _behind(
    den: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Cond,
    value: Tensor,
    view: View,
    way: Way,
    step: float,
    velocity: Tensor | None = None,
) -> Tensor:
    """A difference by what is said earlier on a path; without its velocity, of the same states."""
    process = den.process
    before, length = _back(process, t, cond, 2 * step if way == "upwind" else step)

    def said(to: Tensor) -> Tensor:
        state = x_t if velocity is None else _moved(process, x_t, t, velocity, to)
        return view(den(state, to, cond))

    change = value - said(before)
    if way == "upwind":
        middle = torch.where(length > LEAST, _later(process, before, length / 2), t)
        change = 4 * (value - said(middle)) - change
    quotient = expand(process.flow_rate(t) / length.clamp_min(LEAST), x_t)
    return torch.where(expand(length > LEAST, x_t), change * quotient, 0)


@torch.no_grad()
def rate(
    den: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Cond,
    velocity: Tensor,
    view: View,
    *,
    way: Way = "jvp",
    step: float = 0.01,
    value: Tensor | None = None,
) -> Tensor:
    """The derivative of :func:`along` alone [B, ...]; the central difference asks two times then,
    and not at the state itself."""
    if way != "central":
        return along(den, x_t, t, cond, velocity, view, way=way, step=step, value=value)[1]
    x_t, velocity = x_t.float(), velocity.float()
    t = t.float().clamp_min(den.process.t_min)
    process, flow = den.process, den.process.flow_time(t)
    before, back = _back(process, t, cond, step)
    on = (process.flow_time(torch.full_like(t, process.t_max)) - flow).clamp(0, step)
    after = torch.where(on > LEAST, _later(process, t, on), t)
    with _bare(den), torch.autocast(x_t.device.type, enabled=False):
        first, last = (
            view(den(_moved(process, x_t, t, velocity, at), at, cond)) for at in (before, after)
        )
    return (last - first) * expand(process.flow_rate(t) / (back + on).clamp_min(LEAST), x_t)


def _back(process: Process, t: Tensor, cond: Cond, step: float) -> tuple[Tensor, Tensor]:
    """Times [B] a step before t, no earlier than where steps of ``cond`` end; and how long these
    steps are in flow time [B]."""
    flow = process.flow_time(t)
    first = torch.full_like(t, process.t_min) if cond.end is None else cond.end.float()
    room = flow - process.flow_time(first.clamp_min(process.t_min))
    length = room.clamp(0, step)
    return torch.where(length > LEAST, process.time_of_flow(flow - length), t), length


def _later(process: Process, t: Tensor, way: Tensor) -> Tensor:
    """Times [B] by which flow time has gone on from t by ``way`` [B]."""
    return process.time_of_flow(process.flow_time(t) + way)


def _moved(process: Process, x_t: Tensor, t: Tensor, velocity: Tensor, to: Tensor) -> Tensor:
    """The states at times ``to`` [B] of the path of x_t, whose clean and noise parts stay."""
    a, b = process.coefs(t).expand(x_t), process.coefs(to).expand(x_t)
    own = b.alpha * a.d_sigma - b.sigma * a.d_alpha
    new = a.alpha * b.sigma - a.sigma * b.alpha
    return (own * x_t + new * velocity) / (a.alpha * a.d_sigma - a.sigma * a.d_alpha)


def slope(
    den: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Cond,
    view: View,
    *,
    d_x: Tensor | None = None,
    d_t: Tensor | None = None,
    d_end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A view of what ``den`` says of x_t, and its derivative in a direction, by forward mode.

    One call of the network itself and not of its wrapper, in fp32 also within autocast, with
    attention in its plain form. Where gradients are kept both results have a graph.

    Args:
        den: the network.
        x_t: states [B, ...] at times t [B].
        cond: the conditions, among them where steps end.
        view: what is looked at of a prediction: [B, ...].
        d_x: the direction's part in states [B, ...]; None is 0, as of the others.
        d_t: its part in times [B].
        d_end: its part in the times at which steps end [B].

    Returns:
        The view and its derivative, each [B, ...].
    """
    points = {"x_t": (x_t, d_x), "t": (t, d_t), "end": (cond.end, d_end)}
    moved = {
        name: (point.float(), way.float())
        for name, (point, way) in points.items()
        if point is not None and way is not None
    }

    def at(*given: Tensor) -> Tensor:
        here = dict(zip(moved, given, strict=True))
        told = cond.ending(here["end"]) if "end" in here else cond
        return view(den(here.get("x_t", x_t.float()), here.get("t", t.float()), told))

    with (
        _bare(den),
        torch.autocast(x_t.device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        forward_ad.dual_level(),
        Duals(),
    ):
        made = at(*(forward_ad.make_dual(*pair) for pair in moved.values()))
        value, tangent = forward_ad.unpack_dual(made)
    return value, torch.zeros_like(value) if tangent is None else tangent


@contextmanager
def _bare(den: Denoiser) -> Iterator[None]:
    """Calls in this context go to the network itself."""
    call = den._call
    den.route(None)
    try:
        yield
    finally:
        den.route(call)
