"""bench jvp: what a derivative along the flow costs by each way, and how far the ways agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.commands.job import job
from stepdistill.commands.peaks import peak
from stepdistill.commands.read import read_config
from stepdistill.diffusion.denoiser import Denoiser, Prediction
from stepdistill.diffusion.derivative import CALLS, Way, drift, rate
from stepdistill.diffusion.sampler import first_state, full
from stepdistill.run.rng import Rng

WARMUP = 2
STEP = 0.005  # of differences, of methods that take none


def jvp(
    config: str, overrides: Sequence[str], *, rounds: int, threads: int, step: float | None
) -> dict[str, dict[str, float]]:
    """Time every way on a config's teacher and batch; print the table, return its figures.

    Args:
        config: name of a config, or its file.
        overrides: of its keys.
        rounds: in which the ways are timed in turn.
        threads: of the CPU.
        step: of the differences, in flow time; None: the config's ``difference_step``, or 0.005.

    Returns:
        By the way's name, and "forward" for a bare pass: median ``seconds``, peak ``bytes`` beyond
        what is held, and ``difference`` to forward mode, relative.

    Raises:
        UserError: bad input.
    """
    torch.set_num_threads(threads)
    cls, settings = read_config(config, overrides)
    step = step or getattr(settings, "difference_step", None) or STEP
    with job(settings) as (processes, net):
        trainer = cls(settings, net, wrap=processes.wrap)
        den, batch = trainer.teacher, trainer.batch(0)
        z = trainer.z(batch, Rng(settings.seed))
        x = estimate(den, z, batch.cond, trainer.top) if batch.x is None else batch.x
        calls = ways(den, x, z, batch.cond, step)
        figures = measured(calls, den.device, rounds)
    show(figures, f"{config}: derivatives of its teacher, batch {settings.batch_size}", step)
    return figures


@torch.no_grad()
def estimate(den: Denoiser, z: Tensor, cond: Cond, top: float) -> Tensor:
    """The network's clean estimates of noise z [B, ...] at the time ``top``."""
    pred: Prediction = den(first_state(den.process, z, top), full(z, top), cond)
    return pred.x


def ways(
    den: Denoiser, x: Tensor, z: Tensor, cond: Cond, step: float
) -> dict[str, Callable[[], Tensor | None]]:
    """A bare pass, and the derivative by every way, at the middle of the flow from x to z."""
    t = den.process.time_of_flow(torch.full((len(z),), 0.5, device=z.device))
    x_t = den.process.noise(x, z, t)
    with torch.no_grad():
        velocity = den(x_t, t, cond).velocity

    def plain() -> None:
        with torch.no_grad():
            den(x_t, t, cond)

    def by(way: Way) -> Callable[[], Tensor]:
        return lambda: rate(den, x_t, t, cond, velocity, drift, way=way, step=step)

    return {"forward": plain} | {way: by(way) for way in CALLS}


def measured(
    calls: dict[str, Callable[[], Tensor | None]], device: torch.device, rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds, bytes and the relative difference to forward mode of every call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + WARMUP):
        for name, call in calls.items():
            _wait(device)
            began = time.perf_counter()
            call()
            _wait(device)
            if i >= WARMUP:
                times[name].append(time.perf_counter() - began)
    exact = calls["jvp"]()
    assert exact is not None
    found = {}
    for name, call in calls.items():
        figures = {"seconds": statistics.median(times[name]), "bytes": float(peak(call, device))}
        slope = call()
        if slope is not None:
            figures["difference"] = float((slope - exact).norm() / exact.norm())
        found[name] = figures
    return found


def show(figures: dict[str, dict[str, float]], title: str, step: float) -> None:
    """Print the table."""
    table = Table(title=title)
    for head in (
        "way",
        "ms",
        "of a forward",
        "peak MiB",
        f"relative difference to jvp, at step {step:g}",
    ):
        table.add_column(head, justify="left" if head == "way" else "right")
    bare = figures["forward"]["seconds"]
    for name, one in figures.items():
        off = f"{one['difference']:.2e}" if "difference" in one else ""
        cost = (f"{1e3 * one['seconds']:.2f}", f"{one['seconds'] / bare:.2f}")
        table.add_row(name, *cost, f"{one['bytes'] / 2**20:.1f}", off)
    Console().print(table)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
