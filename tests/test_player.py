"""Player: clipped AdamW, the average of the weights, the learning-rate schedule, copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import RF
from stepdistill.run.player import OptimConfig, Player
from tests.helpers import mlp_teacher, small_mlp


def player_and_twin(**keys: Any) -> tuple[Player, nn.Module]:
    den = Denoiser(small_mlp(num_classes=0), RF(), "velocity")
    twin = copy.deepcopy(den.net)
    return Player("student", den, OptimConfig(**keys), total=10, ema_decay=0.9), twin


def losses(net: nn.Module) -> Iterator[Tensor]:
    """Five losses with gradients of very different norms."""
    for step, scale in enumerate((0.01, 100.0, 1.0, 0.1, 10.0)):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        yield scale * net(x, torch.full((8,), 500.0)).square().mean()


@pytest.mark.parametrize("clip", [None, 0.5])
def test_player_is_adamw_with_clipping_and_an_average(clip) -> None:
    keys = {"lr": 1e-2, "betas": (0.8, 0.99), "weight_decay": 0.1}
    player, twin = player_and_twin(clip=clip, **keys)
    optimizer = torch.optim.AdamW(twin.parameters(), **keys)
    average = [p.detach().clone() for p in twin.parameters()]
    theirs = losses(twin)
    for update, loss in enumerate(_in_turn(player), start=1):
        optimizer.zero_grad()
        next(theirs).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters()])
        for param in twin.parameters():
            param.grad.div_(max(1.0, float(norm) / clip) if clip else 1.0)
        optimizer.step()
        decay = min(0.9, (1 + update) / (10 + update))
        for i, param in enumerate(twin.parameters()):
            average[i].lerp_(param.detach(), 1 - decay)
            torch.testing.assert_close(player.params[i].detach(), param.detach())
        torch.testing.assert_close(player.norm, norm)
        assert loss.isfinite()
    for value, param in zip(average, player.ema.net.parameters(), strict=True):
        torch.testing.assert_close(param, value)


def _in_turn(player: Player) -> Iterator[Tensor]:
    """Make the player's updates on the same losses, one at a time."""
    for step in range(5):
        with player.turn():
            parts = losses(player.denoiser.net)
            loss = [next(parts) for _ in range(step + 1)][-1]
            loss.backward()
            player.step()
        yield loss.detach()


def test_learning_rate_schedule() -> None:
    rate = OptimConfig(lr=1.0, warmup_steps=3, decay="cosine", final_lr=0.1).lr_at
    assert [rate(step, 11) for step in range(3)] == [0.25, 0.5, 0.75]
    assert rate(3, 11) == 1.0
    assert rate(7, 11) == pytest.approx(0.55)
    assert rate(11, 11) == rate(50, 11) == pytest.approx(0.1)
    linear = OptimConfig(lr=1.0, decay="linear").lr_at
    assert linear(5, 10) == 0.5
    assert OptimConfig(lr=1.0).lr_at(9, 10) == 1.0


def test_networks_share_nothing_with_their_source() -> None:
    teacher = mlp_teacher()
    copied = teacher.clone()
    assert copied.process is teacher.process
    assert not {p.data_ptr() for p in copied.net.parameters()} & {
        p.data_ptr() for p in teacher.net.parameters()
    }
    x, t = torch.ones(2, 4), torch.full((2,), 0.5)
    cond = Cond(torch.tensor([0, 3]))
    assert torch.equal(copied(x, t, cond).x, teacher(x, t, cond).x)
