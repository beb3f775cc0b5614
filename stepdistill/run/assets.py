"""What ships inside the package, and how a teacher is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.adapters import scalars
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.saved import pipeline_folder, read_index, read_meaning, read_network
from stepdistill.run.errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TEACHERS = ("digits-dit", "digits-unet")
SHIPPED = (*TEACHERS, "digits-sr")  # with those that make small pictures large


def teacher_path(name: str) -> str:
    """Where a pipeline lies: a shipped teacher's folder, a folder that is there, or a hub name.

    Raises:
        UserError: none of these.
    """
    if name in SHIPPED:
        return str(ASSETS / name)
    source = Path(name).expanduser()
    if source.is_dir():
        return str(source)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"{name}: no such folder; give a pipeline's folder, a hub name (owner/name), or one "
            f"of the shipped teachers {', '.join(SHIPPED)}"
        )
    return name


def load_teacher(
    name: str, device: torch.device | str = "cpu", *, key: str = "teacher"
) -> Denoiser:
    """The frozen teacher that a config names by ``key``.

    Raises:
        UserError: it cannot be found or understood.
    """
    with _named(key, name):
        return Denoiser.from_pipeline(teacher_path(name), device=str(device))


def student_weights(name: str, den: Denoiser) -> dict[str, Tensor]:
    """Weights of the saved pipeline as which a student begins, by name.

    Args:
        name: a pipeline's folder, a hub name or a shipped teacher.
        den: the student, whose network, process and output the pipeline's must be.

    Raises:
        UserError: it cannot be found or understood, or is of another kind than the student.
    """
    with _named("student", name):
        return _weights_for(pipeline_folder(teacher_path(name)), den)


@contextmanager
def _named(key: str, name: str) -> Iterator[None]:
    """What goes wrong with a pipeline, in one line that begins with the key that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}={error}") from error
    except (ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{key}={name}: {first} (shipped teachers: {', '.join(SHIPPED)})"
        ) from error


def _weights_for(folder: Path, den: Denoiser) -> dict[str, Tensor]:
    if (folder / "config.yaml").is_file() and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"the folder of a run; name its student's: `stepdistill export {folder} --out FOLDER`"
        )
    index, key = read_index(folder / "model_index.json")
    if index.get("extra", [None])[0]:
        raise ValueError(
            "its network is told further numbers, which students do not begin with; name another"
        )
    kind, own = type(den.net).__name__, den.weights()
    if index[key][1] != kind:
        raise ValueError(f"its network is a {index[key][1]}, and the student's a {kind}")
    found = read_network(folder, key, kind, torch.float32).state_dict()
    mine = {k: v.shape for k, v in own.items() if not k.startswith(f"{scalars.NAME}.")}
    if mine != {k: v.shape for k, v in found.items()}:
        raise ValueError(f"its {kind} differs from the student's in size")
    if not read_meaning(folder / "scheduler", index["scheduler"][1], den.process, den.head):
        raise ValueError(
            f"its network was trained by another process or output than the teacher's, which are "
            f"{den.process.name} and {den.head.name}"
        )
    return own | found
