"""The keys that every training config has."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from stepdistill.data.images import DataConfig
from stepdistill.run.player import OptimConfig


class Section(BaseModel):
    """A part of a config that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class EmaConfig(Section):
    """Moving average of the student's weights: what is sampled, saved and exported."""

    decay: float = Field(0.998, ge=0, lt=1, description="share of the old average at each update")


class LoraConfig(Section):
    """Low-rank adapters on the teacher's network, in place of networks of the players' own."""

    rank: int = Field(16, ge=1, description="rank of the product that is added to a weight")
    alpha: float | None = Field(
        None, gt=0, description="the product is multiplied by alpha / rank; null: alpha = rank"
    )
    targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="ends of the names of the linear and convolution layers that are adapted, such "
        "as to_q or ff.net.2; * is anything; null: by the network's family",
    )
    players: tuple[Literal["student", "critic"], ...] = Field(
        ("student", "critic"),
        min_length=1,
        description="which players are adapters; the others are networks of their own",
    )


class LogConfig(Section):
    """What is written while training."""

    every_steps: int = Field(20, ge=1, description="steps between rows of log.jsonl")
    tensorboard: bool = Field(True, description="also write TensorBoard files to RUN/tensorboard")


class SampleConfig(Section):
    """Sample grids of student and teacher from the same noise, in RUN/samples."""

    every_steps: int = Field(500, ge=0, description="steps between grids; 0 turns them off")
    num: int = Field(40, ge=1, description="images in a grid")
    teacher_steps: int = Field(32, ge=1, description="steps of the teacher's grid")


class EvalConfig(Section):
    """Frechet distance of the student while it trains."""

    every_steps: int = Field(0, ge=0, description="steps between evaluations; 0 turns them off")
    num: int = Field(1000, ge=2, description="samples of one evaluation")
    steps: int | None = Field(
        None, ge=1, description="sampler steps; the fewest the student has if null"
    )
    features: str = Field("digits", description="feature space: digits, pixels or inception")


class CheckpointConfig(Section):
    """Checkpoints in RUN/checkpoints, written atomically."""

    every_steps: int = Field(500, ge=0, description="steps between checkpoints; 0: only the last")
    keep: int = Field(2, ge=1, description="newest checkpoints to keep, besides the best")


class HealthConfig(Section):
    """What is made of a run that goes wrong, seen from the rows of its log."""

    on_divergence: Literal["stop", "warn"] = Field(
        "stop", description="what a fake score that grows without bound leads to"
    )
    factor: float = Field(
        100.0, gt=1, description="how many times its lowest mean its loss or gradient may reach"
    )
    rows: int = Field(
        5, ge=1, description="rows of that mean; rows outside a healthy band before it is said"
    )
    warn: bool = Field(True, description="say once when a ratio stays outside its healthy band")


class PairsConfig(Section):
    """The store of pairs, made by ``stepdistill pairs`` or, where it is missing, at the start."""

    path: Path | None = Field(None, description="folder of the store; RUN/pairs if null")
    num: int = Field(10_000, ge=1, description="pairs to make")
    steps: int = Field(32, ge=1, description="the teacher's steps for a pair")
    seed: int = Field(0, ge=0, description="seed of the pairs' noise")
    shard: int = Field(2048, ge=1, description="pairs in a file")
    batch_size: int = Field(256, ge=1, description="pairs made at once")


class TrainConfig(Section):
    """One training run."""

    method: str = Field(description="a method of `stepdistill methods`")
    run: Path = Field(description="folder of the run, made if it is not there")
    seed: int = Field(0, ge=0, description="seed of weights, data order and noise")
    steps: int = Field(ge=1, description="training steps")
    batch_size: int = Field(128, ge=1, description="samples of one step over all processes")
    teacher: str = Field(description="a pipeline folder, a hub name, digits-dit or digits-unet")
    student: str | None = Field(
        None,
        description="a pipeline folder or a hub name whose network the student begins as, such as "
        "another method's student; null: the teacher's",
    )
    guidance: float = Field(1.0, ge=0, description="guidance scale of the teacher; 1: off")
    start: float | None = Field(
        None,
        gt=0,
        le=1,
        description="where the student's grid begins, as progress towards pure noise, 1; null: 1, "
        "but where alpha is 0.05 for noise predictors, whose clean estimate is singular at 1",
    )
    clip: float | None = Field(
        None,
        ge=1,
        description="clamp clean estimates to [-clip, clip], in training and in the sampler, so "
        "that what is matched is close to the picture that is shown (pixels only)",
    )
    data: DataConfig = Field(default_factory=DataConfig, description="images")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="the student's optimizer")
    ema: EmaConfig = Field(default_factory=EmaConfig, description="average of the weights")
    lora: LoraConfig | None = Field(
        None,
        description="train low-rank adapters on the teacher's network, which is held once; null: "
        "whole networks",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="recompute blocks in the backward pass: less memory, a forward pass more",
    )
    log: LogConfig = Field(default_factory=LogConfig, description="rows and curves")
    sample: SampleConfig = Field(default_factory=SampleConfig, description="pictures")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="figures while training")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="what is kept"
    )
    health: HealthConfig = Field(default_factory=HealthConfig, description="divergence, warnings")
    resume: str = Field("never", description="never, auto, or the path of a checkpoint")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the networks' passes")
    compile: bool = Field(
        False,
        description="run each trained network through torch.compile in its own updates, but for "
        "one that carries a head",
    )
    xformers: bool = Field(False, description="xformers attention (CUDA only)")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to train")

    @property
    def guided(self) -> bool:
        """Whether the teacher is asked with guidance, which doubles its batch."""
        return self.guidance != 1

    @property
    def guides_law(self) -> bool:
        """Whether the student, as it samples, has the guided teacher's law."""
        return self.guided

    @property
    def pair_store(self) -> PairsConfig | None:
        """The pairs of noise and image that the run trains on, if it does."""
        return None
