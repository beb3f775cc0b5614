"""Images from one network, or from a few that share the noise levels or the classes between them.

This file needs torch and diffusers only: a copy of it travels as ``pipeline.py`` in every exported
folder, so that ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` works where
stepdistill is not installed.

Letters: x clean in [-1, 1], x_t the state. Shapes: B batch, C channels, H W.
"""

from __future__ import annotations

import difflib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

FILE_NAME = "pipeline.py"
MODEL_NAMES = ("model", "model_2", "model_3", "model_4")
OUTPUT_TYPES = ("pil", "np", "pt")

_SOURCE = Path(__file__).read_text(encoding="utf-8")

Labels = int | str | Sequence[int | str] | Tensor


class ImagePipeline(DiffusionPipeline):
    """Unconditional or class-conditional images from noise.

    The scheduler decides the walk: a ``LiteralGridScheduler`` (few-step students, with its own
    choice of network for each step), a ``FlowMatchEulerDiscreteScheduler`` (flow models; an even
    grid from 1 to 0, shifted once by the scheduler), or any scheduler with
    ``set_timesteps(steps)`` such as DDIM (set ``timestep_spacing="trailing"`` for few steps).

    Args:
        model: the network, ``UNet2DModel`` or ``DiTTransformer2DModel``, or another that is called
            as ``model(x, time, class_labels=..., return_dict=False)``.
        scheduler: see above.
        model_2: network 1 of the scheduler's grid, if there is one.
        model_3: network 2.
        model_4: network 3.
        classes: names of the classes, by label; a mapping name -> label is taken too.
        default_steps: number of steps when none is asked for.
        null_label: the label that means "no class", needed for guidance.
        default_guidance: guidance scale when none is asked for; 1 is none.
        routes: the network of each class where they are shared by classes: label, as text -> 0
            for ``model``, 1 for ``model_2``, ...; the grid's own choice is left aside.
        extra: adds embeddings of the further numbers that the scheduler's grid tells ``model``,
            such as where a step ends.
        walks: for a few-step student on a stock scheduler, by number of steps, as text: the
            sigmas or timesteps that the scheduler is set to; no other number is taken.
        start: standard deviation of the state that the walk starts from; the scheduler's if None.
        guidance_range: scales that a network which is told them has learnt; others are warned of.

    Raises:
        ValueError: class names that are not unique.
    """

    model_cpu_offload_seq = "->".join(MODEL_NAMES)
    _optional_components = [*MODEL_NAMES[1:], "extra"]
    text = _SOURCE  # of the file that travels
    config: Any
    model: Any
    scheduler: Any
    extra: Any

    def __init__(
        self,
        model: torch.nn.Module,
        scheduler: Any,
        model_2: torch.nn.Module | None = None,
        model_3: torch.nn.Module | None = None,
        model_4: torch.nn.Module | None = None,
        classes: Sequence[str] | Mapping[str, int] | None = None,
        default_steps: int = 1,
        null_label: int | None = None,
        default_guidance: float = 1.0,
        routes: Mapping[str, int] | None = None,
        extra: Any = None,
        walks: Mapping[str, Sequence[float]] | None = None,
        start: float | None = None,
        guidance_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            model=model, scheduler=scheduler, model_2=model_2, model_3=model_3, model_4=model_4
        )
        self.register_modules(extra=extra)
        names = classes
        if isinstance(classes, Mapping):
            names = [name for _, name in sorted((label, name) for name, label in classes.items())]
        if names is not None and len(set(names)) < len(names):
            raise ValueError("classes: every class needs a name of its own")
        self.register_to_config(
            classes=None if names is None else [str(name) for name in names],
            default_steps=default_steps,
            null_label=null_label,
            default_guidance=default_guidance,
            routes=None if routes is None else dict(routes),
            walks=None if walks is None else {n: list(walk) for n, walk in walks.items()},
            start=start,
            guidance_range=None if guidance_range is None else list(guidance_range),
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        num_images: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            class_labels: labels or class names, one for each image; a single one is used for all
                ``num_images``. Without labels a class-conditional model draws its classes in turn,
                0, 1, ..., K-1, 0, ...; nothing is drawn at random.
            num_images: number of images, when ``class_labels`` is no sequence.
            num_inference_steps: network calls for each image; None takes the default.
            guidance_scale: w in h = h(null) + w (h(label) - h(null)), which a network that is told
                guidance takes as a number, in a single pass; None takes the default.
            generator: one for the batch, or a list with one for each image, which makes every
                image independent of its batch; None draws from torch's global generator.
            latents: standard normal noise [B, C, H, W] to start from instead of drawing it.
            output_type: ``pil`` (a list), ``np`` ([B, H, W, C]) or ``pt`` ([B, C, H, W]); numbers
                are in [0, 1].
            return_dict: False returns a tuple whose only member is the images.

        Raises:
            ValueError: arguments that do not fit the model, its grid or each other.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; known: {', '.join(OUTPUT_TYPES)}")
        device = self._execution_device
        labels = self._labels(class_labels, num_images)
        count = num_images if labels is None else len(labels)
        scale = self.config.default_guidance if guidance_scale is None else guidance_scale
        target = None if labels is None else torch.tensor(labels, device=device)
        known = self.config.get("guidance_range")
        if known and not known[0] <= scale <= known[1]:
            warnings.warn(f"guidance_scale is {scale:g}, learnt were {known}", stacklevel=3)
        null = None if self._tells(scale) else self._null(target, scale)
        self._set_steps(num_inference_steps, device)
        x_t = self._start(count, generator, latents, device)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        noise = {"generator": generator} if takes_generator else {}
        with self._eval_mode(), self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            for t in self.scheduler.timesteps:
                h = self._routed(x_t, t, target, null, scale)
                x_t = self.scheduler.step(h, t, x_t, return_dict=False, **noise)[0]
                bar.update()
        images = self._finish(x_t, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the folder with this file in it, so that it can be loaded again."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).write_text(self.text, encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)

    def to_json_string(self) -> str:
        """The text of ``model_index.json``: custom classes are named by the files that travel.

        Class names are written as name -> label, because a list of two words or more would be
        taken for a component when the folder is downloaded from the Hub.
        """
        index = json.loads(super().to_json_string())
        for name in (*MODEL_NAMES, "scheduler", "extra"):
            library, class_name = index.pop(name)
            if library is not None:
                index[name] = [library.rpartition(".")[2], class_name]
        if index["classes"] is not None:
            index["classes"] = {name: label for label, name in enumerate(index["classes"])}
        index.pop("_name_or_path", None)
        index["_class_name"] = [Path(FILE_NAME).stem, type(self).__name__]
        return json.dumps(index, indent=2) + "\n"

    def _num_classes(self) -> int:
        """Number of classes; 0 when the model takes no labels."""
        config = self.model.config
        rows = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
        if rows is None and config.get("class_embed_type") is None:
            return 0
        if self.config.classes is not None:
            return len(self.config.classes)
        if rows is None:
            raise ValueError("the model does not tell how many classes it has; give the pipeline's")
        return int(rows) - int(self.config.null_label == rows - 1)

    def _labels(self, asked: Labels | None, num_images: int) -> list[int] | None:
        """One label for each image, or None for a model without labels."""
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}; at least 1 image can be drawn")
        classes = self._num_classes()
        if classes == 0:
            if asked is not None:
                raise ValueError("class_labels were given, but the model is unconditional")
            return None
        if asked is None:
            return [i % classes for i in range(num_images)]
        if isinstance(asked, Tensor):
            asked = asked.tolist()
        if isinstance(asked, (int, str)):
            return [self._label(asked, classes)] * num_images
        labels = [self._label(item, classes) for item in asked]
        if not labels or num_images not in (1, len(labels)):
            raise ValueError(f"num_images is {num_images}, but {len(labels)} labels were given")
        return labels

    def _label(self, item: int | str, classes: int) -> int:
        """The label that a number or a class name means."""
        if isinstance(item, str):
            names: list[str] = self.config.classes or []
            if item in names:
                return names.index(item)
            near = difflib.get_close_matches(item, names, n=1, cutoff=0.0)
            hint = f"did you mean {near[0]!r}?" if near else "the pipeline has no class names"
            raise ValueError(f"unknown class {item!r}: {hint}")
        if isinstance(item, (float, list)):
            raise ValueError(f"class_labels must be whole numbers or names in one row, not {item}")
        label = int(item)
        known = 0 <= label < classes or (label == self.config.null_label and not self._by_class())
        if not known:
            raise ValueError(f"class label {label} is out of range: labels are 0 to {classes - 1}")
        return label

    def _tells(self, scale: float) -> bool:
        """Whether the network is told the guidance."""
        if self.extra is None or "guidance" not in self.extra.config.numbers:
            return False
        if scale < 1:
            raise ValueError(f"guidance_scale is {scale:g}; this network is told scales from 1 on")
        return True

    def _null(self, target: Tensor | None, scale: float) -> Tensor | None:
        """Labels [B] of the unguided half of the batch, or None without guidance."""
        if scale == 1.0:
            return None
        if target is None or self.config.null_label is None:
            raise ValueError(
                f"guidance_scale is {scale:g}, but the model was not trained without labels, so "
                "there is nothing to guide away from; use 1"
            )
        return torch.full_like(target, self.config.null_label)

    def _set_steps(self, steps: int | None, device: torch.device) -> None:
        """Lay out the scheduler's walk."""
        steps = self.config.default_steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}; at least 1 step is needed")
        walks = self.config.get("walks")
        if walks and str(steps) not in walks:
            raise ValueError(f"num_inference_steps is {steps}; this student has {', '.join(walks)}")
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            sigmas = walks[str(steps)] if walks else [1.0 - i / steps for i in range(steps)]
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        elif walks and "timesteps" in inspect.signature(self.scheduler.set_timesteps).parameters:
            self.scheduler.set_timesteps(timesteps=walks[str(steps)], device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)

    def _start(
        self,
        count: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        """The state [B, C, H, W] that the walk starts from, in fp32."""
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators were given for {count} images")
        config = self.model.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (count, min(config.in_channels, config.out_channels or 1), height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents are {tuple(latents.shape)}, these images need {shape}")
        x_t = latents.to(device=device, dtype=torch.float32)
        start = self.config.get("start")
        return x_t * (getattr(self.scheduler, "init_noise_sigma", 1.0) if start is None else start)

    def _by_class(self) -> bool:
        """Whether the networks share the classes between them."""
        return self.config.get("routes") is not None

    def _routed(
        self, x_t: Tensor, t: Tensor, target: Tensor | None, null: Tensor | None, scale: float
    ) -> Tensor:
        """The raw output [B, C, H, W], of each sample by its class's network if they are shared."""
        if not self._by_class():
            name = MODEL_NAMES[getattr(self.scheduler, "expert", 0)]
            return self._predict(name, x_t, t, target, null, scale)
        assert target is not None
        places = [self.config.routes[str(label)] for label in target.tolist()]
        h = torch.empty_like(x_t)
        for place in sorted(set(places)):
            rows = torch.tensor([i for i, k in enumerate(places) if k == place], device=x_t.device)
            away = None if null is None else null[rows]
            h[rows] = self._predict(MODEL_NAMES[place], x_t[rows], t, target[rows], away, scale)
        return h

    def _predict(
        self,
        name: str,
        x_t: Tensor,
        t: Tensor,
        target: Tensor | None,
        null: Tensor | None,
        scale: float,
    ) -> Tensor:
        """A network's raw output [B, C, H, W] in fp32; guided in one call of 2B."""
        model = getattr(self, name)
        if model is None:
            raise ValueError(f"this step of the grid needs {name}, which the pipeline lacks")
        fed = self._fed(x_t, t)
        if null is not None:
            assert target is not None
            fed, target = torch.cat([fed, fed]), torch.cat([null, target])
        condition = {} if target is None else {"class_labels": target}
        times = t.expand(len(fed))
        with self._told(model, len(fed), scale):
            h: Tensor = model(fed.to(model.dtype), times, return_dict=False, **condition)[0]
        channels = x_t.shape[1]
        if h.shape[1] not in (channels, 2 * channels):
            raise ValueError(f"the network maps {channels} channels to {h.shape[1]}")
        h = h[:, :channels].float()
        if null is None:
            return h
        plain, labelled = h.chunk(2)
        return plain + scale * (labelled - plain)

    def _fed(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What a network is fed of the state [B, C, H, W]."""
        scaled = hasattr(self.scheduler, "scale_model_input")
        return self.scheduler.scale_model_input(x_t, t) if scaled else x_t

    @contextmanager
    def _told(self, model: Any, count: int, scale: float) -> Iterator[None]:
        """Calls of the network in this context are told the coming step's further numbers."""
        if self.extra is None:
            yield
            return
        numbers = dict(getattr(self.scheduler, "told", {}))
        if self._tells(scale):
            numbers["guidance"] = 1 - 1 / scale
        told = {
            name: torch.full((count,), value, device=model.device)
            for name, value in numbers.items()
        }
        handles = self.extra.attach(model)
        try:
            with self.extra.telling(told):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _finish(self, x: Tensor, output_type: str) -> Any:
        """Images in [0, 1] of the wanted type from clean samples in [-1, 1]."""
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        """Eval mode for a while: some networks drop labels by themselves in train mode."""
        models = [model for name in MODEL_NAMES if (model := getattr(self, name)) is not None]
        training = [model.training for model in models]
        try:
            for model in models:
                model.eval()
            yield
        finally:
            for model, was in zip(models, training, strict=True):
                model.train(was)
