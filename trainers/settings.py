"""The keys that every training config has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from stepdistill.data.degrade import DegradeConfig
from stepdistill.data.images import DataConfig
from stepdistill.run.player import OptimConfig
from stepdistill.run.plug import Plugged
from stepdistill.trainers.solvers import Solver, Walk, brief


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
    features: str = Field(
        "digits", description="feature space: digits, fashion-mnist, pixels or inception"
    )


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


def without_substeps(solver: Solver) -> Any:
    """What a config writes for a solver where something else says how many steps it takes."""
    said = brief(solver)
    if isinstance(said, dict):
        return {key: value for key, value in said.items() if key != "substeps"}
    return said


class PairsConfig(Section):
    """The store of pairs, made by ``stepdistill pairs`` or, where it is missing, at the start."""

    path: str | None = Field(
        None,
        description="folder of the store, or its URL, such as s3://bucket/pairs, by fsspec; "
        "RUN/pairs if null",
    )
    num: int = Field(10_000, ge=1, description="pairs to make")
    steps: int = Field(32, ge=1, description="the teacher's steps for a pair")
    seed: int = Field(0, ge=0, description="seed of the pairs' noise")
    shard: int = Field(2048, ge=1, description="pairs in a file")
    batch_size: int = Field(256, ge=1, description="pairs made at once")
    solver: Annotated[Plugged[Solver], PlainSerializer(without_substeps)] | None = Field(
        None, description="of the teacher's steps: euler, heun, dpm or FILE.py:CLASS; null: euler"
    )
    invert: bool | None = Field(
        None,
        description="pairs of the images of data: each with the noise that the teacher's flow "
        "takes it to; null: of drawn noise, each with the image that the teacher makes of it",
    )
    store: Literal["uint8", "fp16", "bf16", "fp32"] | None = Field(
        None, description="type that images are kept in, uint8 for pixels; null: fp32"
    )
    flip: bool | None = Field(
        None,
        description="use every pair mirrored too, after a check that the teacher's images of "
        "mirrored noise are mirrored; null: no",
    )
    online: bool | None = Field(
        None, description="make the pairs of a step when it comes, and keep none; null: no"
    )
    shares: tuple[float, ...] | None = Field(
        None,
        min_length=1,
        description="shares of a merged store's parts in a batch; null: by their pairs",
    )

    @field_validator("path", mode="before")
    @classmethod
    def _place(cls, value: Any) -> Any:
        plain = isinstance(value, Path) or (isinstance(value, str) and "://" not in value)
        return str(Path(value)) if plain else value

    @field_validator("invert", "flip", "online")
    @classmethod
    def _off(cls, value: bool | None) -> bool | None:
        return value or None  # a config's hash passes over what is null

    @field_validator("shares")
    @classmethod
    def _positive(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and (min(value) < 0 or not sum(value)):
            raise PydanticCustomError("shares", "must not be negative, nor all be 0")
        return value

    @field_validator("solver")
    @classmethod
    def _walks(cls, value: Solver | None) -> Solver | None:
        if value is not None and not isinstance(value, Walk):
            raise PydanticCustomError("walk", "asks no teacher; take euler, heun or dpm")
        if value is not None and "substeps" in value.model_fields_set:
            raise PydanticCustomError("substeps", "takes no substeps: pairs.steps says how many")
        return value

    @property
    def walk(self) -> Walk | None:
        """The solver; None for Euler's, of the sampler."""
        assert self.solver is None or isinstance(self.solver, Walk)
        return self.solver

    @model_validator(mode="after")
    def _keeps(self) -> PairsConfig:
        if self.online and self.path is not None:
            raise PydanticCustomError(
                "online", "online pairs are not kept; leave out path or set online to null"
            )
        return self


class TrainConfig(Section):
    """One training run.

    ``idle`` names keys, each with the settings of another (``key=value``) by which it does nothing.
    """

    idle: ClassVar[Mapping[str, tuple[str, ...]]] = {}

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

    def without_effect(self) -> list[str]:
        """A line for each key that was given and that does nothing beside another."""

        def holds(setting: str) -> bool:
            key, _, value = setting.partition("=")
            own = getattr(self, key)
            text = "null" if own is None else f"{own:g}" if isinstance(own, float) else str(own)
            return text == value

        return [
            f"{key}: does nothing with {setting}"
            for key, settings in self.idle.items()
            for setting in settings
            if key in self.model_fields_set and holds(setting)
        ]

    @property
    def taught_degrade(self) -> DegradeConfig | None:
        """How the pictures are made small that the teacher sees."""
        return self.data.degrade

    degrade_mend: ClassVar[str] = ""  # what else than the teacher's own may be set

    @property
    def upscaling(self) -> dict[str, Any]:
        """The pipeline's setting by which it makes small pictures large, if it does."""
        degrade = self.data.degrade
        return {} if degrade is None else {"degrade": degrade.model_dump(mode="json")}

    @property
    def pair_store(self) -> PairsConfig | None:
        """The pairs of noise and image that the run trains on, if it does."""
        return None

    @property
    def kept_steps(self) -> int | None:
        """The student's steps, of two or more, at whose times states are kept with pairs."""
        return None
