"""Player: one trained network with its optimizer, learning-rate schedule, EMA and safety."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run.errors import UserError

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(BaseModel):
    """AdamW (fused) with warm-up, decay and clipping of the gradient's norm."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    lr: float = Field(2e-4, gt=0, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW's betas")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    warmup_steps: int = Field(0, ge=0, description="updates over which lr rises from 0")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how lr falls to final_lr after the warm-up"
    )
    final_lr: float = Field(0.0, ge=0, description="lr at the last update, as a share of lr")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null turns it off")

    def lr_at(self, update: int, total: int) -> float:
        """Learning rate of update number ``update`` (from 0) of ``total``."""
        if update < self.warmup_steps:
            return self.lr * (update + 1) / (self.warmup_steps + 1)
        if self.decay == "constant":
            return self.lr
        done = min(1.0, (update - self.warmup_steps) / max(1, total - self.warmup_steps))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.lr * (self.final_lr + (1 - self.final_lr) * left)


class Player:
    """A network in training.

    An update whose gradient is not finite leaves weights and optimizer as they are: the fused
    optimizer skips it on the device by a flag, without a wait of the host. ``finite`` tells
    whether all updates since it was last None were taken.

    Args:
        name: "student", "critic", ...
        denoiser: what is trained; its parameters require gradients only during its turns.
        config: the optimizer.
        total: updates that the learning-rate schedule spans.
        ema_decay: decay of the moving average of its weights, or None for none.
        extra: a module that trains along, such as an adversarial head.
        frozen: train ``extra`` alone; the network is only used.
        pace: learning rate of ``extra``, as a multiple of the network's.
        bare: the network is called past its wrapper in its own turns, as derivatives do.
    """

    def __init__(
        self,
        name: str,
        denoiser: Denoiser,
        config: OptimConfig,
        *,
        total: int,
        ema_decay: float | None = None,
        extra: nn.Module | None = None,
        frozen: bool = False,
        pace: float = 1.0,
        bare: bool = False,
    ) -> None:
        self.name, self.denoiser, self.config, self.total = name, denoiser, config, total
        self.extra, self.frozen, self.pace, self.bare = extra, frozen, pace, bare
        self.reduce: Callable[[list[Tensor]], None] | None = None
        self.weights: list[Tensor] = [] if frozen else denoiser.own()
        self.params = [*self.weights, *(extra.parameters() if extra is not None else ())]
        self.updates = 0
        self.finite: Tensor | None = None
        self.norm: Tensor | None = None
        self.wrapper: Callable[..., Any] | None = None
        self.ema_decay = ema_decay
        self.ema: Denoiser | None = None
        self.averages: list[Tensor] = []
        if ema_decay is not None:
            self.ema = denoiser.twin(f"{name}_average")
            self.averages = self.ema.own()
            for average in self.averages:
                average.requires_grad_(False)
        self.reset_optimizer()
        for param in self.params:
            param.requires_grad_(False)

    def reset_optimizer(self) -> None:
        """Start the optimizer afresh, as at the beginning of a phase."""
        self.updates = 0
        groups: list[dict[str, Any]] = [
            {"params": self.weights, "pace": 1.0},
            {"params": self.params[len(self.weights) :], "pace": self.pace},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.config.lr,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
            fused=True,
        )

    @contextmanager
    def turn(self) -> Iterator[Denoiser]:
        """While open, gradients reach this player's parameters (and, elsewhere, nobody's)."""
        for param in self.params:
            param.requires_grad_(True)
        self.denoiser.route(self.wrapper)
        try:
            yield self.denoiser
        finally:
            self.denoiser.route(None)
            for param in self.params:
                param.requires_grad_(False)

    @torch.no_grad()
    def step(self) -> None:
        """Clip, check and apply the gradients; then move the average. No host sync."""
        grads = [p.grad for p in self.params if p.grad is not None]
        if self.reduce is not None:
            self.reduce(grads)
        self.norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        finite = torch.isfinite(self.norm)
        self.finite = finite if self.finite is None else self.finite & finite
        optimizer: Any = self.optimizer
        optimizer.found_inf = (~finite).float()
        if self.config.clip is not None:
            optimizer.grad_scale = (self.norm / self.config.clip).clamp_min(1.0)
        for group in optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.updates, self.total) * group["pace"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        if self.ema is not None:
            torch._foreach_lerp_(self.averages, self.weights, self.ema_weight())

    def ema_weight(self) -> float:
        """Share of the newest weights in the average; early on it counts this player's updates."""
        assert self.ema_decay is not None
        return 1 - min(self.ema_decay, (1 + self.updates) / (10 + self.updates))

    @property
    def best(self) -> Denoiser:
        """The network to sample from: the average where there is one."""
        return self.ema or self.denoiser

    @torch.no_grad()
    def follow(self, other: Player, share: float) -> None:
        """Move the network's weights by ``share`` towards those of a player of the same shape.

        Raises:
            UserError: one of the two is an adapter, the other a network.
        """
        if (self.denoiser.lora is None) != (other.denoiser.lora is None):
            raise UserError(
                f"lora.players: the {self.name} cannot follow the {other.name} where one is an "
                "adapter and the other a network; name both or neither"
            )
        torch._foreach_lerp_(self.weights, other.weights, share)

    def load_weights(self, source: Denoiser) -> None:
        """Copy the weights of another network of the same shape, into the average too.

        An adapter becomes what it was at first, or another adapter of its network.
        """
        self.denoiser.adopt(source)
        if self.ema is not None:
            self.ema.adopt(self.denoiser)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold of this player, as flat names."""
        net = {} if self.frozen else self.denoiser.weights()
        out = {f"net.{k}": v for k, v in net.items()}
        if self.extra is not None:
            out |= {f"extra.{k}": v for k, v in self.extra.state_dict().items()}
        if self.ema is not None:
            out |= {f"ema.{k}": v for k, v in self.ema.weights().items()}
        for i, param in enumerate(self.params):
            for key, value in self.optimizer.state.get(param, {}).items():
                out[f"optim.{i}.{key}"] = value
        return out

    def load_tensors(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Restore what :meth:`tensors` gave, bit for bit.

        Raises:
            UserError: the tensors are of another network.
        """

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        net = {} if self.frozen else self.denoiser.weights()
        other = difference(part("net."), net)
        if other is not None:
            raise UserError(
                f"the {self.name} of the checkpoint is another network than the teacher is now: "
                f"{other}; set teacher back to what it was, or start a new run"
            )
        if not self.frozen:
            self.denoiser.load(part("net."))
        if self.extra is not None:
            self.extra.load_state_dict(part("extra."))
        if self.ema is not None:
            self.ema.load(part("ema."))
        self.reset_optimizer()
        self.updates = updates
        for name, value in part("optim.").items():
            index, key = name.split(".", 1)
            param = self.params[int(index)]
            self.optimizer.state[param][key] = value.to(param.device, copy=True)

    def retire(self) -> None:
        """End training: keep the averaged weights alone."""
        if self.ema is not None:
            self.denoiser.adopt(self.ema)
            self.ema.drop()
        self.ema, self.ema_decay, self.wrapper, self.averages = None, None, None, []
        self.reset_optimizer()


def difference(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """The first weight that is missing, foreign or of another shape, in words; None if none is."""
    for name in [*own, *saved]:
        here, there = (list(w[name].shape) if name in w else "none" for w in (own, saved))
        if here != there:
            return f"{name} is {there} there and {here} here"
    return None
