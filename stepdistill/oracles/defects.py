"""Teachers with deliberate defects: any denoiser, made wrong in one known way.

Each stands in a denoiser's place everywhere. Its errors keep x_t = alpha x + sigma z, as those of
every network do, whose raw output is one number a coordinate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser, Prediction
from stepdistill.diffusion.process import Coefs
from stepdistill.run.rng import Rng

if TYPE_CHECKING:
    from typing_extensions import Self

LEAST_SHARE = 0.05  # a scaled estimate is not blamed on a part that is less of the state than this


class Defect(Denoiser):
    """A denoiser that hands its raw output through :meth:`spoil`.

    Args:
        den: what is made wrong; network, process, head and classes are its own.
    """

    inner: Denoiser

    def __init__(self, den: Denoiser) -> None:
        super().__init__(
            den.net,
            den.process,
            den.head.name,
            adapter=den.adapter,
            classes=den.classes,
            null_label=den.null_label,
        )
        self._call = den._call
        self._hold(den)

    def _hold(self, den: Denoiser) -> None:
        object.__setattr__(self, "inner", den)  # outside this module's tree: its net is ours

    def route(self, call: Callable[..., Any] | None) -> None:
        """See :meth:`Denoiser.route`."""
        super().route(call)
        self.inner.route(call)

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Denoiser.raw`."""
        h = self.inner.raw(x_t, t, cond)
        return self.spoil(h, x_t, t)

    def prediction(
        self, h: Tensor, x_t: Tensor, c: Coefs, features: dict[str, Tensor] | None = None
    ) -> Prediction:
        """See :meth:`Denoiser.prediction`."""
        return self.inner.prediction(h, x_t, c, features)

    def clone(self) -> Self:
        """See :meth:`Denoiser.clone`; the copy has the same defect."""
        return self._around(self.inner.clone())

    def branch(self, name: str | None) -> Self:
        """See :meth:`Denoiser.branch`; with the same defect."""
        return self._around(self.inner.branch(name))

    def _around(self, inner: Denoiser) -> Self:
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other._hold(inner)
        other.net, other.lora, other._call = inner.net, inner.lora, None
        return other

    @property
    def device(self) -> torch.device:
        """See :attr:`Denoiser.device`."""
        return self.inner.device

    def spoil(self, h: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The raw output [B, *S] made wrong, at states x_t and times t [B]."""
        raise NotImplementedError

    def _weights(self, x_t: Tensor, t: Tensor) -> tuple[Coefs, tuple[Tensor, Tensor, Tensor]]:
        """Coefficients, and the head's a, b and det: h moves by det as z by alpha, x by -sigma."""
        c = self.process.coefs(t).expand(x_t)
        return c, self.head.weights(c, self.process.sigma_data)


class Noisy(Defect):
    """A teacher whose estimates are off by smooth waves over the states, always the same ones.

    With tan(phi) = sigma / alpha, the noise estimate is off by ``size`` cos(phi) and the clean one
    by ``size`` sin(phi), root mean square over states; the score by ``size`` cos(phi) / sigma.

    Args:
        den: what is made wrong.
        size: see above.
        seed: which waves.
        frequency: how fast they change, in radians a unit of the state.
    """

    def __init__(
        self, den: Denoiser, size: float, *, seed: int = 0, frequency: float = 10.0
    ) -> None:
        super().__init__(den)
        self.size, shape = size, den.sample_shape
        rng, index = Rng(seed), torch.arange(math.prod(shape))
        phase = 2 * math.pi * rng.uniform("phase", index).reshape(1, *shape)
        way = rng.normal("way", torch.zeros(1, dtype=torch.int64), shape)
        way = way / way.norm()
        self.register_buffer("phase", phase.to(den.device), persistent=False)
        self.register_buffer("way", (frequency * way).to(den.device), persistent=False)
        self.frequency = frequency

    def wave(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The error's direction [B, *S], of unit root mean square over states and coordinates."""
        way, phase = self.get_buffer("way"), self.get_buffer("phase")
        level = t.to(x_t).reshape(-1, *(1,) * (x_t.dim() - 1))
        common = (x_t * way).flatten(1).sum(dim=1).reshape(level.shape)
        return math.sqrt(2) * torch.sin(common + self.frequency * (x_t / 2 + level) + phase)

    def spoil(self, h: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """See :meth:`Defect.spoil`."""
        c, (_, _, det) = self._weights(x_t, t)
        return h + self.size * det / torch.hypot(c.alpha, c.sigma) * self.wave(x_t, t)


class Scaled(Defect):
    """A teacher whose clean estimate, or score, is the true one times a factor.

    Where the other part is less than 0.05 of the state (the clean estimate at t near 0, the score
    near pure noise) the error is held back, since all of it would land there, enlarged.

    Args:
        den: what is made wrong.
        factor: what its estimate is multiplied by.
        part: which estimate.
    """

    def __init__(
        self, den: Denoiser, factor: float, *, part: Literal["clean", "score"] = "clean"
    ) -> None:
        super().__init__(den)
        self.factor, self.part = factor, part

    def spoil(self, h: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """See :meth:`Defect.spoil`."""
        c, (a, b, _) = self._weights(x_t, t)
        # det x and det z, which stay finite where a head cannot tell one of them
        other, gain = c.sigma, c.sigma * h - b * x_t
        if self.part == "score":
            other, gain = c.alpha, c.alpha * h - a * x_t
        least = LEAST_SHARE * torch.hypot(c.alpha, c.sigma)
        held = other / torch.maximum(other, least).square()  # else 1 / other
        return h + (self.factor - 1) * gain * held


class NaNAt(Defect):
    """A teacher whose output is NaN at some of its calls, or at some times.

    Args:
        den: what is made wrong.
        calls: numbers of the calls of :meth:`raw`, from 1.
        since: the call from which on every output is NaN.
        times: the range of times, ends included, whose rows are NaN.
    """

    def __init__(
        self,
        den: Denoiser,
        *,
        calls: Collection[int] = (),
        since: int | None = None,
        times: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(den)
        self.calls, self.since, self.times = frozenset(calls), since, times
        self.count = 0

    def spoil(self, h: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """See :meth:`Defect.spoil`."""
        self.count += 1
        if self.count in self.calls or (self.since is not None and self.count >= self.since):
            return torch.full_like(h, torch.nan)
        if self.times is None:
            return h
        hit = (t >= self.times[0]) & (t <= self.times[1])
        return h.masked_fill(hit.reshape(-1, *(1,) * (h.dim() - 1)), torch.nan)
