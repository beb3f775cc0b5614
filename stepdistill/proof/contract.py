"""What every trainer keeps whatever it converges to, as figures: its passes, its processes, its
averages and its clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.proof.rows import Judge
from stepdistill.proof.trial import Trial
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.beginning import role_of

Key = tuple[str, str, float, str]  # role, kind, batch and part of a pass
STEPS = 6
LONG = 1000  # steps of these runs as configured: no phase ends in the few that are taken


def keep(made: Judge) -> None:
    """Add the rows of a trial's contract."""
    trial = made.trial
    made.add("passes not as declared", float(miscounted(trial)), 0.0)
    made.add("two processes against one", split_gap(trial), 1e-4)
    made.add("average of weights", average_gap(trial), 1e-5)
    made.add("time from its own log-SNR", clock_gap(trial.trainer), 1e-5)


def step(trial: Trial, made: Trainer, at: int) -> None:
    """One step as the loop does it."""
    made.prepare(at)
    made.step(at, trial.source(made, at))


# Cost ---------------------------------------------------------------------------------------------


@contextmanager
def counting(made: Trainer) -> Iterator[Counter[Key]]:
    """Count the passes of a trainer's networks by hooks while the context is open."""
    counts: Counter[Key] = Counter()
    begun: list[str] = []  # kinds of the passes that run at present

    def enter(net: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and any(p.requires_grad for p in net.parameters()):
            begun.append("train")
        else:
            graph = torch.is_grad_enabled() and args[0].requires_grad
            begun.append("input" if graph else "forward")

    def leave(role: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            kind, part = begun.pop(), "whole"
            if out is None:  # left after its last tap
                part = "features"
            elif kind != "forward" and not torch.is_grad_enabled():
                part = "tail"
            size = len(args[0]) / (made.config.batch_size // made.world)
            counts[role, kind, size, part] += 1

        return note

    players = [player for player in made.players.values() if not player.frozen]
    roles = {id(p.denoiser.net): (p.denoiser.net, p.name) for p in players}
    roles.setdefault(id(made.teacher.net), (made.teacher.net, "teacher"))
    handles = []
    for net, name in roles.values():
        role = role_of(name)
        handles.append(net.register_forward_pre_hook(enter))
        handles.append(net.register_forward_hook(leave(role), always_call=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def declared(made: Trainer) -> Counter[Key]:
    """Passes of a step as the trainer says."""
    total: Counter[Key] = Counter()
    for item in made.passes():
        total[item.role, item.kind, item.batch, item.part] += item.count  # type: ignore[assignment]
    return total


def miscounted(trial: Trial) -> float:
    """Passes a step that are counted and not declared, or declared and not counted.

    Walks of the student without a graph are left out: their length is drawn.
    """
    made = trial.build(steps=LONG)
    first = made.in_full()
    with counting(made) as counts:
        for at in range(first, first + STEPS):
            step(trial, made, at)
    expected = declared(made)
    keys = {key for key in (*counts, *expected) if key[:2] != ("student", "forward")}
    return sum(abs(counts[key] / STEPS - expected[key]) for key in keys)


# Processes ----------------------------------------------------------------------------------------


def split_gap(trial: Trial) -> float:
    """Largest difference of the whole batch's gradients to the mean of two processes', relative.

    Taken after a few steps, over every turn of one step; both must draw the same choices, and
    a loss must be a mean over samples.
    """
    whole = trial.build(steps=LONG)
    for at in range(STEPS):
        step(trial, whole, at)
    updates = {name: player.updates for name, player in whole.players.items()}
    halves = [trial.build(steps=LONG, rank=rank, world=2) for rank in (0, 1)]
    for half in halves:
        half.load_state(STEPS, whole.state(), updates)
    worst = 0.0
    for at in range(STEPS, 2 * STEPS):
        one, left, right = (gradients(trial, made, at) for made in (whole, *halves))
        for a, b, c in zip(one, left, right, strict=True):
            worst = max(worst, float((a - (b + c) / 2).norm() / a.norm().clamp_min(1e-12)))
    return worst


def gradients(trial: Trial, made: Trainer, at: int) -> list[Tensor]:
    """The gradient of every turn of a step as one vector each, without an update."""
    made.prepare(at)
    batch, found = trial.source(made, at), []
    for place, turn in enumerate(made.turns(at)):
        player = made.players[turn.player]
        with player.turn():
            turn.loss(batch, Rng(made.config.seed).at(at, place)).value.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in player.params]
        found.append(torch.cat([grad.flatten() for grad in grads]))
        player.optimizer.zero_grad(set_to_none=True)
    return found


# Averages and time --------------------------------------------------------------------------------


def average_gap(trial: Trial) -> float:
    """Largest difference of the student's averaged weights to a sum over its own updates."""
    made = trial.build(steps=LONG)
    first = made.in_full()
    player = made.students()[-1]
    if player.ema is None:
        return 0.0
    flat = _flat(player.weights)
    expected, updates = flat.clone(), 0
    for at in range(first, first + STEPS):
        step(trial, made, at)
        if player.updates == updates:  # others took their turns
            continue
        updates += 1
        decay = min(made.config.ema.decay, (1 + updates) / (10 + updates))
        expected = decay * expected + (1 - decay) * _flat(player.weights)
    moved = (_flat(player.weights) - flat).norm().clamp_min(1e-12)
    return float((_flat(player.averages) - expected).norm() / moved)


def _flat(params: list[Tensor]) -> Tensor:
    return torch.cat([param.detach().flatten() for param in params]).double()


def clock_gap(made: Trainer) -> float:
    """Largest difference, over the process's range, of a time to that of its log-SNR."""
    process = made.process
    t = torch.linspace(0.01, 0.99, 99) * process.t_max
    return float((process.time_at(process.log_snr(t)) - t).abs().max()) / process.t_max
