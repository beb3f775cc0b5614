"""Flash-WAM: consistency whose outputs have boundary functions of their own, group by group.

A clean estimate is f = a(s) x + b(s) v of the flow's velocity v, and of the loss's gradient b(s)
reaches the network: linear in s near the data, or as its square. Groups are parts of the samples'
channels, as of a model that draws a video and actions together.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.losses.boundary import Family, bounded_head
from stepdistill.run.errors import UserError
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.trajectory.consistency import ConsistencyConfig, ConsistencyTrainer

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0)]


class FlashWAMConfig(ConsistencyConfig):
    """Settings of ``flash_wam``."""

    groups: tuple[Count, ...] | None = Field(
        None, description="channels of each group of outputs, from the first on; null: one group"
    )
    families: tuple[Family, ...] = Field(
        ("linear",), description="of each group: whether b falls with s, or with its square"
    )
    shares: tuple[Share, ...] | None = Field(
        None, description="weights of the groups' distances; null: 1 each"
    )
    sigma_data: float = Field(0.5, gt=0, description="of the family preserving")


class FlashWAMTrainer(ConsistencyTrainer):
    """Modality-aware consistency of Flash-WAM, spec M17, known from its code and from notes.

    Here: pairs are ECT's, in the place of a stride of half of the grid, losses are weighed by
    1 / (t - r), a distance is of whole samples, the student is its own target, and all groups share
    one time; the flow-matching term on actions, and guidance of the video
    alone, are left out. A student of several groups has no picture pipeline, so that
    ``stepdistill export`` refuses it.
    """

    Config = FlashWAMConfig
    config: FlashWAMConfig
    proofs: ClassVar = {
        "linear": Proof(("gmm1d",), {"pairs": {"kind": "grid", "steps": 8}, "metric": "l2"}),
        "two groups": Proof(
            ("gaussian",),
            {
                "pairs": {"kind": "grid", "steps": 4},
                "metric": "l2",
                "groups": (1, 1),
                "families": ("preserving", "linear"),
                "optim": {"lr": 5e-2, "betas": (0.9, 0.99), "decay": "cosine", "clip": None},
            },
            effort=2.0,
        ),
    }

    def setup(self) -> None:
        """See :meth:`ConsistencyTrainer.setup`; student, average and target read by the groups.

        Raises:
            UserError: a teacher that predicts no flow velocity, or groups that are not all of the
                samples' channels.
        """
        c, count = self.config, self.teacher.sample_shape[0]
        if self.process.name != "rf" or self.teacher.head.name != "velocity":
            raise UserError(
                "teacher: boundary functions are of a flow's velocity; take a flow teacher, such "
                "as digits-dit"
            )
        self.groups = c.groups or (count,)
        self.weights = c.shares or (1.0,) * len(self.groups)
        if sum(self.groups) != count:
            raise UserError(
                f"groups: they have {sum(self.groups)} channels, and the samples {count}; make "
                "them as many"
            )
        for key, values in (("families", c.families), ("shares", self.weights)):
            if len(values) != len(self.groups):
                raise UserError(
                    f"{key}: {len(values)} for {len(self.groups)} groups; give one for each"
                )
        super().setup()
        head = bounded_head(self.groups, c.families, c.sigma_data)
        student = self.players["student"]
        for den in (student.denoiser, student.ema, self.target_net):
            if den is not None:
                den.head = head

    def apart(self, delta: Tensor) -> Tensor:
        """See :meth:`ConsistencyTrainer.apart`: each group's own, weighed and added."""
        parts = zip(self.weights, delta.split(self.groups, dim=1), strict=True)
        one = super().apart
        return torch.stack([weight * one(part) for weight, part in parts]).sum(dim=0)


TRAINER = FlashWAMTrainer
