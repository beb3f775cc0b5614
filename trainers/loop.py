"""The loop around a trainer: rows, pictures, figures, checkpoints, signals and resuming."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from stepdistill.adapters import lora, scalars
from stepdistill.data.batch import Batch
from stepdistill.run import bands, checkpoint
from stepdistill.run.config import differences, digest, dump
from stepdistill.run.errors import Stopped, UserError
from stepdistill.run.files import told, whole_folder, write_text
from stepdistill.run.health import Divergence, Health, NotFinite
from stepdistill.run.log import Log, Meter, peak_memory_bytes
from stepdistill.run.ratios import figures
from stepdistill.run.together import together
from stepdistill.run.versions import versions
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.culprit import culprit

FREE_KEYS = ("run", "steps", "log", "sample", "eval", "checkpoint", "resume", "device", "data") + (
    "health",
    "gradient_checkpointing",
)
TUNED_KEYS = ("optim", "critic", "critic_steps")  # free where a new run starts from a checkpoint


class Ranks(Protocol):
    """What the loop needs to know of other processes."""

    rank: int
    world: int

    def mean(self, value: Tensor) -> Tensor:
        """Mean over processes."""

    def wait(self) -> None:
        """Meet all processes here."""


class Watcher(Protocol):
    """What is told of a run's progress (pictures, figures, a progress bar)."""

    def start(self, step: int, total: int) -> None:
        """Training begins at ``step``."""

    def progress(self, step: int, losses: dict[str, float], rate: float) -> None:
        """A row was written; ``rate`` in images/s."""

    def say(self, text: str) -> None:
        """A line for the user."""

    def due(self, step: int) -> bool:
        """Whether this step is one to look at; the same answer on every process."""

    def look(self, trainer: Trainer, step: int) -> dict[str, float]:
        """Draw pictures and give figures of the student, the one to judge by first."""


