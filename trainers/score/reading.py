"""What a discriminator reads of a network: features of its modules, or the noised state itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import Process, expand
from stepdistill.losses.features import widths
from stepdistill.run.errors import UserError


def modules(
    features: str, taps: Sequence[str], known: Callable[[nn.Module], Sequence[str]], den: Denoiser
) -> tuple[str, ...]:
    """Names of the modules that are read; none for the state.

    Args:
        features: the config's key.
        taps: the config's key; ``known`` stands for none.
        known: gives those of the network's family.
        den: the network.

    Raises:
        UserError: no name is given, and none known; or one where no network is read.
    """
    if features == "state":
        if taps:
            raise UserError("adversary.taps: features=state reads no network; leave taps out")
        return ()
    names = tuple(taps or known(den.net))
    if not names:
        raise UserError(
            f"adversary.taps: {type(den.net).__name__} has no features known here; name its "
            "modules, or set adversary.features=state"
        )
    return names


def state(process: Process, x_t: Tensor, t: Tensor) -> list[Tensor]:
    """The state [B, C, ...] and, as a further channel, its time [B]."""
    level = torch.tanh(process.log_snr(t) / 4)
    return [torch.cat([x_t, expand(level, x_t).expand_as(x_t[:, :1])], dim=1)]


def channels(den: Denoiser, read: Callable[[Tensor, Tensor, Cond], Sequence[Tensor]]) -> list[int]:
    """Channels of what is read, by reading once.

    Raises:
        UserError: a module that the network does not have, or does not call by itself.
    """
    x = torch.zeros(1, *den.sample_shape, device=den.device)
    t = torch.full((1,), 0.5 * den.process.t_max, device=den.device)
    label = torch.zeros(1, dtype=torch.long, device=den.device) if den.classes else None
    image = x[:, :1].expand(-1, den.beside, *x.shape[2:]) if den.beside else None
    try:
        with torch.no_grad():
            return widths(read(x, t, Cond(label, image=image)))
    except ValueError as error:
        raise UserError(f"adversary.taps: {error}") from error
