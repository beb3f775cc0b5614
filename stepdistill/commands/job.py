"""A job's processes and its frozen teacher, ready on the device, and left in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stepdistill.commands.equip import teacher_of
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run.memory import keep_freed_memory
from stepdistill.run.ranks import Processes
from stepdistill.run.xformers import enable_xformers
from stepdistill.trainers.settings import TrainConfig


@contextmanager
def job(config: TrainConfig, fresh: Denoiser | None = None) -> Iterator[tuple[Processes, Denoiser]]:
    """Processes and teacher of a config; ``fresh`` is a network to train from scratch instead.

    Raises:
        UserError: the device, the teacher or xformers is not to be had.
    """
    processes = Processes(config.precision, config.device, config.compile)
    try:
        if processes.device.type == "cpu":
            keep_freed_memory()
        teacher = fresh or teacher_of(config, processes.device)
        teacher.to(processes.device)
        if config.xformers:
            enable_xformers(teacher.net, processes.device)
        yield processes, teacher
    finally:
        processes.close()
