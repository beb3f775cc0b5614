"""What a single turn costs: the student's in memory, a critic's with a discriminator in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from stepdistill.commands.bench_pass import bare
from stepdistill.commands.peaks import peak
from stepdistill.commands.train import Source
from stepdistill.commands.watch import Watch
from stepdistill.data.batch import Batch
from stepdistill.run.player import Player
from stepdistill.run.ranks import Processes
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Pass, Trainer, Turn
from stepdistill.trainers.score.engine import ScoreTrainer


@dataclass
class Turns:
    """Figures by name, and the lines that say them."""

    figures: dict[str, float] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def turn_costs(trainer: Trainer, processes: Processes, rounds: int) -> Turns:
    """Peak memory of the student's turn over its own pass; time of the critic's over its passes.

    In the last stage, where most networks are held.
    """
    out = Turns()
    step = trainer.config.steps - 1
    trainer.prepare(step)
    batch = next(Source(trainer, processes, Watch(trainer.config)).batches(step))
    turns = trainer.turns(step)
    own = next((turn for turn in turns if turn.player.startswith("student")), None)
    if own is not None:
        _memory(out, trainer, own, batch)
    if isinstance(trainer, ScoreTrainer) and trainer.adversary is not None:
        _critic(out, trainer, turns[-1], batch, rounds)
    return out


def _memory(out: Turns, trainer: Trainer, turn: Turn, batch: Batch) -> None:
    player = trainer.players[turn.player]
    alone = bare(trainer, Pass("student", "train"), batch)
    whole, least = peak(_once(trainer, player, turn, batch), trainer.device), 0
    player.optimizer.zero_grad(set_to_none=True)
    least = peak(alone, trainer.device)
    out.figures |= {"student peak": whole, "student alone": least}
    out.lines.append(
        f"student's turn: {whole / 2**20:.1f} MiB at its peak, {whole / least:.3f} of its own "
        f"forward and backward ({least / 2**20:.1f} MiB)"
    )


def _once(trainer: Trainer, player: Player, turn: Turn, batch: Batch) -> Callable[[], None]:
    """A turn without its update."""

    def call() -> None:
        with player.turn():
            with trainer.autocast():
                loss = turn.loss(batch, Rng(trainer.config.seed)).value
            loss.backward()
        player.optimizer.zero_grad(set_to_none=True)

    return call


def _critic(out: Turns, trainer: ScoreTrainer, turn: Turn, batch: Batch, rounds: int) -> None:
    """Time the critic's turn on a sample that the student left, beside the passes it needs."""
    with torch.no_grad(), trainer.autocast():
        made = trainer.generate(batch, Rng(trainer.config.seed), exact=False)
    count, critic = trainer.config.critic_steps, trainer.players["critic"]
    once = _once(trainer, critic, turn, batch)

    def whole() -> None:
        trainer.shared = made
        once()

    needed = [
        (bare(trainer, item, batch), item.count / count)
        for item in trainer.passes()
        if (item.role, item.kind) == ("critic", "train")
        or ((item.role, item.part) == ("teacher", "features") and item.count >= count)
    ]
    needed.append((_heads(trainer, batch, made.x), 1.0))
    ratios, seconds = [], []
    for _ in range(rounds):
        spent = _seconds(whole, trainer.device)
        ratios.append(spent / sum(_seconds(c, trainer.device) * n for c, n in needed))
        seconds.append(spent)
    ratio = statistics.median(ratios)
    out.figures |= {"critic turn": statistics.median(seconds), "critic ratio": ratio}
    out.lines.append(
        f"critic's turn with its discriminator: {1e3 * statistics.median(seconds):.2f} ms, "
        f"{ratio:.3f} of its own passes"
    )


def _heads(trainer: ScoreTrainer, batch: Batch, x: torch.Tensor) -> Callable[[], None]:
    """The discriminator's heads, forward and backward on features of samples and of data."""
    adversary = trainer.adversary
    assert adversary is not None
    t = torch.full((len(x),), 0.5 * trainer.process.t_max, device=x.device)
    with torch.no_grad(), trainer.autocast():
        critic = trainer.denoiser(trainer.fake)
        kept = [f.detach() for f in adversary.features(x, t, critic, batch.cond)]
    params = list(adversary.net.parameters())

    def call() -> None:
        for param in params:
            param.requires_grad_(True)
        leaves = [f.requires_grad_() for f in kept]
        (adversary.net(leaves).sum() + adversary.net(leaves).sum()).backward()
        everything: list[torch.Tensor] = [*params, *leaves]
        for tensor in everything:
            tensor.grad = None
        for param in params:
            param.requires_grad_(False)

    return call


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
