"""CLIP score by open_clip: how well images fit their captions (Hessel 2021).

The score of an image is 100 max(cos(image, caption), 0), as torchmetrics scales it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from stepdistill.eval.images import to_pil, to_uint8
from stepdistill.run.errors import UserError


class ClipScorer:
    """An open_clip model with its own preprocessing and tokenizer.

    Attributes:
        name: model and weights, for the record.

    Args:
        model: a name that open_clip knows, or ``local-dir:FOLDER``.
        pretrained: a tag that open_clip knows for the model, or a .safetensors file; a local
            folder brings its own.
        device: where the model runs.

    Raises:
        UserError: open_clip is missing, an unknown name or tag, or weights that cannot be had.
    """

    def __init__(
        self,
        model: str = "ViT-B-32",
        pretrained: str | None = "laion2b_s34b_b79k",
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        if find_spec("open_clip") is None or find_spec("torchvision") is None:
            raise UserError("clip needs open_clip_torch: pip install 'stepdistill[eval]'")
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        local = model.startswith("local-dir:")
        self.name = model if local else f"{model}/{pretrained}"
        self.device = torch.device(device)
        if local:
            _check_folder(Path(model.removeprefix("local-dir:")))
        else:
            _check_weights(model, pretrained)
        try:
            self._net = open_clip.create_model(
                model,
                None if local else pretrained,
                device=self.device,
                require_pretrained=True,
                weights_only=True,
            ).eval()
        except (RuntimeError, OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"clip: cannot load {self.name}: {_first_line(error)}") from error
        self._tokenize = open_clip.get_tokenizer(model)
        config = PreprocessCfg(**self._net.visual.preprocess_cfg)
        self._prepare = image_transform_v2(config, is_train=False)

    @torch.no_grad()
    def scores(self, images: Tensor, captions: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Scores [N] in [0, 100] of images [N, C, H, W] in [-1, 1] with one caption each.

        Raises:
            UserError: not one caption an image.
        """
        if len(images) != len(captions):
            raise UserError(f"clip: {len(images)} images but {len(captions)} captions")
        distinct = sorted(set(captions))
        texts = torch.cat(
            [
                functional.normalize(self._net.encode_text(tokens.to(self.device)).float(), dim=-1)
                for tokens in self._tokenize(distinct).split(batch_size)
            ]
        )
        row = {caption: place for place, caption in enumerate(distinct)}
        wanted = texts[[row[caption] for caption in captions]]
        parts = []
        for part, text in zip(images.split(batch_size), wanted.split(batch_size), strict=True):
            pictures: list[Image.Image] = [to_pil(pixels) for pixels in to_uint8(part)]
            fed = torch.stack([self._prepare(picture) for picture in pictures]).to(self.device)
            seen = functional.normalize(self._net.encode_image(fed).float(), dim=-1)
            parts.append((100 * (seen * text).sum(-1)).clamp_min(0).cpu())
        return torch.cat(parts)


def class_captions(
    classes: Sequence[str], num: int, template: str = "a photo of a {}"
) -> list[str]:
    """Captions of samples whose class is their index modulo the number of classes.

    Raises:
        UserError: there are no classes to speak of.
    """
    if not classes:
        raise UserError("clip needs captions: the reference has no class names, so give prompts")
    return [template.format(classes[index % len(classes)]) for index in range(num)]


def _check_folder(folder: Path) -> None:
    """open_clip would fill missing weights with random numbers, and unpickle old files."""
    if not (folder / "open_clip_config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise UserError(f"clip: {folder} needs open_clip_config.json and a .safetensors file")


def _check_weights(model: str, pretrained: str | None) -> None:
    """See that the model is known and its weights lie on this disk, by a download if need be."""
    import open_clip
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    if open_clip.get_model_config(model) is None:
        raise UserError(f"clip: open_clip knows no model {model}; see open_clip.list_models()")
    config = get_pretrained_cfg(model, pretrained) if pretrained else None
    if config:
        try:
            download_pretrained(config)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"clip needs the weights {pretrained} of {model}, and the download failed "
                f"({_first_line(error)}); give a local .safetensors file instead"
            ) from error
    elif not pretrained or not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise UserError(
            f"clip: {pretrained} is neither a file nor a tag of {model} (its tags: {tags})"
        )
    elif Path(pretrained).suffix != ".safetensors":
        raise UserError(f"clip: {pretrained} must be a .safetensors file")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
