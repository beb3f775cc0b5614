"""A diffusers scheduler whose few-step grids are written out number by number.

This file needs torch and diffusers only: a copy of it travels in the ``scheduler/`` folder of
every exported pipeline, so that the folder loads where stepdistill is not installed.

Letters: x clean in [-1, 1], z standard normal noise, x_t = alpha x + sigma z the state,
h = a x + b z the network's raw output. Shapes: B batch, C channels, H W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

FILE_NAME = "literal_grid.py"
NOISE_SOURCES = ("predicted", "fresh", "initial", "heun")
ROW_KEYS = ("time", "scale", "alpha", "sigma", "a", "b", "expert")
TOLD_KEYS = ("end",)

_SOURCE = Path(__file__).read_text(encoding="utf-8")


@dataclass
class LiteralGridOutput(BaseOutput):
    """What a step returns: the next state and the clean estimate, both [B, C, H, W], fp32."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class LiteralGridScheduler(SchedulerMixin, ConfigMixin):
    """Walks a fixed grid: predict the clean part, then mix it with noise for the next level.

    One step solves h = a x + b z and x_t = alpha x + sigma z for the estimates x and z, and moves
    to alpha' x + sigma' n with the next row's alpha', sigma'. The last step returns x. The noise n
    is the predicted z (Euler and DDIM steps), fresh (consistency and distribution matching
    students) or the initial noise (students on straight paths). Arithmetic is fp32.

    With ``heun`` every other row stands where the step before it has led by the predicted z: what
    the network says there is averaged with what it said before, and the step taken once more, in
    coordinates x_t / (alpha + sigma) against sigma / (alpha + sigma), in which paths of rectified
    flows are straight. The last row has no such twin.

    Steps are counted, never looked up by time, so two rows may share a time.

    Args:
        grids: for each number of steps n, as text, n rows from the noisiest to the cleanest, each
            ``{"time", "scale", "alpha", "sigma", "a", "b", "expert"}``: the number the network is
            told, the factor on its input, the coefficients above, and which network runs (0 is
            ``model``, 1 is ``model_2``, ...); and ``"end"``, the further number that says where the
            step ends, for a network that is told.
        noise: where n comes from: ``predicted``, ``fresh`` or ``initial``; or ``heun``, the
            predicted one in steps of the second order, of two rows each.
        default_steps: the number of steps taken when none is asked for.
        clip: clamp every clean estimate to [-clip, clip]; None does not.
        stock: for a network that knows all times, and may be walked by any grid: a stock scheduler
            that tells its process and output, as its config with ``_class_name``; else None.

    Raises:
        ValueError: a grid that is empty, incomplete or singular, or for ``heun`` one whose rows but
            the first are not there twice; an unknown noise source, or a default without its grid.
    """

    order = 1
    config: Any

    def __init__(
        self,
        grids: Mapping[str, Sequence[Mapping[str, float]]],
        noise: str = "predicted",
        default_steps: int = 1,
        clip: float | None = None,
        stock: Mapping[str, Any] | None = None,
    ) -> None:
        if noise not in NOISE_SOURCES:
            raise ValueError(f"noise is {noise!r}; known sources are {', '.join(NOISE_SOURCES)}")
        literal = {str(steps): _checked(str(steps), rows) for steps, rows in grids.items()}
        if noise == "heun" and not all(map(_twofold, literal.values())):
            raise ValueError("noise is 'heun', whose rows but the first are there twice each")
        self.register_to_config(
            grids=literal,
            noise=noise,
            default_steps=int(default_steps),
            clip=clip,
            stock=None if stock is None else dict(stock),
        )
        self.set_timesteps()

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Choose a grid and stand before its first row.

        Args:
            num_inference_steps: one of the written grids; None takes the default.
            device: where ``timesteps`` is put.

        Raises:
            ValueError: a number of steps for which no grid was written; the message lists those
                that were.
        """
        steps = self.config.default_steps if num_inference_steps is None else num_inference_steps
        grids = self.config.grids
        if str(steps) not in grids:
            known = ", ".join(sorted(grids, key=int))
            raise ValueError(
                f"this model takes {known} steps, not {steps}: it was trained and saved for those"
            )
        self._rows: list[dict[str, Any]] = grids[str(steps)]
        self.num_inference_steps = len(self._rows)
        self.timesteps = torch.tensor(
            [row["time"] for row in self._rows], dtype=torch.float32, device=device
        )
        self._initial: torch.Tensor | None = None
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None  # of heun
        self._begin_index = self._step_index = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Stand before row ``begin_index`` instead of the first.

        Raises:
            ValueError: no such row, or a later one that needs what came before it.
        """
        if not 0 <= begin_index < len(self._rows):
            raise ValueError(f"begin_index is {begin_index}, the grid has {len(self._rows)} rows")
        if begin_index and self.config.noise in ("initial", "heun"):
            raise ValueError(f"noise is {self.config.noise!r}, so the walk must begin at row 0")
        self._begin_index = self._step_index = begin_index

    @property
    def begin_index(self) -> int:
        """The row that the walk began at."""
        return self._begin_index

    @property
    def step_index(self) -> int:
        """The row whose step comes next; the number of rows when the walk is over."""
        return self._step_index

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the state the grid starts from."""
        return float(self._rows[0]["sigma"])

    @property
    def expert(self) -> int:
        """Which network the coming step needs, from 0."""
        return int(self._row()["expert"])

    @property
    def told(self) -> dict[str, float]:
        """Further numbers, by name, that the coming step's network is told."""
        return {key: self._row()[key] for key in TOLD_KEYS if key in self._row()}

    def scale_model_input(
        self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """The state [B, C, H, W] as the coming step's network is fed it; ``timestep`` is unused."""
        scale = self._row()["scale"]
        return sample if scale == 1.0 else sample * scale

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> LiteralGridOutput | tuple[torch.Tensor, torch.Tensor]:
        """Take the coming step.

        Args:
            model_output: raw output h [B, C, H, W].
            timestep: taken for the sake of the interface; steps are counted.
            sample: the state x_t [B, C, H, W].
            generator: for fresh noise: one, or one for each sample.
            return_dict: False returns the pair (next state, clean estimate).

        Returns:
            The next state, in the state's own type, and the clean estimate in fp32, [B, C, H, W].

        Raises:
            ValueError: the walk is over.
        """
        row, x_t = self._row(), sample.to(torch.float32)
        x, z = _solve(row, x_t, model_output.to(torch.float32))
        if self.config.clip is not None:
            x = x.clamp(-self.config.clip, self.config.clip)
        if self.config.noise == "initial" and self._step_index == 0:
            self._initial = x_t / row["sigma"]
        self._step_index += 1
        if self._step_index == len(self._rows):
            moved = x
        elif self.config.noise == "heun" and self._step_index % 2 == 0:
            moved = self._again(row, z - x)
        else:
            after = self._rows[self._step_index]
            moved = after["alpha"] * x + after["sigma"] * self._noise(z, generator)
            self._before = (x_t, z - x) if self.config.noise == "heun" else None
        moved = moved.to(sample.dtype)  # of half precision, where a pipeline's states are
        if not return_dict:
            return moved, x
        return LiteralGridOutput(prev_sample=moved, pred_original_sample=x)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The state alpha x + sigma z [B, C, H, W] at rows of the grid, named by their times [B].

        Raises:
            ValueError: a time that no row of the grid has.
        """
        known: list[float] = self.timesteps.tolist()
        asked: list[float] = torch.as_tensor(timesteps).float().reshape(-1).tolist()
        missing = [time for time in asked if time not in known]
        if missing:
            raise ValueError(f"no row has the time {missing[0]:g}; the grid's times are {known}")
        rows = [self._rows[known.index(time)] for time in asked]
        x = original_samples.to(torch.float32)
        alpha, sigma = (
            x.new_tensor([row[key] for row in rows]).reshape(-1, *(1,) * (x.dim() - 1))
            for key in ("alpha", "sigma")
        )
        return alpha * x + sigma * noise.to(x)

    def save_pretrained(
        self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save the config, and this file beside it, so that the folder can be loaded again."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).write_text(_SOURCE, encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def __len__(self) -> int:
        """Number of rows of the chosen grid."""
        return len(self._rows)

    def _row(self) -> dict[str, Any]:
        if self._step_index == len(self._rows):
            raise ValueError(f"all {len(self._rows)} steps were taken; call set_timesteps again")
        return self._rows[self._step_index]

    def _again(self, row: Mapping[str, Any], slope: torch.Tensor) -> torch.Tensor:
        """The step to this row once more, by the mean of its slopes z - x at both ends."""
        assert self._before is not None
        x_t, first = self._before
        start = self._rows[self._step_index - 2]
        size, before = row["alpha"] + row["sigma"], start["alpha"] + start["sigma"]
        width = row["sigma"] / size - start["sigma"] / before
        moved: torch.Tensor = size * (x_t / before + width / 2 * (first + slope))
        return moved

    def _noise(
        self, z: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        if self.config.noise in ("predicted", "heun"):
            return z
        if self.config.noise == "initial":
            assert self._initial is not None
            return self._initial
        noise: torch.Tensor = randn_tensor(
            tuple(z.shape), generator=generator, device=z.device, dtype=z.dtype
        )
        return noise


def _solve(
    row: Mapping[str, Any], x_t: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and noise estimates from the state and the raw output, all [B, C, H, W]."""
    alpha, sigma, a, b = row["alpha"], row["sigma"], row["a"], row["b"]
    if b == 0.0:
        x = h if a == 1.0 else h / a
        return x, (x_t - alpha * x) / sigma
    det = alpha * b - sigma * a
    x = (b * x_t - sigma * h) / det
    if a == 0.0:
        return x, h if b == 1.0 else h / b
    return x, (alpha * h - a * x_t) / det


def _twofold(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each row but the first is there twice."""
    return len(rows) % 2 == 1 and all(rows[k] == rows[k + 1] for k in range(1, len(rows), 2))


def _checked(steps: str, rows: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Rows with float entries and whole experts.

    Raises:
        ValueError: a grid that cannot be walked.
    """
    if not steps.isdecimal() or int(steps) != len(rows) or not rows:
        raise ValueError(f"grids[{steps!r}] has {len(rows)} rows; it must have as many as its name")
    checked: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        where = f"grids[{steps!r}][{i}]"
        if set(row) - set(TOLD_KEYS) != set(ROW_KEYS):
            raise ValueError(f"{where} has {sorted(row)}; a row is {', '.join(ROW_KEYS)}")
        numbers = {key: float(value) for key, value in row.items()}
        if not all(math.isfinite(number) for number in numbers.values()):
            raise ValueError(f"{where} has a number that is not finite")
        if numbers["alpha"] * numbers["b"] == numbers["sigma"] * numbers["a"]:
            raise ValueError(f"{where} is singular: alpha b = sigma a, so h tells nothing new")
        if numbers["expert"] < 0 or not numbers["expert"].is_integer():
            raise ValueError(f"{where} has expert {numbers['expert']:g}; it must be 0, 1, 2, ...")
        checked.append({**numbers, "expert": int(numbers["expert"])})
    return checked
