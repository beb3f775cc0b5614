"""The exact denoiser of a data set: an exact teacher of real images that needs no training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepdistill.adapters.cond import Cond
from stepdistill.adapters.mlp import MLPAdapter
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.heads import HEADS
from stepdistill.diffusion.process import Process
from stepdistill.oracles.components import LEAST_VARIANCE

FAR = -1e37  # log weight of an image of another class; finite, so that no chunk is empty


class EmpiricalNet(nn.Module):
    """Raw output of a network that knows a set of N images by heart.

    Args:
        process: the corruption.
        head: what the output means.
        images: [N, *S].
        labels: their classes [N], int64; None for no classes.
        classes: number of classes; that label and above mean "no class".
        std: standard deviation of a Gaussian around each image.
        chunk: images that are compared at once.
    """

    def __init__(
        self,
        process: Process,
        head: str,
        images: Tensor,
        labels: Tensor | None,
        classes: int,
        std: float,
        chunk: int,
    ) -> None:
        super().__init__()
        self.process, self.head = process, HEADS[head]
        self.shape, self.classes, self.std, self.chunk = images.shape[1:], classes, std, chunk
        flat = images.flatten(1)
        flat = flat if flat.is_floating_point() else flat.float()
        centre = flat.mean(dim=0)
        self.register_buffer("centre", centre)
        self.register_buffer("images", flat - centre)
        self.register_buffer("labels", labels)

    def _fit(
        self, y: Tensor, images: Tensor, owner: Tensor | None, label: Tensor | None, scale: Tensor
    ) -> Tensor:
        """Log weights of some images [B, M], up to a number a state; all without the centre."""
        fit = (y @ images.T) * scale[0] - images.square().sum(dim=1) * scale[1]
        if label is None or owner is None:
            return fit
        other = (label[:, None] != owner) & (label[:, None] < self.classes)
        return fit.masked_fill(other, FAR)

    def estimates(
        self, x_t: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """E[x | x_t] and E[z | x_t] [B, D] at flat states, with alpha and sigma [B].

        A softmax over the images in one pass: sums are scaled to the best fit so far.
        """
        a, b = alpha[:, None], sigma[:, None]
        centre = self.get_buffer("centre").to(x_t)
        y = x_t - a * centre
        variance = ((a * self.std).square() + b.square()).clamp_min(LEAST_VARIANCE)
        scale = torch.stack([a / variance, a.square() / (2 * variance)])
        every, owners = self.get_buffer("images"), self.labels
        best = torch.full_like(a, -torch.inf)
        total, mean = torch.zeros_like(a), torch.zeros_like(y)
        for at in range(0, len(every), self.chunk):
            images = every[at : at + self.chunk].to(x_t)
            owner = owners[at : at + self.chunk] if isinstance(owners, Tensor) else None
            fit = self._fit(y, images, owner, label, scale)
            peak = torch.maximum(best, fit.amax(dim=1, keepdim=True)).detach()
            weight, fade = (fit - peak).exp(), (best - peak).exp()
            total = fade * total + weight.sum(dim=1, keepdim=True)
            mean, best = fade * mean + weight @ images, peak
        mean = mean / total
        gap = (y - a * mean) / variance
        return centre + mean + a * self.std**2 * gap, b * gap

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Raw output [B, *S] at states x_t [B, *S], process times t [B] and labels [B]."""
        c = self.process.coefs(t)
        y = x_t.flatten(1).to(torch.promote_types(x_t.dtype, t.dtype))
        x, z = self.estimates(y, c.alpha.to(y), c.sigma.to(y), label)
        h = self.head.output(x, z, c.expand(y), self.process.sigma_data)
        return h.reshape(x_t.shape)


class EmpiricalAdapter(MLPAdapter):
    """``net(x_t, t, label)``; the shape of a sample is that of an image."""

    def sample_shape(self, net: nn.Module) -> tuple[int, ...]:
        """See :meth:`Adapter.sample_shape`."""
        return tuple(net.shape)  # type: ignore[arg-type]

    def label_rows(self, net: nn.Module) -> int:
        """See :meth:`Adapter.label_rows`."""
        return int(net.classes)  # type: ignore[arg-type]

    def null_label(self, net: nn.Module) -> int | None:
        """The label that names no class."""
        return self.label_rows(net) or None


class Empirical(Denoiser):
    """The exact denoiser of a data set, each image equally likely; it has nothing to train.

    Sampling it to the end gives images of the set back.

    Args:
        process: the corruption.
        head: what its raw output is to mean.
        images: [N, *S], clean.
        labels: their classes [N]; None for no classes.
        classes: names of the classes; numbers if left out.
        std: standard deviation of a Gaussian around each image (a kernel density); 0 for none.
        chunk: images that are compared at once.

    Raises:
        ValueError: no image, labels that do not fit, or a class without an image.
    """

    def __init__(
        self,
        process: Process,
        head: str,
        images: Tensor,
        labels: Tensor | None = None,
        classes: Sequence[str] = (),
        *,
        std: float = 0.0,
        chunk: int = 4096,
    ) -> None:
        if not len(images):
            raise ValueError("empirical: no images")
        if labels is None and classes:
            raise ValueError("empirical: classes need labels")
        if labels is not None:
            if labels.shape != images.shape[:1] or int(labels.min()) < 0:
                raise ValueError("empirical: labels are one number from 0 an image")
            classes = classes or [str(k) for k in range(int(labels.max()) + 1)]
            held = torch.bincount(labels, minlength=len(classes))
            if len(held) > len(classes) or not bool(held.all()):
                raise ValueError(
                    f"empirical: {len(classes)} classes, images a label {held.tolist()}"
                )
        super().__init__(
            EmpiricalNet(process, head, images, labels, len(classes), std, chunk),
            process,
            head,
            adapter=EmpiricalAdapter(),
            classes=classes,
            null_label=len(classes) or None,
        )

    @property
    def device(self) -> torch.device:
        """Where the images live."""
        return self.net.get_buffer("images").device

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Denoiser.raw`; the closed form takes the state and time as they are."""
        with torch.autocast(x_t.device.type, enabled=False):
            return self.adapter(self.called(), x_t.float(), t, cond).float()
