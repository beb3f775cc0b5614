"""The exact denoiser of a Gaussian mixture, in every process and for every head.

Every trainer and sampler runs on it unchanged, and what it should reach is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.adapters.cond import Cond
from stepdistill.adapters.mlp import MLPAdapter
from stepdistill.diffusion.denoiser import Denoiser, Prediction
from stepdistill.diffusion.heads import HEADS
from stepdistill.diffusion.process import Process
from stepdistill.oracles.components import Components, columns
from stepdistill.oracles.mixture import Mixture, double, join


class MixtureNet(nn.Module):
    """Raw output of a network that knows E[x | x_t] and E[z | x_t] of a Gaussian mixture.

    Centres and standard deviations are parameters: a copy of it can learn another law.

    Args:
        process: the corruption.
        head: what the output means.
        means: centres of the K components [K, *S].
        stds: standard deviations along the axes, broadcast to ``means``; 0 for points.
        log_weights: a row a label, of the components' shares under it [L, K] (-inf where a
            component is not of the class); the last is the law without a label.
        axes: axes of the flattened components [K, D, D]; None if they are the coordinates' own.
    """

    def __init__(
        self,
        process: Process,
        head: str,
        means: Tensor,
        stds: Tensor | float,
        log_weights: Tensor,
        axes: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.process, self.head = process, HEADS[head]
        self.means = nn.Parameter(means.clone())
        spread = torch.as_tensor(stds, dtype=means.dtype, device=means.device)
        self.stds = nn.Parameter(spread.expand_as(means).clone())
        self.register_buffer("log_weights", log_weights)
        self.register_buffer("axes", None if axes is None else columns(axes))

    def view(self, like: Tensor) -> Components:
        """The components in the dtype of a tensor."""
        axes: Tensor | None = self.axes  # type: ignore[assignment]
        return Components(
            self.means.flatten(1).to(like),
            self.stds.flatten(1).to(like),
            None if axes is None else axes.to(like),
        )

    def shares(self, label: Tensor | None, like: Tensor) -> Tensor:
        """Log shares of the components under labels [B]: [B, K], or [K] of no label."""
        table = self.get_buffer("log_weights").to(like)
        return table[-1] if label is None else table[label]

    def estimates(
        self, y: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """E[x | y] and E[z | y] [B, D] of y = alpha x + sigma z, with alpha and sigma [B]."""
        x, score = self.view(y).estimates(y, alpha, sigma, self.shares(label, y))
        return x, -sigma[:, None] * score

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Raw output [B, *S] at states x_t [B, *S] and process times t [B].

        A label [B] is a row of the table of shares; no label is its last row.
        """
        c = self.process.coefs(t)
        y = x_t.flatten(1).to(torch.promote_types(x_t.dtype, t.dtype))
        x, z = self.estimates(y, c.alpha.to(y), c.sigma.to(y), label)
        h = self.head.output(x, z, c.expand(y), self.process.sigma_data)
        return h.reshape(x_t.shape)


class OracleAdapter(MLPAdapter):
    """``net(x_t, t, label)``; the shape of a sample is that of a component's mean."""

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """See :meth:`Adapter.sample_shape`."""
        means: Any = net.means
        return tuple(means.shape[1:])

    def label_rows(self, net: nn.Module) -> int:
        """See :meth:`Adapter.label_rows`: the classes, without the law of no label."""
        return len(net.get_buffer("log_weights")) - 1

    def null_label(self, net: nn.Module) -> int | None:
        """The label that names no class."""
        return self.label_rows(net) or None

    def embedders(self, net: nn.Module) -> tuple[str, ...]:
        """None: the closed form embeds nothing."""
        return ()


