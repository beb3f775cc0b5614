"""Denoiser: a network, the process it was trained on, what its output means, and its signature."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepdistill.adapters import Adapter, adapter_for
from stepdistill.adapters.cond import Cond
from stepdistill.adapters.dropout import dropped
from stepdistill.adapters.taps import Tail, record
from stepdistill.diffusion.branch import Branch
from stepdistill.diffusion.codec import Codec
from stepdistill.diffusion.heads import HEADS, Head
from stepdistill.diffusion.process import Coefs, Process
from stepdistill.diffusion.prompts import Prompts
from stepdistill.diffusion.saved import (
    pipeline_folder,
    read_classes,
    read_codec,
    read_index,
    read_network,
    read_scheduler,
)


class Prediction:
    """What a network says of x_t: the clean part ``x`` and the noise part ``z``, made when asked.

    Args:
        h: raw output [B, C, *S].
        x_t: the state it was asked about [B, C, *S], fp32.
        c: the process's coefficients at t, expanded to x_t.
        features: outputs of the tapped modules by name.
    """

    def __init__(
        self,
        h: Tensor,
        x_t: Tensor,
        c: Coefs,
        head: Head,
        sigma_data: float,
        features: dict[str, Tensor] | None = None,
    ) -> None:
        self.h, self.x_t, self.c, self.head, self.sigma_data = h, x_t, c, head, sigma_data
        self.features = features or {}

    @cached_property
    def x(self) -> Tensor:
        """Clean estimate [B, C, *S]."""
        return self.head.clean(self.h, self.x_t, self.c, self.sigma_data)

    @cached_property
    def z(self) -> Tensor:
        """Noise estimate [B, C, *S]."""
        return self.head.noise(self.h, self.x_t, self.c, self.sigma_data)

    def clip(self, bound: float) -> None:
        """Clamp the clean estimate to [-bound, bound]; the noise estimate stays."""
        self.x = self.x.clamp(-bound, bound)

    @property
    def drift(self) -> Tensor:
        """z - x: the velocity in rectified flow's coordinates, for every process and head."""
        return self.z - self.x

    @property
    def velocity(self) -> Tensor:
        """dx_t/dt of the probability flow in the process's own time."""
        return self.c.d_alpha * self.x + self.c.d_sigma * self.z

    @property
    def score(self) -> Tensor:
        """Gradient of the log density of x_t."""
        return -self.z / self.c.sigma


