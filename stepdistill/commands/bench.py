"""bench step: what a training step costs beside the network passes that it cannot do without.

All parts are timed in turn within one process, round by round, so that a machine whose speed
drifts slows them alike; medians and their ratio are what counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from stepdistill.commands.bench_pass import bare
from stepdistill.commands.bench_table import keep
from stepdistill.commands.bench_turns import turn_costs
from stepdistill.commands.equip import teacher_of
from stepdistill.commands.job import job
from stepdistill.commands.read import read_config
from stepdistill.commands.train import Source
from stepdistill.commands.watch import Watch
from stepdistill.data.images import open_data
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run.health import Health
from stepdistill.run.log import Log, Meter, peak_memory_bytes
from stepdistill.run.player import Player
from stepdistill.run.ranks import Processes
from stepdistill.trainers.base import Pass, Trainer
from stepdistill.trainers.flow.denoising import DenoisingConfig, fresh_network
from stepdistill.trainers.settings import TrainConfig
from stepdistill.trainers.weigh import networks_line

WARMUP = 3


def run(
    config: str,
    overrides: Sequence[str],
    *,
    rounds: int,
    threads: int,
    markdown: Path | None = None,
) -> dict[str, float]:
    """Time a config's step and its parts, print the table, return the medians in seconds.

    Args:
        config: its name or file.
        overrides: keys to set.
        rounds: interleaved.
        threads: of torch.
        markdown: a file whose section of steps gets a row, if any.

    Raises:
        UserError: bad input.
    """
    torch.set_num_threads(threads)
    cls, settings = read_config(config, overrides)
    with TemporaryDirectory() as folder, job(settings, network_of(settings)) as (processes, net):
        settings.run = settings.run if settings.run.exists() else Path(folder)
        trainer = cls(settings, net, wrap=processes.wrap, autocast=processes.autocast)
        medians, spread = measure(trainer, processes, rounds)
        turns = turn_costs(trainer, processes, rounds)
    show(trainer, medians, spread, threads)
    for line in turns.lines:
        Console().print(line)
    found = medians | turns.figures
    if markdown is not None:
        keep(markdown, config, overrides, settings.batch_size, found, spread, rounds, threads)
    return found


def network_of(settings: TrainConfig) -> Denoiser:
    """What a config's trainer begins with: the teacher, or a fresh network to train."""
    if isinstance(settings, DenoisingConfig):
        return fresh_network(settings, open_data(settings.data).classes)
    return teacher_of(settings)


def measure(
    trainer: Trainer, processes: Processes, rounds: int
) -> tuple[dict[str, float], tuple[float, float]]:
    """Median seconds of every part, and the lowest and highest ratio of the middle half."""
    first = trainer.in_full()
    batches = Source(trainer, processes, Watch(trainer.config)).batches(first)
    batch = next(batches)
    health, meter = Health(), Meter()
    with TemporaryDirectory() as folder:
        log = Log(Path(folder), tensorboard=False)
        steps = iter(range(first, 10**9))

        def whole() -> None:
            step = next(steps)
            meter.add(trainer.step(step, next(batches)))
            health.note(trainer.players.values(), step)
            if (step + 1) % trainer.config.log.every_steps == 0:
                names, values = meter.means()
                log.row(step, {"losses": dict(zip(names, values.tolist(), strict=True))})

        parts: dict[str, Callable[[], object]] = {"step": whole}
        passes = trainer.passes()
        for i, item in enumerate(passes):
            parts[f"pass {i}"] = bare(trainer, item, batch)
        for name, player in trainer.players.items():
            parts[f"optimizer {name}"] = player.optimizer.step
            parts[f"clip, check, ema {name}"] = around(player)
        parts["data"] = lambda: next(batches)
        times = timed(parts, rounds, trainer)
        log.close()
    scale = {f"pass {i}": item.count for i, item in enumerate(passes)}
    scale |= {name: 1.0 for name in parts if name not in scale}
    for name, turns in turns_of(trainer, first).items():
        scale[f"optimizer {name}"] = turns
        scale[f"clip, check, ema {name}"] = turns
    scaled = {name: [v * scale[name] for v in row] for name, row in times.items()}
    needed = [n for n in parts if n.startswith(("pass", "optimizer"))]
    ratios = sorted(
        scaled["step"][i] / sum(scaled[name][i] for name in needed) for i in range(rounds)
    )
    quarter = rounds // 4
    medians = {name: statistics.median(row) for name, row in scaled.items()}
    medians["ratio"] = medians["step"] / sum(medians[name] for name in needed)
    return medians, (ratios[quarter], ratios[-1 - quarter])


