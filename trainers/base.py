"""Trainer: the few things a method must say, and everything that it need not.

A method is one file that ends in ``TRAINER = ...``. It declares its config, makes its players in
``setup``, and lists the turns of a step; each turn is a function (batch, rng) -> Loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stepdistill.adapters.cond import Cond
from stepdistill.adapters.recompute import can_recompute
from stepdistill.data.batch import Batch
from stepdistill.data.degrade import seen
from stepdistill.diffusion.denoiser import Denoiser, Experts
from stepdistill.diffusion.sampler import NoiseSource, sample
from stepdistill.diffusion.timesteps import (
    Density,
    Grid,
    regular_start,
    share_below,
    uniform_grid,
)
from stepdistill.losses.regression import clip_through
from stepdistill.run.errors import UserError
from stepdistill.run.player import OptimConfig, Player
from stepdistill.run.rng import Rng
from stepdistill.trainers.beginning import begin, needs_image, recomputed, role_of
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.settings import TrainConfig

LEAST_SHARE = 1e-3  # of a density's times, that a student's start must leave


@dataclass(frozen=True)
class Loss:
    """A turn's result.

    Args:
        value: the scalar that is differentiated.
        logs: scalars on the device, by name; read only when a row is written.
    """

    value: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """One update of one player within a step."""

    player: str
    loss: Callable[[Batch, Rng], Loss]


@dataclass(frozen=True)
class Pass:
    """Network passes that a step needs, for one role.

    Args:
        role: "student", "critic" or "teacher".
        kind: "forward" without a graph, "train" forward and backward to the weights, "input"
            forward and backward to the input only.
        count: how many times a step, on average.
        batch: size of the batch it runs on, in batches of the config: 2 where it is guided, a part
            of 1 where one walk serves several samples.
        part: "whole"; "features", where the network is left after its last tap; or "tail", where
            what lies behind the last tap has no graph.
        taps: modules whose outputs are the features.
        slope: the pass takes a derivative along by forward mode.
    """

    role: str
    kind: Literal["forward", "train", "input"]
    count: float = 1
    batch: float = 1
    part: Literal["whole", "features", "tail"] = "whole"
    taps: tuple[str, ...] = ()
    slope: bool = False


class Trainer(ABC):
    """Base of all methods.

    Args:
        config: validated settings.
        teacher: the frozen teacher; for methods that train from scratch, the network itself.
        initial: what the players begin as, of the teacher's process; the teacher if left out.
        rank: this process's place.
        world: number of processes; each takes an equal slice of the global batch.
        wrap: prepares a new player for many processes or compilation.
        autocast: the precision of the networks' passes.

    Raises:
        UserError: the batch cannot be shared equally, or the teacher cannot be guided as asked.
    """

    Config: ClassVar[type[TrainConfig]] = TrainConfig
    needs: Literal["labels", "data", "pairs"] = "labels"
    noise: NoiseSource = "predicted"
    sizes: tuple[int, ...] = (1,)
    group = 1  # neighbours in a batch whose drawn class is one and the same
    kept: tuple[str, ...] = ()  # keys that a resumed run must not change, beside those of any
    clips: ClassVar[bool] = False
    shortens: ClassVar[bool] = True  # whether students reach the teacher's law in fewer steps
    flows: bool = False  # whether the student is the field of a flow: a teacher as its own was
    proofs: ClassVar[Mapping[str, Proof]] = {}

    def __init__(
        self,
        config: TrainConfig,
        teacher: Denoiser,
        *,
        initial: Denoiser | None = None,
        rank: int = 0,
        world: int = 1,
        wrap: Callable[[Player], None] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if config.batch_size % world:
            raise UserError(
                f"batch_size={config.batch_size} does not divide among {world} processes; "
                f"make it a multiple of {world}"
            )
        if config.guided and teacher.null_label is None:
            raise UserError(
                "guidance: the teacher has no label that means 'no class' to guide away from; "
                "set guidance=1 and no guidance_range"
            )
        if config.clip and not self.clips:
            raise UserError(f"clip: {config.method} does not clamp its estimates; set clip=null")
        if config.lora and config.compile:
            raise UserError(
                "compile: adapters on a shared network are switched between calls; set "
                "compile=false or lora=null"
            )
        self.config, self.teacher, self.initial = config, teacher, initial or teacher
        self.process, self.device = teacher.process, teacher.device
        self.teacher.requires_grad_(False)
        self.rank, self.world = rank, world
        self.players: dict[str, Player] = {}
        self.shares: dict[Density, float] = {}
        self.wrap, self.autocast = wrap, autocast
        self.setup()
        if needs_image(teacher, config, self.needs):
            self.needs = "data"
        share = config.batch_size // world
        if share % self.group:
            raise UserError(
                f"batch_size={config.batch_size}: a process takes {share} samples, which do not "
                f"fall into groups of {self.group} of one class; make it a multiple of "
                f"{self.group * world}"
            )
        if config.gradient_checkpointing and can_recompute(teacher.net):
            recomputed(teacher)  # for what is differentiated in its input

    # What a method supplies -----------------------------------------------------------------

    @abstractmethod
    def setup(self) -> None:
        """Make the players."""

    @abstractmethod
    def turns(self, step: int) -> list[Turn]:
        """The updates of a step, in order."""

    @abstractmethod
    def passes(self) -> list[Pass]:
        """Network passes of one step, by role."""

    @property
    @abstractmethod
    def fixed_point(self) -> FixedPoint:
        """Where the method's student converges to; ``stepdistill prove`` holds it to that."""

    def grids(self) -> dict[int, Grid]:
        """Times that the student samples on, by number of steps; baked into its export."""
        return {n: uniform_grid(self.process, n, self.start) for n in self.sizes}

    def members(self) -> list[tuple[str, Denoiser]]:
        """All that is held at present, with roles; an "average" is one of trained weights."""
        players = [player for player in self.players.values() if not player.frozen]
        used = any(p.denoiser is self.teacher for p in players)
        roles = [] if used else [("teacher", self.teacher)]
        done = self.finished
        roles += [(role_of(p.name), p.denoiser) for p in players if p.denoiser not in done]
        roles += [("average", p.ema) for p in players if p.ema is not None]
        return roles + [("expert", den) for den in done]

    @property
    def finished(self) -> list[Denoiser]:
        """Trained networks that train no more and are part of the student."""
        return []

    def prepare(self, step: int) -> None:
        """Make the players that exist at ``step``; called before one is resumed."""

    def in_full(self) -> int:
        """The first step in which all have their turns, which some begin later; made ready for."""
        first, last = 0, self.config.steps - 1
        while len(self.turns(first)) < len(self.turns(last)):
            first += 1
        self.prepare(first)
        return first

    # What it gets -----------------------------------------------------------------------------

    def held(self) -> dict[str, int]:
        """Networks held at present, by role; "base" is one that nothing but adapters use."""
        members = self.members()
        whole = [(role, den) for role, den in members if den.lora is None]
        bases = {id(den.net) for _, den in members} - {id(den.net) for _, den in whole}
        return dict(Counter([role for role, _ in whole] + ["base"] * len(bases)))

    def adapters(self) -> dict[str, int]:
        """Low-rank adapters held at present, by role."""
        return dict(Counter(role for role, den in self.members() if den.lora is not None))

    @cached_property
    def start(self) -> float:
        """Where the student's grid begins, as progress; see ``config.start``."""
        own = self.config.start
        return regular_start(self.process, self.teacher.head.name) if own is None else own

    @cached_property
    def top(self) -> float:
        """The noisiest time of the student's grid; nothing is trained at a noisier one."""
        return uniform_grid(self.process, 1, self.start)[0]

    def add_player(
        self,
        name: str,
        source: Denoiser,
        optim: OptimConfig,
        *,
        ema: bool,
        total: int,
        copy: bool = True,
        extra: nn.Module | None = None,
        frozen: bool = False,
        pace: float = 1.0,
        fixed: Iterable[str] = (),
        bare: bool = False,
    ) -> Player:
        """Add a trained copy of ``source``, an adapter on it, or train itself.

        See :class:`Player`; what the config's ``lora`` names is an adapter. ``fixed`` names
        parameters of a copy that are not trained.
        """
        decay = self.config.ema.decay if ema else None
        net = source if frozen else begin(self.config, name, source, copy=copy)
        if fixed:
            net.fix(fixed)
        player = Player(
            name,
            net,
            optim,
            total=total,
            ema_decay=decay,
            extra=extra,
            frozen=frozen,
            pace=pace,
            bare=bare,
        )
        self.players[name] = player
        if self.config.gradient_checkpointing and not frozen:
            recomputed(net)
        if self.wrap:
            self.wrap(player)
        return player

    def denoiser(self, name: str) -> Denoiser:
        """The network of a player."""
        return self.players[name].denoiser

    def students(self) -> list[Player]:
        """The players that make up the student, from the noisiest level to the cleanest."""
        return [p for name, p in self.players.items() if name.startswith("student")]

    def best(self) -> Denoiser | Experts:
        """What is sampled, saved and exported: the student's averaged weights."""
        return self.students()[0].best

    def draw(self, z: Tensor, cond: Cond, steps: int, rng: Rng, index: Tensor) -> Tensor:
        """Images [B, C, H, W] of the averaged student from noise z, in ``steps`` steps."""
        with torch.no_grad(), self.autocast():
            return sample(
                self.best(),
                z,
                self.grids()[steps],
                cond,
                noise=self.noise,
                clip=self.config.clip,
                fresh=lambda i: rng.normal(f"fresh-{i}", index, z.shape[1:]),
            )

    def batch(
        self,
        step: int,
        x: Tensor | None = None,
        label: Tensor | None = None,
        z: Tensor | None = None,
    ) -> Batch:
        """This process's batch; without given labels, classes are drawn uniformly, one a group."""
        size = self.config.batch_size // self.world
        index = torch.arange(self.rank * size, (self.rank + 1) * size, device=self.device)
        if label is None and self.teacher.classes:
            own, rng = self.owned(step), Rng(self.config.seed).at(step)
            count = len(self.teacher.classes) if own is None else len(own)
            label = rng.integers("label", index // self.group, count)
            label = label if own is None else own[label]
        image = self.seen(x, step, index) if self.teacher.beside and x is not None else None
        return Batch(index, Cond(label if self.teacher.classes else None, image=image), x, z)

    def seen(self, x: Tensor, step: int, index: Tensor, factor: int | None = None) -> Tensor:
        """What networks are fed of pictures [B, C, H, W] beside the state, by a step's draws."""
        degrade = self.config.data.degrade
        assert degrade is not None
        return seen(x, degrade, Rng(self.config.seed).at(step), index, factor)

    def owned(self, step: int) -> Tensor | None:
        """The classes that a step trains, where labels are drawn; None for all."""
        return None

    def shown(self, x: Tensor) -> Tensor:
        """A clean estimate as it is shown: clamped where the config says so."""
        return clip_through(x, self.config.clip) if self.config.clip else x

    def drawn(self, density: Density, u: Tensor) -> Tensor:
        """Times [B] from uniforms u [B]: a density's, of which those above ``top`` are left out.

        Raises:
            UserError: all of them are.
        """
        if self.top >= self.process.t_max:
            return density.sample(u, self.process)
        if density not in self.shares:
            self.shares[density] = share_below(lambda u: density.sample(u, self.process), self.top)
            if self.shares[density] < LEAST_SHARE:
                raise UserError(
                    f"start={self.start:g}: nothing noisier than the time {self.top:.3g} is "
                    f"trained, and next to all times of {density!r} are; lower them or raise start"
                )
        return density.sample(u * self.shares[density], self.process).clamp_max(self.top)

    def z(self, batch: Batch, rng: Rng, stream: str = "z") -> Tensor:
        """Standard normal noise shaped like the batch's samples [B, C, *S]."""
        return rng.normal(stream, batch.index, self.teacher.sample_shape)

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """One training step: every turn in order; returns the logs, still on the device."""
        logs: dict[str, Tensor] = {}
        for player in self.players.values():
            player.finite = None
        for place, turn in enumerate(self.turns(step)):
            player = self.players[turn.player]
            with player.turn():
                with self.autocast():
                    loss = turn.loss(batch, Rng(self.config.seed).at(step, place))
                loss.value.backward()
                player.step()
            assert player.norm is not None
            logs[f"{turn.player}/grad_norm"] = player.norm
            logs |= {f"{turn.player}/{k}": v.detach() for k, v in loss.logs.items()}
        return logs

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of every player."""
        return {name: player.tensors() for name, player in self.players.items()}

    def load_state(
        self, step: int, tensors: Mapping[str, dict[str, Tensor]], updates: Mapping[str, int]
    ) -> None:
        """Go to ``step`` with the players' tensors and update counts of a checkpoint.

        The players are those of the last step done: a phase that begins at ``step`` is not begun.

        Raises:
            UserError: with this config other players train at that step.
        """
        self.prepare(step - 1)
        if set(updates) != set(self.players):
            raise UserError(
                f"steps={self.config.steps}: at step {step} this run trains "
                f"{', '.join(self.players)}, the checkpoint {', '.join(updates)}; "
                "set steps back to what it was"
            )
        for name, player in self.players.items():
            player.load_tensors(tensors[name], updates[name])
