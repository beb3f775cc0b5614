"""Solvers: how a noisy state is taken to an earlier time by the teacher, in one step or several.

A new one is a subclass of :class:`Walk` with ``along``; a config names it by
``solver: {kind: FILE.py:CLASS}``. Letters: t the state's time, r < t where it is taken, n = sigma /
alpha, x and z the teacher's clean and noise estimates.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PlainSerializer
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser, Prediction
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.process import Process, expand
from stepdistill.diffusion.sampler import heun_step, move
from stepdistill.run.plug import Plug, Plugged

Fresh = Callable[[int], Tensor]
"""Standard normal noise, shaped like the state, for a step by its number from 0."""


@dataclass(frozen=True)
class Asked:
    """A teacher with what it is asked under.

    Args:
        den: the teacher.
        cond: conditions of the samples.
        scale: of guidance, one number or one a sample [B].
    """

    den: Denoiser
    cond: Cond
    scale: float | Tensor = 1.0

    def __call__(self, x_t: Tensor, t: Tensor) -> Prediction:
        """What it says of states [B, C, *S] at times [B]."""
        return guided(self.den, x_t, t, self.cond, self.scale)

    @property
    def process(self) -> Process:
        """Of the teacher."""
        return self.den.process


class Solver(Plug):
    """How the earlier state comes about that a state is compared with."""

    @property
    def passes(self) -> int:
        """Passes of the teacher from t to r."""
        return 0


class Data(Solver):
    """The image's own state at r, with the same noise; the teacher is not asked."""


class Walk(Solver):
    """Steps of the teacher from t to r, evenly in the process's progress."""

    calls: ClassVar[int] = 1  # passes a step

    substeps: int = Field(1, ge=1, description="steps of the teacher from t to r")

    @property
    def random(self) -> bool:
        """Whether steps draw noise."""
        return False

    @property
    def passes(self) -> int:
        """See :attr:`Solver.passes`."""
        return self.calls * self.substeps

    def __call__(
        self, teacher: Asked, x_t: Tensor, t: Tensor, r: Tensor, fresh: Fresh | None = None
    ) -> Tensor:
        """The states at r [B] of states x_t [B, C, *S] at t [B]; at r = 0 the clean estimate.

        Args:
            teacher: who is asked, and how.
            fresh: the noise of steps that draw some; where it is left out, the mean over it for a
                teacher whose estimates are affine in the state.
        """
        return self.along(teacher, x_t, self.times(t, r, teacher.process), fresh)

    def times(self, t: Tensor, r: Tensor, process: Process) -> list[Tensor]:
        """Times [B] from t to r, both among them, evenly in progress: one more than substeps."""
        u, v = process.unwarp(t), process.unwarp(r)
        parts = (k / self.substeps for k in range(1, self.substeps))
        return [t, *(process.warp(u + part * (v - u)) for part in parts), r]

    @abstractmethod
    def along(
        self, teacher: Asked, x_t: Tensor, times: Sequence[Tensor], fresh: Fresh | None
    ) -> Tensor:
        """One step from each of the decreasing times [B] to the next."""

    def kept(self, process: Process, t: Tensor, r: Tensor) -> Tensor | None:
        """The share k [B] in steps whose mean is x_r = alpha_r x + k sigma_r z; None in others."""
        return None


class Euler(Walk):
    """Euler's steps on the probability flow, which are DDIM's."""

    def along(
        self, teacher: Asked, x_t: Tensor, times: Sequence[Tensor], fresh: Fresh | None
    ) -> Tensor:
        """See :meth:`Walk.along`."""
        for t, r in zip(times, times[1:], strict=False):
            x_t = move(teacher(x_t, t), teacher.process, r)
        return x_t

    def kept(self, process: Process, t: Tensor, r: Tensor) -> Tensor:
        """See :meth:`Walk.kept`."""
        return torch.ones_like(t)


