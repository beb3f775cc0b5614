"""What a trainer's networks weigh: weights, averages and optimizers, from the real tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from stepdistill.adapters import lora
from stepdistill.trainers.base import Trainer


def held_bytes(trainer: Trainer) -> int:
    """Bytes of all networks, adapters, averages and optimizers that a trainer holds now.

    An optimizer holds nothing before its first step. Gradients, which one player at a time has,
    and activations are not in it.
    """
    nets: list[nn.Module] = [trainer.initial.net]
    nets += [den.net for _, den in trainer.members()]
    nets += [player.extra for player in trainer.players.values() if player.extra is not None]
    tensors = [tensor for net in nets for tensor in (*net.parameters(), *net.buffers())]
    for player in trainer.players.values():
        tensors += [value for state in player.optimizer.state.values() for value in state.values()]
    return _bytes(tensors)


def whole_bytes(trainer: Trainer) -> int:
    """What :func:`held_bytes` would be if every adapter were a network of its own."""
    extra = 0
    for _, den in trainer.members():
        if den.lora is not None:
            whole = [*lora.plain_params(den.net), *den.net.buffers()]
            extra += _bytes(whole) - _bytes(den.own())
    for player in trainer.players.values():
        if player.denoiser.lora is None or not player.optimizer.state:
            continue
        ours = [v for p in player.weights for v in player.optimizer.state[p].values()]
        plain = lora.plain_params(player.denoiser.net)
        extra += 2 * _bytes(plain) + 4 * len(plain) - _bytes(ours)  # two moments, and a count each
    return held_bytes(trainer) + extra


def networks_line(trainer: Trainer) -> str:
    """Both figures in words."""
    held = held_bytes(trainer) / 2**20
    if not trainer.adapters():
        return f"networks: {held:.1f} MiB with their averages and optimizers"
    whole = whole_bytes(trainer) / 2**20
    return f"networks: {held:.1f} MiB with adapters, {whole:.1f} MiB as full copies"


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    once = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in once.values())
