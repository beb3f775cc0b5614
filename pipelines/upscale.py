"""Small pictures made large, by a network that is fed them, brought to size, beside the state.

What stands below the line of dashes needs :mod:`stepdistill.pipelines.image` alone: both travel in
one file, ``pipeline.py``, so that a folder loads where stepdistill is not installed.

Letters: x clean in [-1, 1], x_t the state. Shapes: B batch, C channels, h w small and H W large.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.pipelines.image import ImagePipeline

# ---


class UpscalePipeline(ImagePipeline):
    """Large pictures of small ones; everything else is as in ``ImagePipeline``.

    Args:
        model: as there, with twice the channels to take: the state's, then the picture's.
        scheduler: as there.
        degrade: how the pictures were made small that it has learnt of; ``factor`` says how many
            times, each way.
        rest: as there.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        scheduler: Any,
        model_2: torch.nn.Module | None = None,
        model_3: torch.nn.Module | None = None,
        model_4: torch.nn.Module | None = None,
        classes: Any = None,
        default_steps: int = 1,
        null_label: int | None = None,
        default_guidance: float = 1.0,
        routes: Any = None,
        extra: Any = None,
        walks: Any = None,
        start: float | None = None,
        guidance_range: Any = None,
        degrade: Any = None,
    ) -> None:
        if routes is not None:
            raise ValueError("routes: networks that share classes make no small pictures large")
        super().__init__(
            model,
            scheduler,
            model_2,
            model_3,
            model_4,
            classes,
            default_steps,
            null_label,
            default_guidance,
            None,
            extra,
            walks,
            start,
            guidance_range,
        )
        self.register_to_config(degrade=dict(degrade or {"factor": 2}))

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: Any,
        class_labels: Any = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Any = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Make pictures large.

        Args:
            image: small pictures: one of PIL, a list of them, or a tensor [B, C, h, w] in [0, 1].
            class_labels: as in ``ImagePipeline``; left out, their class is none.
            num_inference_steps: as there, as all that follow.
            guidance_scale: as there.
            generator: as there.
            latents: as there.
            output_type: as there.
            return_dict: as there.

        Raises:
            ValueError: pictures of another size, or arguments that do not fit.
        """
        low = self._small(image)
        size = self.model.config.sample_size
        target = (size, size) if isinstance(size, int) else tuple(size)
        wanted = [side // self.config.degrade["factor"] for side in target]
        if list(low.shape[2:]) != wanted:
            raise ValueError(f"image is {list(low.shape[2:])}, and this model takes {wanted}")
        low = low.to(self._execution_device, torch.float32) * 2 - 1
        self._beside = torch.nn.functional.interpolate(
            low, size=target, mode="bicubic", align_corners=False
        )
        if class_labels is None and self.config.null_label is not None:
            class_labels = [self.config.null_label] * len(low)
        try:
            return super().__call__(
                class_labels,
                len(low),
                num_inference_steps,
                guidance_scale,
                generator,
                latents,
                output_type,
                return_dict,
            )
        finally:
            del self._beside

    def _small(self, image: Any) -> Tensor:
        """Small pictures [B, C, h, w] in [0, 1]."""
        if isinstance(image, Tensor):
            found = image if image.dim() == 4 else image[None]
        else:
            many = image if isinstance(image, (list, tuple)) else [image]
            if len({one.size for one in many}) > 1:
                raise ValueError("image: pictures of one call have one size")
            mode = "L" if self.model.config.out_channels == 1 else "RGB"
            rows = [torch.tensor(list(one.convert(mode).tobytes())) for one in many]
            found = torch.stack(rows).reshape(len(many), *many[0].size[::-1], len(mode))
            found = found.permute(0, 3, 1, 2) / 255
        channels = min(self.model.config.in_channels, self.model.config.out_channels)
        if found.shape[1] != channels:
            raise ValueError(f"image has {found.shape[1]} channels, this model takes {channels}")
        return found

    def _fed(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The state, and the picture beside it."""
        return torch.cat([super()._fed(x_t, t), self._beside], dim=1)


# ---
_OWN = Path(__file__).read_text(encoding="utf-8").split("\n# ---\n")[1].strip()
UpscalePipeline.text = f"{ImagePipeline.text}\n\n{_OWN}\n"