def turns_of(trainer: Trainer, step: int) -> dict[str, int]:
    """Updates of each player in a step."""
    names = [turn.player for turn in trainer.turns(step)]
    return {name: names.count(name) for name in trainer.players}


def timed(
    parts: dict[str, Callable[[], object]], rounds: int, trainer: Trainer
) -> dict[str, list[float]]:
    """Seconds of every part in every round, in turn, after a warm-up."""
    out: dict[str, list[float]] = {name: [] for name in parts}
    cuda = trainer.device.type == "cuda"
    for i in range(rounds + WARMUP):
        for name, call in parts.items():
            if name.startswith(("optimizer", "clip")):
                give_gradients(trainer.players[name.split()[-1]])
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            if i >= WARMUP:
                out[name].append(time.perf_counter() - start)
        for player in trainer.players.values():
            player.optimizer.zero_grad(set_to_none=True)
    return out


def give_gradients(player: Player) -> None:
    """Small gradients for an optimizer to work on, so that the weights stay what they are."""
    for param in player.params:
        if param.grad is None:
            param.grad = torch.full_like(param, 1e-12)


def around(player: Player) -> Callable[[], None]:
    """What a player's step does besides the optimizer's own."""

    def call() -> None:
        step, player.optimizer.step = player.optimizer.step, lambda: None  # type: ignore
        try:
            player.step()
        finally:
            player.optimizer.step = step  # type: ignore[method-assign]

    return call


def show(
    trainer: Trainer, medians: dict[str, float], spread: tuple[float, float], threads: int
) -> None:
    """Print the table."""
    table = Table(title=f"{trainer.config.method}, batch {trainer.config.batch_size}")
    table.add_column("part")
    table.add_column("ms a step", justify="right")
    passes = trainer.passes()
    for name, seconds in medians.items():
        if name == "ratio":
            continue
        if name.startswith("pass "):
            name = pass_line(passes[int(name.split()[1])])
        table.add_row(name, f"{1e3 * seconds:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"step / (passes + optimizers) = {medians['ratio']:.3f} "
        f"(middle half {spread[0]:.3f} to {spread[1]:.3f}); networks held: "
        f"{held_line(trainer)}; peak memory {peak_memory_bytes() / 2**20:.0f} MiB; "
        f"threads {threads}"
    )
    console.print(networks_line(trainer))


def held_line(trainer: Trainer) -> str:
    """The networks and adapters that a trainer holds, in words."""

    def words(held: dict[str, int]) -> str:
        roles = (role if n == 1 else f"{n} {role}s" for role, n in held.items())
        return f"{sum(held.values())} ({', '.join(roles)})"

    adapters = trainer.adapters()
    return words(trainer.held()) + (f" and adapters: {words(adapters)}" if adapters else "")


def passes_line(trainer: Trainer) -> str:
    """The network passes of a step, in words."""
    return ", ".join(pass_line(item) for item in trainer.passes())


def pass_line(item: Pass) -> str:
    """One network pass, in words."""
    kind = "to input" if item.kind == "input" else str(item.kind)
    kind += " with its derivative" if item.slope else ""
    part = {"whole": "", "features": " for features", "tail": " by features"}[item.part]
    size = "" if item.batch == 1 else f" of {item.batch:.3g}B"
    return f"{item.role} {kind}{part} x {item.count:g}{size}"
