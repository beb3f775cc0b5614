"""What a player begins as: a copy of a network, the network itself, or an adapter on it."""

from __future__ import annotations

import re
from typing import Literal

from stepdistill.adapters import lora
from stepdistill.adapters.recompute import recompute
from stepdistill.data.degrade import DegradeConfig
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.run.assets import student_weights
from stepdistill.run.errors import UserError
from stepdistill.run.rng import seeded
from stepdistill.trainers.settings import TrainConfig


def role_of(name: str) -> str:
    """What a player is: "student" is the role of student_2 too."""
    return re.sub(r"_\d+$", "", name)


def told(
    config: TrainConfig,
    source: Denoiser,
    *numbers: str,
    role: Literal["student", "critic"] = "student",
    instead: str = "",
) -> Denoiser:
    """A copy of a network that is also told numbers, by name; for now it does not heed them.

    Args:
        config: of the run, whose ``lora`` must be off for the role.
        source: the network.
        numbers: what it is told.
        role: that the copy is for.
        instead: the key, with its value, by which it would not be.

    Raises:
        UserError: adapters, or it is not known how its network embeds its time.
    """
    if config.lora is not None and role in config.lora.players:
        names = {"end": "end of a step", "steps": "number of steps"}
        what = names.get(numbers[0], numbers[0])
        mend = f"{instead} or lora=null" if instead else "lora=null"
        raise UserError(
            f"lora: adapters share the teacher's network, which is told no {what}; set {mend}"
        )
    try:
        return source.extended(*numbers)
    except ValueError as error:
        other = f", or set {instead}" if instead else ""
        raise UserError(f"teacher: {error}; add `embedders` to its adapter{other}") from error


def begin(config: TrainConfig, name: str, source: Denoiser, *, copy: bool) -> Denoiser:
    """The denoiser of a new player: ``source`` to the bit, or the student that the config names.

    Args:
        config: its ``lora`` tells which players are adapters, its ``student`` as what these begin.
        name: of the player; "student_2" counts as a student.
        source: a network, which is shared where the player is an adapter.
        copy: whether a player that is no adapter has a network of its own.

    Raises:
        UserError: adapters for a network that is trained itself, or targets that it has not; a
            beginning that does not fit.
    """
    role = role_of(name)
    if role == "student" and config.student is not None:
        return _begun(config, source.clone() if copy else source)
    like = {"target": "critic", "previous": "student"}.get(role, role)  # what it once was
    if config.lora is None or like not in config.lora.players:
        return source.clone() if copy else source
    if not copy:
        raise UserError(f"lora: {config.method} trains the network itself; set lora=null")
    if name in lora.names(source.net):
        raise UserError(f"lora: the teacher carries the {name} of another run; load it anew")
    rank, alpha = config.lora.rank, config.lora.alpha
    try:
        return source.adapt(
            name,
            rank=rank,
            alpha=rank if alpha is None else alpha,
            targets=config.lora.targets,
            seed=config.seed,
        )
    except ValueError as error:
        raise UserError(f"lora.targets: {error}") from error


def _begun(config: TrainConfig, net: Denoiser) -> Denoiser:
    if config.lora is not None and "student" in config.lora.players:
        raise UserError(
            "student: adapters begin as the teacher; set lora=null, lora.players=[critic] or "
            "student=null"
        )
    assert config.student is not None
    net.load(student_weights(config.student, net))
    return net


def recomputed(den: Denoiser) -> None:
    """Turn gradient checkpointing on.

    Raises:
        UserError: the network does not support it.
    """
    try:
        recompute(den.net)
    except ValueError as error:
        raise UserError(
            f"gradient_checkpointing: {error}; set gradient_checkpointing=false"
        ) from error


def needs_image(teacher: Denoiser, config: TrainConfig, needs: str) -> bool:
    """Whether a teacher is fed an image beside the state, which is made of the data's.

    Raises:
        UserError: the config does not say how, or says it for nothing; or the method knows no data.
    """
    degrade = config.data.degrade
    if not teacher.beside:
        if degrade is not None:
            raise UserError(
                "data.degrade: the teacher is fed no image beside the state; leave it out"
            )
        return False
    if degrade is None:
        raise UserError(
            f"data.degrade: the teacher is fed an image of {teacher.beside} channels beside the "
            "state; say how pictures are made small for it, such as data.degrade.factor=4"
        )
    if needs == "pairs":
        raise UserError(
            f"teacher: is fed an image beside the state, and {config.method} learns of pairs of "
            "noise and image alone; take a method that learns of data or labels"
        )
    if teacher.beside != teacher.sample_shape[0]:
        raise UserError(
            f"teacher: is fed {teacher.beside} channels beside a state of "
            f"{teacher.sample_shape[0]}; pictures that are made small have as many"
        )
    degrade.check(teacher.sample_shape)
    taught = config.taught_degrade
    if teacher.degrade is not None and taught != DegradeConfig(**teacher.degrade):
        own = DegradeConfig(**teacher.degrade).model_dump(exclude_defaults=True)
        known = ", ".join(f"{key}: {value}" for key, value in own.items()) or "factor: 2"
        raise UserError(
            f"data.degrade: the teacher has learnt of pictures made small by {{{known}}}, and is "
            f"shown others here; set data.degrade so{config.degrade_mend}"
        )
    return True


def renewed(den: Denoiser, config: TrainConfig) -> Denoiser:
    """A copy whose weights are those that its class begins with, by the config's seed.

    Raises:
        UserError: the network is not one of diffusers', which can be made from their config; or it
            is to begin as another.
    """
    if config.student is not None:
        raise UserError("scratch: fresh weights are no saved student's; set student=null")
    made, cls = den.clone(), type(den.net)
    maker = getattr(cls, "from_config", None)
    if maker is None or not hasattr(den.net, "config"):
        raise UserError(
            f"scratch: a {cls.__name__} cannot be made anew from a config of its own; set "
            "scratch=false, or take a teacher that is a network of diffusers"
        )
    with seeded(config.seed):
        made.net.load_state_dict(maker(den.net.config).state_dict())
    return made
