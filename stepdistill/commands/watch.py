"""What a user sees of a run: the progress bar, the sample grids and the figures."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stepdistill.adapters.cond import Cond
from stepdistill.data.images import open_data
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.sampler import sample
from stepdistill.diffusion.timesteps import uniform_grid
from stepdistill.eval.features import extract, load_features
from stepdistill.eval.frechet import Stats, frechet_distance
from stepdistill.eval.images import save_grid
from stepdistill.eval.paired import psnr
from stepdistill.eval.runner import Reference
from stepdistill.run.errors import UserError
from stepdistill.run.log import peak_memory_bytes
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.settings import TrainConfig

STREAM = "watch"


class Watch:
    """Progress on stderr; grids in RUN/samples; figures for log.jsonl.

    Args:
        config: of the run.
        main: whether this process writes.
    """

    def __init__(self, config: TrainConfig, *, main: bool = True) -> None:
        self.config, self.main = config, main
        self.console = Console(stderr=True)
        self.live = main and self.console.is_terminal
        self._bar: Progress | None = None
        self._reference: Reference | None = None
        self._teacher_images: torch.Tensor | None = None
        self._told = 0.0

    def prepare(self, trainer: Trainer) -> None:
        """Check before the training what will be drawn and judged while it runs.

        Raises:
            UserError: steps that the student has no grid for, or no such features or images.
        """
        steps, known = self.config.eval.steps, sorted(trainer.grids())
        if steps is not None and steps not in known:
            names = ", ".join(map(str, known))
            raise UserError(f"eval.steps={steps}: this student samples in {names} steps")
        if self.main and self.config.eval.every_steps:
            shape = pictures(trainer, torch.zeros(1, *trainer.teacher.sample_shape)).shape[1:]
            data, c = open_data(self.config.data), self.config.eval
            if data.shape != tuple(shape):
                raise UserError(
                    f"eval.every_steps: the images of data.source={self.config.data.source} are "
                    f"{data.shape}, the student's {tuple(shape)}; name its own images, or set it "
                    "to 0"
                )
            features = load_features(c.features, trainer.device, shape=data.shape)
            self._reference = Reference(data, features)

    def start(self, step: int, total: int) -> None:
        """See :class:`stepdistill.trainers.loop.Watcher`."""
        if not self.live:
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=self.console,
        )
        self._task = self._bar.add_task(self.config.method, total=total, completed=step, facts="")
        self._bar.start()

    def progress(self, step: int, losses: dict[str, float], rate: float) -> None:
        """See :class:`stepdistill.trainers.loop.Watcher`."""
        shown = [f"{k} {v:.4g}" for k, v in losses.items() if not k.endswith("grad_norm")][:2]
        memory = f"{peak_memory_bytes() / 2**20:.0f} MiB"
        facts = "  ".join([*shown, f"{rate:.0f} img/s", memory])
        if self._bar is not None:
            self._bar.update(self._task, completed=step, facts=facts)
        elif self.main and (time.monotonic() - self._told > 10 or step == self.config.steps):
            left = (self.config.steps - step) * self.config.batch_size / max(rate, 1e-9)
            line = f"{self.config.method} step {step}/{self.config.steps}  {facts}"
            print(f"{line}  ETA {left:.0f} s", file=sys.stderr, flush=True)
            self._told = time.monotonic()

    def pairs(self, done: int, num: int, rate: float) -> None:
        """Pairs that are there, how many come in a second, and what is left."""
        if not self.main or (done < num and time.monotonic() - self._told < 10):
            return
        left = (num - done) / max(rate, 1e-9)
        print(f"pairs {done}/{num}  {rate:.0f}/s  ETA {left:.0f} s", file=sys.stderr, flush=True)
        self._told = time.monotonic()

    def say(self, text: str) -> None:
        """See :class:`stepdistill.trainers.loop.Watcher`."""
        if self.main:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()

    def due(self, step: int) -> bool:
        """See :class:`stepdistill.trainers.loop.Watcher`."""
        return self._pictures(step) or self._figures(step)

    def _pictures(self, step: int) -> bool:
        every = self.config.sample.every_steps
        return bool(every) and (step % every == 0 or step == self.config.steps)

    def _figures(self, step: int) -> bool:
        every = self.config.eval.every_steps
        return bool(every) and (step % every == 0 or step == self.config.steps)

    def look(self, trainer: Trainer, step: int) -> dict[str, float]:
        """See :class:`stepdistill.trainers.loop.Watcher`."""
        if len(trainer.teacher.sample_shape) == 3 and self._pictures(step):
            self.picture(trainer, step)
        return self.judge(trainer) if self._figures(step) else {}

    def picture(self, trainer: Trainer, step: int) -> None:
        """One grid: the teacher's images above, the student's from the same noise below; where
        small pictures are brought to size, these, then the real ones, then the student's."""
        c = self.config
        columns = max(1, c.sample.num // 4)
        num = c.sample.num // columns * columns
        z, cond, index = watch_noise(trainer, num, c.seed)
        rows = [trainer.draw(z, cond, self.steps(trainer), Rng(c.seed), index)]
        if cond.image is not None:  # what is seen, and what it was made of
            rows = [cond.image, shown_pictures(trainer, num)[0].to(z), *rows]
        elif c.teacher:  # else the network trains from scratch
            if self._teacher_images is None:
                steps = c.sample.teacher_steps
                self._teacher_images = many_steps(trainer.teacher, z, cond, steps, c.guidance)
            rows.insert(0, self._teacher_images)
        path = Path(c.run) / "samples" / f"step-{step:07d}.png"
        images = pictures(trainer, torch.cat(rows))
        save_grid(images, path, columns=columns, overwrite=True)

    def steps(self, trainer: Trainer) -> int:
        """Steps of the student's samples: ``eval.steps``, or the fewest that it has."""
        return self.config.eval.steps or min(trainer.grids())

    def judge(self, trainer: Trainer) -> dict[str, float]:
        """Frechet distance of the student's samples to the data, in the config's features."""
        c, steps = self.config.eval, self.steps(trainer)
        assert self._reference is not None
        z, cond, index = watch_noise(trainer, c.num, self.config.seed)
        images = [
            trainer.draw(z[part], cond.rows(part), steps, Rng(self.config.seed), index[part])
            for part in torch.arange(c.num).split(256)
        ]
        made = torch.cat([pictures(trainer, part) for part in images])
        stats = Stats.of(extract(self._reference.extractor, made))
        distance = frechet_distance(stats, self._reference.stats)
        figures = {f"fd-{c.features}/{steps}": float(distance)}
        if trainer.teacher.beside:
            x, _ = shown_pictures(trainer, c.num)
            figures[f"psnr/{steps}"] = float(psnr(made, x).mean())
        return figures


def watch_noise(trainer: Trainer, num: int, seed: int) -> tuple[torch.Tensor, Cond, torch.Tensor]:
    """Noise, classes in turn, and indices of the samples that are looked at."""
    index = torch.arange(num, device=trainer.device)
    z = Rng(seed).normal(STREAM, index, trainer.teacher.sample_shape)
    classes = len(trainer.teacher.classes)
    if not trainer.teacher.beside:
        return z, Cond(index % classes if classes else None), index
    x, label = (part.to(trainer.device) for part in shown_pictures(trainer, num))
    return z, Cond(label if classes else None, image=trainer.seen(x, 0, index)), index


def pictures(trainer: Trainer, x: torch.Tensor) -> torch.Tensor:
    """What samples [B, C, *S] look like: pictures in [-1, 1], on the CPU."""
    codec = trainer.teacher.codec
    return (x if codec is None else codec.decode(x)).clamp(-1, 1).cpu()


def shown_pictures(trainer: Trainer, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [num, C, H, W] of the data and their labels."""
    return open_data(trainer.config.data).first(num)


@torch.no_grad()
def many_steps(
    teacher: Denoiser, z: torch.Tensor, cond: Cond, steps: int, guidance: float
) -> torch.Tensor:
    """The teacher's images by Euler's method."""
    return sample(teacher, z, uniform_grid(teacher.process, steps), cond, guidance=guidance)
