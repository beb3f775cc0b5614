"""train: from a config file to a finished run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from stepdistill.commands.check_fit import check_fit
from stepdistill.commands.equip import keep_prompts
from stepdistill.commands.export_text import only_network
from stepdistill.commands.job import job
from stepdistill.commands.pairs import Source as PairSource
from stepdistill.commands.read import read_config
from stepdistill.commands.watch import Watch
from stepdistill.data.batch import Batch
from stepdistill.data.images import ImageSet, open_data
from stepdistill.data.loader import Loader
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run.errors import UserError
from stepdistill.run.ranks import Processes
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.loop import Loop
from stepdistill.trainers.settings import TrainConfig


def train(name: str, overrides: Sequence[str] = ()) -> Path:
    """Run a training config to its end and return the run's folder.

    Args:
        name: a config file, or the name of an installed one.
        overrides: ``key.sub=value``.

    Raises:
        UserError: bad input.
        stepdistill.run.errors.Stopped: a signal came; the state was saved.
    """
    cls, config = read_config(name, overrides)
    if not config.teacher:
        raise UserError(
            f"{name}: {config.method} trains from scratch, without a teacher; use "
            "`stepdistill teacher`"
        )
    return fit(cls, config)


def fit(cls: type[Trainer], config: TrainConfig, fresh: Denoiser | None = None) -> Path:
    """Train with a validated config; ``fresh`` is a network to train from scratch."""
    with job(config, fresh) as (processes, teacher):
        trainer = cls(
            config,
            teacher,
            rank=processes.rank,
            world=processes.world,
            wrap=processes.wrap,
            autocast=processes.autocast,
        )
        if teacher.prompts is not None:
            only_network(trainer)  # else it could be trained, and not exported
            if processes.main:
                keep_prompts(teacher, config.run)
        with closing(Watch(config, main=processes.main)) as watch:
            watch.prepare(trainer)
            source = Source(trainer, processes, watch)
            for line in (*config.without_effect(), *never_warm(trainer)):
                watch.say(line)
            Loop(trainer, source.batches, processes, watch).fit()
            source.report()
    return Path(config.run)


def never_warm(trainer: Trainer) -> list[str]:
    """A line for each player whose learning rate rises for longer than it is trained."""
    found = []
    for player in trainer.players.values():
        warm, total = player.config.warmup_steps, player.total
        if warm > total and not player.frozen:
            found.append(
                f"{player.name}: of warmup_steps={warm} it makes {total}, so that its learning "
                f"rate comes to {total / warm:.0%} of lr={player.config.lr:g}"
            )
    return found


class Source:
    """Where a trainer's batches come from: images, a pair store, or labels alone.

    Args:
        trainer: says what it needs.
        processes: the job's processes.
        watch: is told what is prepared.

    Raises:
        UserError: the images do not fit the network.
    """

    def __init__(self, trainer: Trainer, processes: Processes, watch: Watch) -> None:
        self.trainer, self.processes, self.watch = trainer, processes, watch
        self.images: ImageSet | None = None
        if trainer.needs == "data":
            self.images = open_data(trainer.config.data)
            check_fit(self.images, trainer.teacher)

    def report(self) -> None:
        """Say how many broken images were left out."""
        broken = getattr(self.images, "skipped", ())
        if broken:
            self.watch.say(f"{len(broken)} broken images were left out, first {broken[0].path}")

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches from a step on."""
        if self.images is not None:
            return self._of_images(self.images, start)
        if self.trainer.needs == "pairs":
            return self._of_pairs(start)
        return (self.trainer.batch(step) for step in range(start, self.trainer.config.steps))

    def _of_images(self, images: ImageSet, start: int) -> Iterator[Batch]:
        c, p = self.trainer.config, self.processes
        with Loader(
            images,
            c.batch_size,
            c.seed,
            start=start,
            rank=p.rank,
            world=p.world,
            workers=c.data.workers,
            device=p.device,
        ) as loader:
            codec = self.trainer.teacher.codec
            for step, x, label in loader:
                yield self.trainer.batch(step, x if codec is None else codec.encode(x), label)

    def _of_pairs(self, start: int) -> Iterator[Batch]:
        t = self.trainer
        pairs = PairSource(t.config, t.teacher, self.processes, self.watch).batches(start)
        with closing(pairs):
            for step, (z, x, label) in enumerate(pairs, start):
                yield t.batch(step, x, label, z)
