"""Whether images are what a network takes."""

from __future__ import annotations

from stepdistill.data.images import ImageSet
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run.errors import UserError


def check_fit(images: ImageSet, teacher: Denoiser) -> None:
    """Refuse images whose shape, or their latents', or classes are not the network's."""
    codec = teacher.codec
    found = images.shape if codec is None else codec.shape(images.shape)
    if found != teacher.sample_shape:
        coded = "" if codec is None else f" and their latents {found}"
        raise UserError(
            f"data.source={images.name}: images are {images.shape}{coded}, the network takes "
            f"{teacher.sample_shape}; set data.size and data.channels"
        )
    if teacher.classes and not images.classes:
        raise UserError(
            f"data.source={images.name} has no class labels, and the teacher takes one of "
            f"{len(teacher.classes)}; sort the images into class folders or give a metadata file"
        )
    if teacher.classes and len(images.classes) > len(teacher.classes):
        raise UserError(
            f"data.source={images.name} has {len(images.classes)} classes, the teacher "
            f"{len(teacher.classes)}"
        )
