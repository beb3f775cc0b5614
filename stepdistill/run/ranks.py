"""The processes of a job, by accelerate, and the data-parallel wrapping of players."""

from __future__ import annotations

import gc
import os
import warnings
from contextlib import AbstractContextManager
from datetime import timedelta
from inspect import signature
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stepdistill.run.errors import UserError
from stepdistill.run.player import Player

if torch.distributed.is_available():  # imported later, its default arguments hold the group
    import torch.distributed.nn.functional

# Training changes no buffers of these networks; newer torch has another name for saying so.
_KNOWN = signature(DistributedDataParallel).parameters
_NO_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers": False
}


class Processes:
    """This process and its peers.

    Args:
        precision: of the networks' passes.
        device: "auto" (CUDA, else the CPU), "cpu", "cuda" or "mps".
        compiled: run the players' networks through torch.compile.

    Raises:
        UserError: the device is not there.
    """

    def __init__(
        self,
        precision: Literal["fp32", "bf16"] = "fp32",
        device: str = "auto",
        compiled: bool = False,
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("device=cuda: this machine has no usable CUDA device; use device=cpu")
        if device == "mps" and not torch.backends.mps.is_available():
            raise UserError("device=mps: this machine has none; use device=cpu")
        env_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
        if device != "cpu" and env_cpu and device != "auto":
            raise UserError(f"device={device}, but ACCELERATE_USE_CPU asks for the CPU; choose one")
        for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
                raise UserError(
                    f"the launcher asks for {name}, which this version does not use; "
                    "launch with plain data parallelism"
                )
        mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if mixed not in ("no", precision):
            raise UserError(f"the launcher asks for {mixed}, but precision={precision}; set it so")
        auto_cpu = device == "auto" and not torch.cuda.is_available()
        try:
            self.accelerator = Accelerator(
                cpu=device == "cpu" or env_cpu or auto_cpu,
                mixed_precision={"fp32": "no", "bf16": "bf16"}[precision],
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
            )
        except ValueError as error:
            raise UserError(f"precision={precision}, device={device}: {error}") from error
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.compiled = compiled
        self._wrapped: list[Player] = []

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the networks' passes."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def wrap(self, player: Player) -> None:
        """Average the player's gradients over processes, and compile it, where asked for.

        A player with an extra module calls its network past the wrapper, to take features from
        it, as a bare one does, and an adapter's network is others' too: their gradients are
        averaged by themselves.
        """
        net: Any = player.denoiser.net
        if player.bare or player.extra is not None or player.denoiser.lora is not None:
            player.reduce = self.average if self.world > 1 else None
            return
        if self.compiled:
            net = torch.compile(net)
        if self.world > 1:
            for param in player.params:
                param.requires_grad_(True)
            ids = [self.device.index] if self.device.type == "cuda" else None
            # Of 1x1 convolutions, whose gradients' strides differ where they mean nothing.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            net = DistributedDataParallel(net, device_ids=ids, **_NO_BUFFERS)
            for param in player.params:
                param.requires_grad_(False)
        if net is not player.denoiser.net:
            player.wrapper = net
            self._wrapped.append(player)

    def average(self, grads: list[Tensor]) -> None:
        """Put the mean over all processes into gradients, in one message."""
        flat = torch.cat([grad.flatten() for grad in grads])
        mean: Tensor = self.accelerator.reduce(flat, reduction="mean")
        parts = mean.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over all processes, on the CPU."""
        if self.world == 1:
            return value.cpu()
        reduced: Tensor = self.accelerator.reduce(value.to(self.device), reduction="mean")
        return reduced.cpu()

    def wait(self) -> None:
        """Meet all processes here."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group, so that another run of this process may choose anew.

        Its threads end here, with the last reference to it: one that is still at work when the
        interpreter ends would abort the process.
        """
        for player in self._wrapped:
            player.wrapper = None
        if self._wrapped:
            gc.collect()  # wrappers are in circles
        self._wrapped.clear()
        self.accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


def main_process() -> bool:
    """Whether this process writes the files; also outside of a job."""
    return int(os.environ.get("RANK", "0")) == 0
