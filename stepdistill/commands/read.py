"""Read a training config: its file, its method's trainer, its validated settings."""

from __future__ import annotations

from collections.abc import Sequence

from stepdistill.run import config as configs
from stepdistill.run.errors import UserError
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.find import trainer as find_trainer
from stepdistill.trainers.settings import TrainConfig


def read_config(name: str, overrides: Sequence[str] = ()) -> tuple[type[Trainer], TrainConfig]:
    """A training config and the trainer that its ``method`` names.

    Raises:
        UserError: anything that is wrong with it, in one line.
    """
    raw = configs.read(name, overrides)
    method = raw.values.get("method")
    if not isinstance(method, str):
        raise UserError(f"{raw.place('')}: the key method is missing; see `stepdistill methods`")
    cls = find_trainer(method)
    return cls, configs.validate(raw, cls.Config)
