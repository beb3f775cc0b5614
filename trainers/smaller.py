"""A student of another network than the teacher's: smaller, and without its weights."""

from __future__ import annotations

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run.errors import UserError
from stepdistill.trainers.flow.denoising import NetworkConfig, building, known_classes


def smaller(network: NetworkConfig, seed: int, teacher: Denoiser) -> Denoiser:
    """A fresh network, by torch's generator at ``seed``, that says what the teacher's says.

    Raises:
        UserError: it cannot be made, or does not make the teacher's samples of its classes.
    """
    with building(network, seed) as made:
        net = made().to(teacher.device)
        names = known_classes(net, teacher.classes)
        head = teacher.head.name
        null = len(names) if names else None
        den = Denoiser(net, teacher.process, head, classes=names, null_label=null)
    if den.sample_shape != teacher.sample_shape or names != teacher.classes:
        raise UserError(
            f"network.config: it makes samples {den.sample_shape} of {len(names)} classes, the "
            f"teacher {teacher.sample_shape} of {len(teacher.classes)}"
        )
    return den
