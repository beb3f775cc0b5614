"""Consistency distillation: the student's clean estimates agree along the teacher's paths.

A noisy image at time t is taken to an earlier time r, by one teacher step (distillation) or, with
``solver: data``, along its own noise (training and tuning); the student's estimate at t is pulled
to its own (or its average's) estimate at r, which is exact at r = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.data.batch import Batch
from stepdistill.diffusion.denoiser import Denoiser, Prediction
from stepdistill.diffusion.process import expand
from stepdistill.diffusion.sampler import NoiseSource
from stepdistill.diffusion.timesteps import Grid
from stepdistill.losses.consistency import InverseGap, PairWeight
from stepdistill.losses.distance import Distance, PseudoHuber
from stepdistill.run.errors import UserError
from stepdistill.run.plug import Plugged, a_sample
from stepdistill.run.ratios import sample_parts
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Loss, Pass, Turn
from stepdistill.trainers.beginning import renewed
from stepdistill.trainers.by_output import ByOutput, ByOutputConfig, Reading
from stepdistill.trainers.dropping import Dropping, DroppingConfig
from stepdistill.trainers.fixed_point import FixedPoint, Proof
from stepdistill.trainers.solvers import Asked, Data, Euler, Solved, Solver, Walk
from stepdistill.trainers.trajectory.pairs import Ect, Pairs, Span
from stepdistill.trainers.trajectory.scales import ScaleRange, Scales, ScalesConfig

EVEN = {"t": {"kind": "uniform"}}
LEAST = 1e-3  # share of the image below which a state is pure noise


class ConsistencyConfig(ScalesConfig, DroppingConfig, ByOutputConfig):
    """Settings of ``consistency``."""

    idle: ClassVar[Mapping[str, tuple[str, ...]]] = {"target_decay": ("target=stop_gradient",)}

    pairs: Plugged[Pairs] = Field(default_factory=Ect, description="which times are compared")
    solver: Solved = Field(
        default_factory=Euler,
        description="the teacher's steps from t to r, or data: the image's own state at r",
    )
    target: Literal["stop_gradient", "ema"] = Field(
        "stop_gradient", description="whose estimate at r is the target"
    )
    target_decay: float = Field(0.95, ge=0, lt=1, description="decay of the ema target")
    metric: Plugged[Distance] = Field(
        default_factory=PseudoHuber, description="distance of the two estimates"
    )
    weight: Plugged[PairWeight] = Field(
        default_factory=InverseGap, description="what a pair counts: one, or 1 / (t - r)"
    )
    scratch: bool = Field(
        False,
        description="begin with fresh weights, and not the teacher's; with solver=data nothing is "
        "learnt of the teacher then but its shape (iCT)",
    )
    guidance_range: ScaleRange | None = Field(
        None, description="guidance drawn uniformly a sample, instead of the constant one"
    )
    embedding: bool | None = Field(
        None,
        description="tell the student the guidance of the range; null, false: it learns the mean "
        "over it, as adapters do",
    )

    @property
    def tells(self) -> bool:
        """See :attr:`ScalesConfig.tells`: as ``embedding`` says."""
        return bool(self.embedding)


class ConsistencyTrainer(Scales, Dropping, ByOutput):
    """Discrete consistency: distillation (Song et al. 2023; LCM), ECT, iCT; specs M2 to M5.

    iCT is ``scratch: true`` with ``solver: data`` and ``pairs: doubling``; ECT is ``solver: data``
    with ``pairs: ect``, from the teacher's weights. Here: pairs and their weight 1 / (t - r) are of
    the process's own time, where ECT and iCT have noise levels (as ECT here has them by ``pairs.k``
    and ``weight.levels``); and a network that predicts noise is held to its output where estimates
    are a larger multiple of it (``by_output``), sigma / alpha at the noisiest, lest these times
    drown all others; by what is beside the distance too, such as a discriminator.
    """

    Config = ConsistencyConfig
    config: ConsistencyConfig
    needs: Literal["labels", "data", "pairs"] = "data"
    clips = True
    noise: NoiseSource = "fresh"
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    untold: ClassVar = "embedding=false"
    experts: ClassVar = False  # whether its student is of several networks
    proofs: ClassVar = {
        "grid": Proof(
            ("gaussian", "gmm1d", "classes"),
            {"pairs": {"kind": "grid", "steps": 8}, "metric": "l2"},
        ),
        "heun, averaged target": Proof(
            ("gaussian",),
            {"pairs": {"kind": "grid", "steps": 8}, "solver": "heun", "target": "ema"}
            | {"metric": "l2"},
        ),
        "ect": Proof(
            ("gaussian",),
            {"pairs": {"kind": "ect", "stages": 2, **EVEN}, "solver": "data"} | {"metric": "l2"},
            effort=2.0,
            batch=4,
        ),
        "images alone": Proof(
            ("gaussian",),
            {"pairs": {"kind": "doubling", "first": 4, "last": 8, **EVEN}, "solver": "data"}
            | {"metric": "l2"},
            effort=2.0,
            batch=4,
        ),
    }

    def setup(self) -> None:
        """The student, and an average of it as the target where one is asked for.

        Raises:
            UserError: guidance without a teacher's step, or to be told that is not drawn or that
                its network cannot be told, a beginning that is not to be had, random steps from
                where they forget all, or an output that ``by_output`` is not of.
        """
        c = self.config
        self.check_dropout()
        self.check_output()
        self.check_scales()
        if isinstance(c.solver, Data) and c.guided:
            raise UserError(
                "guidance: solver=data asks the teacher nothing that could be guided; set "
                "guidance=1 and no guidance_range"
            )
        if c.scratch and c.lora is not None:
            raise UserError(
                "lora: adapters change a trained network; set scratch=false or lora=null"
            )
        top = self.process.coefs(torch.tensor([self.top])).alpha
        if isinstance(c.solver, Walk) and c.solver.random and float(top) < LEAST:
            raise UserError(
                "solver: a random step from pure noise keeps nothing of it, so that one step would "
                "draw the mean; set start=0.97, or eta=0"
            )
        if c.pairs.staged:
            self.kept = ("steps",)
        first, copy = self.beginning()
        self.add_player("student", first, c.optim, ema=True, total=c.steps, copy=copy)
        self.target_net: Denoiser | None = None
        if c.target == "ema":
            self.target_net = self.denoiser("student").twin("target")
            self.target_params = self.target_net.own()
            for param in self.target_params:
                param.requires_grad_(False)
        self.span = Span(self.process, self.start, c.steps, self.drawn, self.device)

    def check_scales(self) -> None:
        """Refuse guidance to be told that is not drawn, or to one network of several."""
        if self.config.embedding and self.config.guidance_range is None:
            raise UserError(
                "embedding: without guidance_range there is one scale only; give a range, or set "
                "embedding=false"
            )
        if self.config.embedding and self.experts:
            raise UserError(
                "embedding: exports tell one network its guidance, and this student is of two; "
                "set embedding=false"
            )

    @property
    def further(self) -> Mapping[str, str]:
        """Further numbers that the student is told, each with the key by which it would not be."""
        return {}

    def beginning(self) -> tuple[Denoiser, bool]:
        """What the student begins as, and whether it is to be copied first."""
        if self.config.scratch:
            return self.heeding(renewed(self.initial, self.config), False, **self.further)
        return self.heeding(self.initial, **self.further)

    @property
    def fixed_point(self) -> FixedPoint:
        """The end of the chain of steps by which estimates are compared, from any time to 0.

        With ``solver: data`` and a squared distance, the mean of an image's own states is where
        Euler's step leads. Of a solver that draws noise it is the mean as well, which has a closed
        form where the teacher's estimates are affine.
        """
        solver = self.config.solver
        return FixedPoint(
            "map",
            follow=self.chain,
            solver=solver if isinstance(solver, Walk) else "euler",
            sampled=not isinstance(solver, Walk),
        )

    def chain(self, t: float) -> Grid:
        """Times from t to 0, each the partner of the one before, at the end of the run."""
        return self.config.pairs.chain(t, self.span)

    def turns(self, step: int) -> list[Turn]:
        """One player, one turn."""
        return [Turn(self.active, self.loss)]

    def times(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """The pair (t, r) of every sample [B], r < t."""
        return self.config.pairs.draw(rng, batch.index, self.span)

    def end(self, t: Tensor) -> Tensor:
        """Where the estimates of states at times t [B] lie that are compared: the clean image."""
        return torch.zeros_like(t)

    @property
    def active(self) -> str:
        """The player that is trained at present."""
        return "student"

    def ends(self, t: Tensor, r: Tensor, batch: Batch, rng: Rng) -> Tensor:
        """Where the estimates of the pairs (t, r) [B] lie: by t alone, unless a method draws it."""
        return self.end(t)

    @property
    def solver(self) -> Solver:
        """How the state at r comes about, at present."""
        return self.config.solver

    def noised(self, t: Tensor, batch: Batch, rng: Rng) -> Tensor:
        """The states at times t [B] whose estimates are learnt: the data's."""
        assert batch.x is not None
        return self.process.noise(batch.x, self.z(batch, rng), t)

    def loss(self, batch: Batch, rng: Rng) -> Loss:
        """Distance between the estimates at t and at r."""
        student, batch = self.denoiser(self.active), self.telling(batch, rng)
        t, r = self.times(batch, rng)
        end = self.ends(t, r, batch, rng)
        with torch.no_grad():
            x_t = self.noised(t, batch, rng)
            if isinstance(self.solver, Walk):
                x_r = self.solve(self.solver, x_t, t, r, batch, rng)
            else:
                x_r = self.noised(r, batch, rng)
        with self.dropping(batch, rng, *self.compared()):
            with torch.no_grad():
                target = self.aim(x_r, r, end, batch)
            estimate = self.jump(student, x_t, t, end, batch)
        delta, landing = estimate - target, self.landing(end)
        off = self.evened(delta, t, landing)
        loss = (self.worth(t, r) * self.apart(off)).mean()
        more = self.beside(self.eased(estimate, t, landing), target, end, batch, rng)
        for part in more.values():
            loss = loss + part
        logs = {"loss": loss, "distance": delta.abs().mean(), **more}
        return Loss(loss, logs | sample_parts(estimate))

    def compared(self) -> list[Denoiser | None]:
        """The networks whose estimates are compared."""
        return [self.denoiser(self.active), self.target_net]

    def aim(self, x_r: Tensor, r: Tensor, end: Tensor, batch: Batch) -> Tensor:
        """What the estimates are pulled to: the student's, or its average's, of the states at r."""
        return self.jump(self.target_net or self.denoiser(self.active), x_r, r, end, batch)

    def worth(self, t: Tensor, r: Tensor) -> Tensor:
        """The weight of each pair (t, r) [B]."""
        weight = self.config.weight
        return a_sample(weight, "weight", weight(t, r, self.process), len(t))

    def landing(self, end: Tensor) -> Reading:
        """What is compared of estimates at times ``end`` [B]."""

        def read(x: Tensor, z: Tensor) -> Tensor:
            to = self.process.coefs(end)
            return to.alpha * x + to.sigma * z

        return read

    def apart(self, delta: Tensor) -> Tensor:
        """The distance [B] that a difference of two estimates [B, C, *S] stands for."""
        return a_sample(self.config.metric, "metric", self.config.metric(delta), len(delta))

    def beside(
        self, estimate: Tensor, target: Tensor, end: Tensor, batch: Batch, rng: Rng
    ) -> dict[str, Tensor]:
        """What the student's estimates of states at ``end`` [B] cost beside that distance."""
        return {}

    def solve(
        self, solver: Walk, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch, rng: Rng
    ) -> Tensor:
        """The teacher's steps from t to r."""
        fresh = partial(self.fresh, batch, rng)
        return solver(self.asked(batch, rng), x_t, t, r, fresh)

    def fresh(self, batch: Batch, rng: Rng, step: int) -> Tensor:
        """The noise of a solver's step by its number."""
        return self.z(batch, rng, f"solver-{step}")

    def asked(self, batch: Batch, rng: Rng) -> Asked:
        """The teacher under the batch's conditions, guided by what is drawn for each sample."""
        return Asked(self.teacher, batch.cond, self.scale(batch, rng))

    def jump(self, den: Denoiser, x_t: Tensor, t: Tensor, end: Tensor, batch: Batch) -> Tensor:
        """The estimate of the state at times ``end`` [B]; where that is t, the state itself."""
        pred = den(x_t, t.clamp_min(self.process.t_min), batch.cond)
        return torch.where(expand(t <= end, x_t), x_t, self.landed(pred, end))

    def landed(self, pred: Prediction, end: Tensor) -> Tensor:
        """Where a prediction leads: its clean estimate."""
        return self.shown(pred.x)

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`Trainer.step`; then the ema target follows."""
        logs = super().step(step, batch)
        if self.target_net is not None:
            weight = 1 - self.config.target_decay
            torch._foreach_lerp_(self.target_params, self.players[self.active].weights, weight)
        return logs

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See :meth:`Trainer.state`; with the ema target."""
        out = super().state()
        if self.target_net is not None:
            out["target"] = self.target_net.weights()
        return out

    def load_state(
        self, step: int, tensors: Mapping[str, dict[str, Tensor]], updates: Mapping[str, int]
    ) -> None:
        """See :meth:`Trainer.load_state`."""
        super().load_state(step, tensors, updates)
        if self.target_net is not None:
            self.target_net.load(tensors["target"])

    def members(self) -> list[tuple[str, Denoiser]]:
        """See :meth:`Trainer.members`; with the ema target."""
        target = self.target_net
        return super().members() + ([("target", target)] if target is not None else [])

    def passes(self) -> list[Pass]:
        """Teacher's steps, target, student."""
        calls = self.solver.passes
        step = Pass("teacher", "forward", calls, 2 if self.config.guided else 1)
        own = [Pass("student", "forward"), Pass("student", "train")]
        return [step, *own] if calls else own


TRAINER = ConsistencyTrainer