class Loop:
    """Runs a trainer to its last step.

    Args:
        trainer: what is trained.
        batches: batches from a given step on.
        ranks: the processes.
        watcher: who is told.
    """

    def __init__(
        self,
        trainer: Trainer,
        batches: Callable[[int], Iterator[Batch]],
        ranks: Ranks,
        watcher: Watcher,
    ) -> None:
        self.trainer, self.batches, self.ranks, self.watcher = trainer, batches, ranks, watcher
        self.config = trainer.config
        self.run = Path(self.config.run)
        self.folder = self.run / "checkpoints"
        self.main = ranks.rank == 0
        self.health = Health()
        c = self.config.health
        self.divergence = Divergence(c.factor, c.rows)
        known = bands.BY_HAND | bands.load().get(self.config.method, {}) if c.warn else {}
        self.watchman = bands.Watchman(known, c.rows, trainer.students()[-1].total)
        self.best: dict[str, Any] = {}
        self.signal: int | None = None

    def start(self) -> int:
        """Make the run's folder, resume if asked; returns the step to begin with.

        Raises:
            UserError: the folder holds a run that was not to be resumed, or another run's.
        """
        resume = self.config.resume
        source: Path | None = None
        auto = resume == "auto"
        if auto:
            source = checkpoint.newest(self.folder, self.watcher.say)
        elif resume != "never":
            source = Path(resume)
        own = source is not None and source.resolve().parent == self.folder.resolve()
        if not own:
            self._refuse_taken()
        if auto and source is None:
            self.watcher.say(f"no checkpoint to go on from in {self.folder}: starts at step 0")
        step = self._restore(source, own=own, checked=auto) if source else 0
        self.ranks.wait()
        with self._writing(f"run={self.run}"):
            if self.main:
                self.run.mkdir(parents=True, exist_ok=True)
                if own:
                    checkpoint.drop_after(self.folder, step, self.watcher.say)
                head = f"# sha256 {digest(self.config)}\n# {versions()}\n"
                write_text(self.run / "config.yaml", head + dump(self.config))
        return step

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """A block in which the first process writes; if it cannot, all end with what to do."""
        with together(self.ranks.mean), told(what, self._mend):
            yield

    def _mend(self) -> str:
        kept = self._kept()
        then = f"resume=auto goes on from {kept[0].name}" if kept else "start again"
        return f"see that the disk has room and can be written to, then {then}"

    def _kept(self) -> list[Path]:
        """Complete checkpoints, newest first."""
        return [p for p in checkpoint.found(self.folder) if checkpoint.problem(p) is None]

    def _refuse_taken(self) -> None:
        """Stop before a run that is not continued is written over."""
        auto = self.config.resume == "auto"
        marks = ["student"] if auto else ["student", "log.jsonl", "config.yaml"]
        held = next((name for name in marks if (self.run / name).exists()), None)
        if held is None and (auto or not checkpoint.found(self.folder)):
            return
        if auto:
            raise UserError(
                f"run={self.run} is finished and holds no complete checkpoint to go on from; "
                "choose another folder"
            )
        raise UserError(
            f"run={self.run} already holds a run; resume=auto continues it, "
            "or choose another folder"
        )

    def _restore(self, source: Path, *, own: bool, checked: bool) -> int:
        saved = checkpoint.load(source, checked=checked)
        old, new = saved.meta["config"], self.config.model_dump(mode="json")
        free = set(FREE_KEYS) - set(self.trainer.kept)
        changed = [k for k in new if k not in free and old.get(k) != new[k]]
        tuned = [] if own else [k for k in changed if k in TUNED_KEYS]
        changed = [k for k in changed if k not in tuned]
        if changed:
            others = ", ".join(text for k in changed for text in differences(old.get(k), new[k], k))
            raise UserError(
                f"checkpoint {source} was made with other settings: {others}; "
                "set them back, or start a new run"
            )
        if saved.step > self.config.steps:
            raise UserError(
                f"steps={self.config.steps}: checkpoint {source} has done {saved.step} already; "
                "set steps to that or more"
            )
        self.trainer.load_state(saved.step, saved.tensors, saved.meta["updates"])
        self.health = Health(saved.meta["skipped"])
        self.best = saved.meta["best"]
        self.watchman.said = list(saved.meta.get("warned", ()))
        other = f" with other settings of {', '.join(tuned)}" if tuned else ""
        self.watcher.say(f"resumed from {source.name}{other}")
        return saved.step

    def save(self, step: int) -> None:
        """Write a checkpoint, keep the newest few and the best."""
        self.health.look(wait=True)
        name = f"step-{step:07d}"
        with self._writing(f"checkpoint {name}"):
            if self.main and checkpoint.problem(self.folder / name) is not None:
                meta = {
                    "config": self.config.model_dump(mode="json"),
                    "updates": {n: p.updates for n, p in self.trainer.players.items()},
                    "skipped": self.health.skipped,
                    "best": self.best,
                    "warned": self.watchman.said,
                }
                checkpoint.save(self.folder, step, self.trainer.state(), meta)
                checkpoint.prune(self.folder, self.config.checkpoint.keep, self.best.get("name"))

    def finish(self) -> None:
        """Save the averaged student as diffusers module folders: RUN/student, RUN/student_2.

        An adapter is merged into a plain network, and saved by itself in ``adapter`` beside it.
        """
        with self._writing("the student"):
            for left in self.run.glob(".student*") if self.main else ():  # of a run killed here
                shutil.rmtree(left)
            for name, player in self.trainer.players.items() if self.main else ():
                if name.startswith("student"):
                    with whole_folder(self.run / name) as temp:
                        net: Any = player.best.plain()
                        net.save_pretrained(temp, safe_serialization=True)
                        extra = scalars.held(player.best.net)
                        if extra is not None:
                            extra.save_pretrained(temp / scalars.FOLDER, safe_serialization=True)
                        if player.best.lora is not None:
                            lora.save(player.best.net, player.best.lora, temp / "adapter")
                        for weights in temp.rglob("*.safetensors"):  # as readable as the rest
                            weights.chmod((temp / "config.json").stat().st_mode)

    def fit(self) -> None:
        """Train from where :meth:`start` says to the end.

        Raises:
            Stopped: a signal arrived; the state was saved.
            UserError: the run cannot go on.
        """
        c, first, log = self.config, self.start(), None
        with self._writing("log.jsonl"):
            if self.main:
                log = Log(self.run, step=first, tensorboard=c.log.tensorboard)
        try:
            batches = self.batches(first)
            self.watcher.start(first, c.steps)
            with self._signals():
                self._steps(first, batches, log)
        finally:
            if log:
                with told("log.jsonl", self._mend):
                    log.close()
        with self._signals():
            self.finish()
        if self.signal:
            raise Stopped(self.signal)

    def _steps(self, first: int, batches: Iterator[Batch], log: Log | None) -> None:
        c, meter = self.config, Meter()
        images, since = 0, time.monotonic()
        for step in range(first, c.steps):
            self.trainer.prepare(step)
            batch = next(batches)
            meter.add(self.trainer.step(step, batch))
            self._note(step, batch)
            images += c.batch_size
            done = step + 1
            at_row = done % c.log.every_steps == 0 or done == c.steps
            better = self._look(done, log)
            if at_row:
                rate = images / max(1e-9, time.monotonic() - since)
                self._row(done, meter, log, rate)
                images, since = 0, time.monotonic()
            every = c.checkpoint.every_steps
            if (every and done % every == 0) or done == c.steps or better:
                self.save(done)
            self._obey(done, at_row)

    def _row(self, done: int, meter: Meter, log: Log | None, rate: float) -> None:
        names, values = meter.means()
        losses = figures(dict(zip(names, self.ranks.mean(values).tolist(), strict=True)))
        share = self.health.share()
        with self._writing("log.jsonl"):
            if log:
                log.row(
                    done,
                    {
                        "images_per_second": round(rate, 1),
                        "losses": losses,
                        "skipped": sum(self.health.skipped.values()),
                        "skipped_share": share,
                        "memory_bytes": peak_memory_bytes(),
                    },
                )
        self.watcher.progress(done, losses, rate)
        for line in self.watchman.look(done, losses | {"skipped_share": share}):
            self.watcher.say(line)
        found = self.divergence.look(done, losses, skipped=share > 0)
        if found:
            self._diverged(done, found)

    def _diverged(self, done: int, found: str) -> None:
        """Stop, or say it, with where to go on from and what to change."""
        before = [p for p in self._kept() if p.name <= f"step-{self.divergence.calm:07d}"]
        source = f" resume={before[0]}" if before else ""
        line = (
            f"step {done}: {found}: the fake score diverges since step {self.divergence.calm}. Go "
            f"on from before it in a new folder, run=NEW{source}, with a smaller critic.lr, "
            "critic.clip=1 or a longer critic.warmup_steps"
        )
        if self.config.health.on_divergence == "stop":
            raise UserError(f"{line}; health.on_divergence=warn lets it run")
        self.watcher.say(line)

    def _note(self, step: int, batch: Batch) -> None:
        """Look for skipped updates; say where the first one came from."""
        first = not self.health.skipped
        try:
            self.health.note(self.trainer.players.values(), step)
        except NotFinite as error:
            found = culprit(self.trainer, step, batch)
            if found is None:
                raise
            raise UserError(f"{error.what}; {found}") from error
        if first and self.health.latest:
            at, player = self.health.latest
            found = culprit(self.trainer, step, batch) or "batch and teacher are finite"
            here = " (in the first process)" if self.ranks.world > 1 else ""
            self.watcher.say(f"step {at}: skipped an update of the {player}: {found}{here}")

    def _look(self, done: int, log: Log | None) -> bool:
        """Pictures and figures where they are due; True if the student was never better."""
        if not self.watcher.due(done):
            return False
        judged: dict[str, float] = {}
        with self._writing(f"the samples or figures of step {done}"):
            if log:
                judged = self.watcher.look(self.trainer, done)
            if judged and log:
                log.row(done, {"eval": judged})
        value = next(iter(judged.values()), float("inf"))
        better = value < self.best.get("value", float("inf"))
        if better:
            self.best = {"name": f"step-{done:07d}", "value": value}
        return bool(self.ranks.mean(torch.tensor(float(better))) > 0)

    def _obey(self, done: int, at_row: bool) -> None:
        """Save and stop if a signal came; many processes agree on it where they meet anyway."""
        number = self.signal or 0
        if self.ranks.world > 1:
            if not at_row:
                return
            number = int(self.ranks.mean(torch.tensor(float(number))).ceil())
            number = number and (self.signal or signal.SIGTERM)
        if number:
            self.save(done)
            raise Stopped(number)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, _: FrameType | None) -> None:
            self.signal = self.signal or number

        old = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
