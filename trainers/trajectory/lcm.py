"""LCM: guided consistency over steps of the teacher's own grid, told by how much it is guided.

The teacher's step is guided by a scale drawn a sample, which the student is told; so that one
student draws images as of any guidance in the range, without a second pass.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from stepdistill.losses.consistency import One, PairWeight
from stepdistill.run.plug import Plugged
from stepdistill.trainers.fixed_point import Proof
from stepdistill.trainers.trajectory.consistency import ConsistencyConfig, ConsistencyTrainer
from stepdistill.trainers.trajectory.pairs import Grid, Pairs
from stepdistill.trainers.trajectory.scales import ScaleRange


class LCMConfig(ConsistencyConfig):
    """Settings of ``lcm``."""

    pairs: Plugged[Pairs] = Field(
        default_factory=lambda: Grid(steps=50), description="which times are compared"
    )
    target: Literal["stop_gradient", "ema"] = Field(
        "ema", description="whose estimate at r is the target"
    )
    weight: Plugged[PairWeight] = Field(
        default_factory=One, description="what a pair counts: one, or 1 / (t - r)"
    )
    guidance: float = Field(2.0, ge=0, description="by which the student samples, of the range")
    guidance_range: ScaleRange | None = Field(
        (1.0, 3.0), description="guidance drawn uniformly a sample, instead of the constant one"
    )
    embedding: bool | None = Field(
        True,
        description="tell the student the guidance of the range; false: it learns the mean over "
        "it, as adapters do",
    )


class LCMTrainer(ConsistencyTrainer):
    """Latent consistency models (Luo et al. 2023), spec M3: guided, by skips, and LCM-LoRA.

    Here: estimates are the clean images themselves; of their c_skip 0.0025 and less is left at the
    first of a thousand times already, and the distance is of whole samples. The scale w is told as
    1 - 1 / w by waves of our own.
    """

    Config = LCMConfig
    config: LCMConfig
    proofs: ClassVar = {
        "told": Proof(
            ("classes",),
            {"pairs": {"kind": "grid", "steps": 8}, "metric": "l2", "guidance_range": (1.0, 4.0)}
            | {"target": "stop_gradient"},
            effort=2.0,
        ),
        "one scale": Proof(
            ("gmm1d",),
            {"pairs": {"kind": "grid", "steps": 8}, "metric": "l2", "guidance": 1.0}
            | {"embedding": False, "guidance_range": None},
        ),
    }


TRAINER = LCMTrainer