class Oracle(Denoiser):
    """The exact denoiser of a Gaussian mixture, for a network's place; raw outputs are fp32.

    Args:
        process: the corruption.
        head: what its raw output is to mean.
        means: centres of the K components [K, *S]; they are the classes where K > 1.
        stds: standard deviation of each coordinate, broadcast to ``means``.
        weights: shares of the components [K]; equal if left out.
        log_weights: in the place of ``weights``, see :class:`MixtureNet`.
        axes: see :class:`MixtureNet`.
        classes: names of the classes, one a row of ``log_weights`` but the last.
    """

    net: MixtureNet

    def __init__(
        self,
        process: Process,
        head: str,
        means: Tensor,
        stds: Tensor | float = 1.0,
        weights: Sequence[float] | None = None,
        *,
        log_weights: Tensor | None = None,
        axes: Tensor | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        if log_weights is None:
            numbers = [1.0] * len(means) if weights is None else list(weights)
            share = torch.tensor(numbers, dtype=means.dtype, device=means.device)
            every = (share / share.sum()).log()[None]
            own = torch.eye(len(means)).to(means).log()
            log_weights = every if len(means) == 1 else torch.cat([own, every])
        if classes is None:
            classes = [str(k) for k in range(len(log_weights) - 1)]
        super().__init__(
            MixtureNet(process, head, means, stds, log_weights, axes),
            process,
            head,
            adapter=OracleAdapter(),
            classes=classes,
            null_label=len(classes) or None,
        )

    @classmethod
    def of(
        cls, process: Process, head: str, mixture: Mixture, *, null: Mixture | None = None
    ) -> Oracle:
        """The exact denoiser of a mixture, whose labels are the classes.

        Args:
            process: the corruption.
            head: what its raw output is to mean.
            mixture: the law of the data.
            null: the law under "no class"; the whole mixture if left out.

        Raises:
            ValueError: a null law of a mixture without labels, or of another dimension.
        """
        if null is not None and (not mixture.labels or null.dim != mixture.dim):
            raise ValueError("oracle: null= is a law of the same dimension, beside labels")
        means, stds, axes = mixture.means, mixture.stds, mixture.axes
        spare = 0 if null is None else len(null)
        if null is not None:
            means, stds, axes = join(mixture, null)
        rows = []
        for label in mixture.classes:
            held = torch.tensor([own == label for own in mixture.labels]).to(mixture.weights)
            rows.append(held * mixture.weights / (held @ mixture.weights))
        whole = mixture.weights if null is None else torch.zeros_like(mixture.weights)
        table = nn.functional.pad(torch.stack([*rows, whole]), (0, spare))
        if null is not None:
            table[-1, -spare:] = null.weights
        classes = [str(label) for label in mixture.classes]
        return cls(process, head, means, stds, log_weights=table.log(), axes=axes, classes=classes)

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Denoiser.raw`; the closed form takes the state and time as they are."""
        with torch.autocast(x_t.device.type, enabled=False):
            return self.adapter(self.called(), x_t.float(), t, cond).float()

    def exact(
        self, x_t: Tensor, t: Tensor, cond: Cond | None = None, guidance: float = 1.0
    ) -> Prediction:
        """The same as :meth:`forward` in the dtype of ``x_t``, without a head's singular times.

        Args:
            x_t: states [B, *S], fp64 for fp64.
            t: times [B].
            cond: the classes.
            guidance: scale of classifier-free guidance; 1 is none.
        """
        y = x_t.flatten(1)
        plain = self.process.coefs(t.to(y))
        label = None if cond is None else cond.label
        parts = self.net.estimates(y, plain.alpha, plain.sigma, label)
        if guidance != 1:
            null = self.net.estimates(y, plain.alpha, plain.sigma)
            parts = (
                null[0] + guidance * (parts[0] - null[0]),
                null[1] + guidance * (parts[1] - null[1]),
            )
        x, z = (part.reshape(x_t.shape) for part in parts)
        c, sigma_data = plain.expand(x_t), self.process.sigma_data
        made = self.prediction(self.head.output(x, z, c, sigma_data), x_t, c)
        made.x, made.z = x, z
        return made

    def log_density(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Log density of states x_t [B, *S] at times t [B], in the dtype of ``x_t``: [B]."""
        y = x_t.flatten(1)
        c = self.process.coefs(t.to(y))
        share = self.net.shares(None if cond is None else cond.label, y)
        return self.net.view(y).log_joint(y, c.alpha, c.sigma, share).logsumexp(dim=1)

    @torch.no_grad()
    def law(self, label: int | None = None, guidance: float = 1.0) -> Mixture | None:
        """The law of clean samples that the probability flow leads to, where it has a closed form.

        Guided, it has one where class and null are each one Gaussian, of one covariance: the
        Gaussian at mean_null + guidance (mean_class - mean_null), at every time.

        Args:
            label: a class, or the null label, or None for the same.
            guidance: scale of classifier-free guidance; 1 is none.

        Returns:
            The mixture, without labels; None where a guided law has no closed form.
        """
        null = self._row(-1)
        own = null if label is None else self._row(label)
        if guidance == 1 or label in (None, self.null_label):
            return own
        if guidance == 0:
            return null
        if len(own) > 1 or len(null) > 1:
            return None
        gap = (own.covariances - null.covariances).abs().max()
        if gap > 1e-9 * own.covariances.abs().max():
            return None
        mean = null.means + guidance * (own.means - null.means)
        return Mixture(own.weights, mean, own.stds, own.axes)

    def _row(self, label: int) -> Mixture:
        share = self.net.get_buffer("log_weights").double().exp()[label]
        net = self.net
        axes = net.get_buffer("axes") if net.axes is not None else None
        means, stds = double(net.means.detach()).flatten(1), double(net.stds.detach()).flatten(1)
        if axes is not None:
            axes = axes.unflatten(1, means.shape).permute(1, 0, 2)
        whole = Mixture(share, means, stds.abs(), axes)
        return whole.rows(share > 0)
