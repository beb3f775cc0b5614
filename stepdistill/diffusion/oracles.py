"""Teachers in closed form: the exact posterior means of Gaussian mixtures, as denoisers.

Every trainer and sampler runs on them unchanged, and what it should reach is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.adapters.mlp import MLPAdapter
from stepdistill.diffusion.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.heads import HEADS
from stepdistill.diffusion.process import Process


class MixtureNet(nn.Module):
    """Raw output of a network that knows E[x | x_t] and E[z | x_t] of a Gaussian mixture.

    Args:
        process: the corruption.
        head: what the output means.
        means: centres of the K components [K, *S].
        stds: standard deviation of each coordinate, broadcast to ``means``; 0 for points.
        weights: shares of the components [K]; equal if left out.
    """

    def __init__(
        self,
        process: Process,
        head: str,
        means: Tensor,
        stds: Tensor | float,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.process, self.head = process, HEADS[head]
        self.means = nn.Parameter(means.clone())
        self.stds = nn.Parameter(torch.as_tensor(stds).to(means).expand_as(means).clone())
        share = torch.tensor(weights or [1.0] * len(means))
        self.register_buffer("log_weights", (share / share.sum()).log())

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Raw output [B, *S] at states x_t [B, *S] and process times t [B].

        A label below K [B] says which component the sample is of; K says nothing.
        """
        c = self.process.coefs(t).expand(x_t)
        alpha, sigma = c.alpha[:, None], c.sigma[:, None]
        var = (alpha * self.stds) ** 2 + sigma**2
        gap = x_t[:, None] - alpha * self.means
        fit = self.get_buffer("log_weights") - 0.5 * (gap**2 / var + var.log()).flatten(2).sum(2)
        if label is not None:
            places = torch.arange(len(self.means), device=label.device)
            other = (label[:, None] < len(places)) & (label[:, None] != places)
            fit = fit.masked_fill(other, -torch.inf)
        share = fit.softmax(dim=1).reshape(*fit.shape, *(1,) * (x_t.dim() - 1))
        x = (share * (self.means + alpha * self.stds**2 / var * gap)).sum(dim=1)
        z = (share * sigma / var * gap).sum(dim=1)
        return self.head.output(x, z, c, self.process.sigma_data)


class OracleAdapter(MLPAdapter):
    """``net(x_t, t, label)``; the shape of a sample is that of a component's mean."""

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """See :meth:`Adapter.sample_shape`."""
        means: Any = net.means
        return tuple(means.shape[1:])

    def null_label(self, net: nn.Module) -> int | None:
        """The label that names no component."""
        means: Any = net.means
        return len(means)


class Oracle(Denoiser):
    """The exact denoiser of a Gaussian mixture (K = 1: of a Gaussian), in fp32.

    Args:
        process: the corruption.
        head: what its raw output is to mean.
        means: centres of the K components [K, *S]; they are the classes where K > 1.
        stds: standard deviation of each coordinate, broadcast to ``means``.
        weights: shares of the components [K]; equal if left out.
    """

    def __init__(
        self,
        process: Process,
        head: str,
        means: Tensor,
        stds: Tensor | float = 1.0,
        weights: Sequence[float] | None = None,
    ) -> None:
        net = MixtureNet(process, head, means, stds, weights)
        classes = [str(k) for k in range(len(means))] if len(means) > 1 else []
        null = len(means) if classes else None
        super().__init__(
            net, process, head, adapter=OracleAdapter(), classes=classes, null_label=null
        )

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Denoiser.raw`; the closed form takes the state and time as they are."""
        return self.adapter(self._call or self.net, x_t, t, cond.label)