class Heun(Walk):
    """Heun's steps, of two passes each; see :func:`stepdistill.diffusion.sampler.heun_step`."""

    calls: ClassVar[int] = 2

    def along(
        self, teacher: Asked, x_t: Tensor, times: Sequence[Tensor], fresh: Fresh | None
    ) -> Tensor:
        """See :meth:`Walk.along`."""
        for t, r in zip(times, times[1:], strict=False):
            x_t = heun_step(teacher.den, x_t, t, r, teacher.cond, teacher.scale)
        return x_t


class Dpm(Walk):
    """DPM-Solver++(2M): from the second step on, clean estimates are extrapolated in log-SNR.

    Second order with one pass a step, so that it differs from ``euler`` from two substeps on; the
    step from pure noise, that after it and that to 0 are Euler's.

    Source: DPM-Solver++ (Lu et al. 2022), its multistep solver of second order.
    """

    substeps: int = Field(2, ge=1, description="steps of the teacher from t to r")

    def along(
        self, teacher: Asked, x_t: Tensor, times: Sequence[Tensor], fresh: Fresh | None
    ) -> Tensor:
        """See :meth:`Walk.along`."""
        process, before = teacher.process, None
        logs = [process.log_snr(t) for t in times]
        for k, (t, r) in enumerate(zip(times, times[1:], strict=False)):
            a, b = process.coefs(t).expand(x_t), process.coefs(r).expand(x_t)
            x = now = teacher(x_t, t).x
            if before is not None:
                share = (logs[k + 1] - logs[k]) / (2 * (logs[k] - logs[k - 1]))
                x = now + expand(torch.where(r > 0, share, 0.0), now) * (now - before)
            ratio = b.sigma / a.sigma
            x_t, before = ratio * x_t + (b.alpha - ratio * a.alpha) * x, now
        return x_t


class Sde(Walk):
    """Steps of a reverse SDE with ``eta`` times the flow's noise, exact for a constant estimate.

    x_r = alpha_r x + sigma_r (k z + sqrt(1 - k^2) e), k = (n_r / n_t)^(eta^2), with fresh noise e:
    ``eta: 0`` is Euler's step and 1 the sampling of DDPM's posterior. From pure noise nothing of z
    is kept where eta > 0.

    Source: SCott (Liu et al. 2024) by its SDE, the step derived for a frozen estimate; which of the
    solvers the paper ran is not verified.
    """

    eta: float = Field(0.3, ge=0, description="noise of the SDE; 0: none, 1: all")

    @property
    def random(self) -> bool:
        """See :attr:`Walk.random`."""
        return self.eta > 0

    def along(
        self, teacher: Asked, x_t: Tensor, times: Sequence[Tensor], fresh: Fresh | None
    ) -> Tensor:
        """See :meth:`Walk.along`."""
        for k, (t, r) in enumerate(zip(times, times[1:], strict=False)):
            pred = teacher(x_t, t)
            share = expand(self.kept(teacher.process, t, r), x_t)
            noise = share * pred.z
            if fresh is not None and self.random:
                noise = noise + (1 - share**2).clamp_min(0).sqrt() * fresh(k)
            x_t = move(pred, teacher.process, r, noise)
        return x_t

    def kept(self, process: Process, t: Tensor, r: Tensor) -> Tensor:
        """See :meth:`Walk.kept`."""
        a, b = process.coefs(t), process.coefs(r)
        ratio: Tensor = (b.sigma * a.alpha) / (b.alpha * a.sigma)
        return ratio.clamp(0, 1) ** (self.eta**2)


def brief(solver: Solver) -> Any:
    """What a config writes for it: the name alone where all settings are the defaults."""
    plain = all(getattr(solver, k) == f.default for k, f in type(solver).model_fields.items())
    return solver.kind if plain else solver.named


Solved = Annotated[Plugged[Solver], PlainSerializer(brief)]
"""The type of a config key that holds a solver, by its name or with its settings."""