class Denoiser(Branch):
    """A network that estimates the clean and noise parts of a noisy state.

    The network always runs in eval mode: dropout, and the label dropout that some backbones do by
    themselves in train mode, would make targets random. What ``dropout`` drops is drawn by
    the samples' own numbers.

    Args:
        net: any module that ``adapter`` knows.
        process: the corruption it was trained on.
        head: what its raw output means, a name of :data:`stepdistill.diffusion.heads.HEADS`.
        adapter: its call signature; found by the class's name when left out.
        classes: names of the classes it is conditioned on, empty if none.
        null_label: the label that means "no class", if the network was trained with one.
        degrade: how the pictures were made small that it has learnt to make large, if known.
        prompts: what its labels stand for, of a network that reads text; in the classes' place.
        codec: between pictures and what it denoises, of a model of latents.
    """

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        head: str,
        *,
        adapter: Adapter | None = None,
        classes: Sequence[str] = (),
        null_label: int | None = None,
        degrade: Mapping[str, Any] | None = None,
        prompts: Prompts | None = None,
        codec: Codec | None = None,
    ) -> None:
        super().__init__()
        self.net = net.eval()
        self.process = process
        self.head = HEADS[head]
        self.adapter = adapter or adapter_for(net)
        self.classes = tuple(classes)
        self.null_label = null_label
        self.degrade = degrade
        self.codec = codec
        self.read(prompts)

    def read(self, prompts: Prompts | None) -> None:
        """Have labels be numbers of these prompts, of a network that reads text; or be labels."""
        self.prompts = prompts
        if prompts is not None:
            self.classes, self.null_label = prompts.captions, prompts.null

    def train(self, mode: bool = True) -> Denoiser:
        """Stay in eval mode; see the class."""
        return super().train(False)

    def route(self, call: Callable[..., Any] | None) -> None:
        """Send network calls through ``call`` (a data-parallel or compiled wrapper), or back.

        The wrapper, a module itself, stays out of this module's tree.
        """
        object.__setattr__(self, "_call", call)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        *,
        taps: Sequence[str] = (),
        tail: Literal["whole", "frozen"] = "whole",
    ) -> Prediction:
        """Estimate the clean and noise parts of ``x_t`` [B, C, *S] at times ``t`` [B].

        With ``taps``, names of modules whose outputs are kept, the network is called itself and
        not by its wrapper: compiled networks pass hooks over. With ``tail="frozen"`` what lies
        behind the last tap runs without a graph: gradients flow through the features alone.
        """
        x_t = x_t.float()
        c = self.process.coefs(t).expand(x_t)
        with self.tapped(taps, tail) as features:
            h = self.raw(x_t, t, cond)
        return self.prediction(h, x_t, c, features)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, taps: Sequence[str]) -> list[Tensor]:
        """Outputs of the modules ``taps``; the network is left after the last of them.

        Raises:
            ValueError: a module that there is not, or that a pass does not call.
        """
        with self.tapped(taps, "none") as features:
            self.raw(x_t.float(), t, cond)
        idle = [name for name in taps if name not in features]
        if idle:
            raise ValueError(f"{idle[0]} is not called by itself; name what is in it")
        return [features[name] for name in taps]

    @contextmanager
    def tapped(self, taps: Sequence[str], tail: Tail) -> Iterator[dict[str, Tensor]]:
        """Calls in this context keep what the modules ``taps`` put out; see :func:`record`."""
        call = self._call
        self.route(None if taps else call)
        try:
            with record(self.net, taps, tail, self.adapter.feature) as features:
                yield features
        finally:
            self.route(call)

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's own output h [B, C, *S], in fp32."""
        cond = cond if self.prompts is None else self.prompts.fill(cond)
        if self.adapter.embeds_guidance(self.net) and cond.guidance is None:
            cond = replace(cond, guidance=torch.full_like(t, self.scale))
        scaled = self.fed(self.process.scale_input(x_t, t), cond)
        time = self.process.network_time(t)
        with self.told(t, cond), dropped(self.net, self.dropout):
            h = self.adapter(self.called(), scaled, time, cond)
        return h[:, : x_t.shape[1]].float()

    def fed(self, scaled: Tensor, cond: Cond) -> Tensor:
        """A scaled state [B, C, *S] with the image that the network is fed beside it, if it is.

        Raises:
            ValueError: there is none to feed it, or one that it does not take.
        """
        if self.beside == (0 if cond.image is None else cond.image.shape[1]):
            return scaled if cond.image is None else torch.cat([scaled, cond.image], dim=1)
        given = "none" if cond.image is None else f"one of {cond.image.shape[1]}"
        raise ValueError(f"the network is fed an image of {self.beside} channels, not {given}")

    @property
    def beside(self) -> int:
        """Channels of the image that the network is fed beside the state; 0 for none."""
        return self.adapter.beside(self.net)

    @property
    def ends(self) -> bool:
        """Whether the network is told where a step ends, by ``cond.end``."""
        return "end" in self.adapter.numbers(self.net)

    def told(self, t: Tensor, cond: Cond) -> AbstractContextManager[None]:
        """Calls in this context are told the further numbers that the network takes."""
        taken = self.adapter.numbers(self.net)
        if not taken:
            return nullcontext()
        numbers = {}
        if "end" in taken:
            numbers["end"] = self.length(t, cond.end)
        if "twin" in taken and cond.twin is not None:
            numbers["twin"] = cond.twin
        if "guidance" in taken:
            own = torch.full_like(t, self.scale)
            numbers["guidance"] = 1 - 1 / (own if cond.guidance is None else cond.guidance)
        if "steps" in taken:
            numbers["steps"] = torch.zeros_like(t) if cond.steps is None else 1 - 1 / cond.steps
        return self.adapter.telling(self.net, numbers)

    def length(self, t: Tensor, end: Tensor | None) -> Tensor:
        """The number [B] that says where steps end: their length in rectified flow's time."""
        if end is None:
            return torch.zeros_like(t)
        return self.process.flow_time(t) - self.process.flow_time(end)

    def prediction(
        self, h: Tensor, x_t: Tensor, c: Coefs, features: dict[str, Tensor] | None = None
    ) -> Prediction:
        """Read a raw output as a :class:`Prediction`."""
        return Prediction(h, x_t, c, self.head, self.process.sigma_data, features)

    def at(self, level: float) -> Denoiser:
        """The denoiser that owns the time ``level``: itself (see :class:`Experts`)."""
        return self

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample without the batch, from the network's config: (C, H, W) or (D,)."""
        return self.adapter.sample_shape(self.net)

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.net.parameters()).device

    @classmethod
    def from_pipeline(
        cls, source: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> Denoiser:
        """Wrap the network of a saved diffusers pipeline; its scheduler tells process and head.

        Args:
            source: a pipeline folder, or a name on the hub.

        Raises:
            ValueError: a folder without a pipeline, or one that is not understood.
        """
        folder = pipeline_folder(source)
        index, key = read_index(folder / "model_index.json")
        if index.get("walks") or (folder / "walks.json").is_file():
            raise ValueError(
                f"{folder}: a student of few steps on a stock scheduler, which is no teacher; "
                "export it without --stock if its method makes flows"
            )
        process, head = read_scheduler(folder / "scheduler", index["scheduler"][1])
        net = read_network(folder, key, index[key][1], dtype)
        adapter = adapter_for(net)
        rows = adapter.label_rows(net)
        null = index.get("null_label", adapter.null_label(net)) if rows else None
        return cls(
            net.to(device),
            process,
            head,
            adapter=adapter,
            classes=read_classes(index, rows, null),
            null_label=null,
            degrade=index.get("degrade"),
            codec=read_codec(folder, index),
        )


class Experts(nn.Module):
    """Several denoisers of one process, each of which owns a range of times.

    Args:
        experts: from the noisiest range to the cleanest.
        boundaries: the lower end of each expert's range but the last, decreasing; an expert owns
            the times above its boundary.
    """

    def __init__(self, experts: Sequence[Denoiser], boundaries: Sequence[float]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.boundaries = tuple(boundaries)
        self.process = experts[0].process

    def index_at(self, level: float) -> int:
        """The place of the expert that owns the time ``level``."""
        return sum(level <= boundary + 1e-9 for boundary in self.boundaries)

    def at(self, level: float) -> Denoiser:
        """The expert that owns the time ``level``."""
        expert = self.experts[self.index_at(level)]
        assert isinstance(expert, Denoiser)
        return expert


class Routed(Denoiser):
    """Several denoisers of one process and head, each of which owns some classes.

    Args:
        experts: the denoisers.
        routes: the place of each class's owner, by label.
    """

    def __init__(self, experts: Sequence[Denoiser], routes: Sequence[int]) -> None:
        first = experts[0]
        super().__init__(
            first.net,
            first.process,
            first.head.name,
            adapter=first.adapter,
            classes=first.classes,
            null_label=first.null_label,
        )
        self.experts, self.routes = nn.ModuleList(experts), tuple(routes)

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Denoiser.raw`: every sample's by its class's owner.

        Raises:
            ValueError: samples without a class, which nobody owns.
        """
        label = cond.label
        if label is None or int(label.max()) >= len(self.routes):
            raise ValueError("students by class know no sample without one; set guidance to 1")
        places = torch.tensor(self.routes, device=label.device)[label]
        h = torch.empty_like(x_t, dtype=torch.float32)
        for place, expert in enumerate(self.experts):
            assert isinstance(expert, Denoiser)
            (rows,) = (places == place).nonzero(as_tuple=True)
            if len(rows):
                h[rows] = expert.raw(x_t[rows], t[rows], cond.rows(rows))
        return h
