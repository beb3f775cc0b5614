"""The one way to open a set of images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from stepdistill.data.degrade import DegradeConfig
from stepdistill.data.digits import open_digits
from stepdistill.data.folder import FolderSet
from stepdistill.data.idx import open_fashion_mnist
from stepdistill.data.sets import ImageSet
from stepdistill.run.errors import UserError

__all__ = ["DataConfig", "ImageSet", "open_data"]


class DataConfig(BaseModel):
    """Which images to use and how to bring them to one shape."""

    model_config = ConfigDict(extra="forbid")

    source: str = Field(
        "digits", description="digits, fashion-mnist, fashion-mnist-test, or a folder of images"
    )
    path: Path | None = Field(None, description="folder of Fashion-MNIST's idx files")
    size: int | None = Field(None, ge=1, description="side in pixels; empty keeps the source's own")
    channels: Literal[1, 3] | None = Field(None, description="1 grey, 3 RGB; empty: the source's")
    on_error: Literal["skip", "stop"] = Field("skip", description="what a broken image leads to")
    degrade: DegradeConfig | None = Field(
        None,
        description="what networks that are fed an image beside the state are shown: pictures "
        "made small, and brought back to size; null: nothing",
    )
    workers: int = Field(2, ge=0, le=64, description="batches read ahead, each in its own thread")


def open_data(config: DataConfig) -> ImageSet:
    """Open the set that ``config.source`` names.

    Raises:
        UserError: unknown source, missing files, or nothing readable in the folder.
    """
    fashion: dict[str, Literal["train", "test"]]
    fashion = {"fashion-mnist": "train", "fashion-mnist-test": "test"}
    if config.path is not None and config.source not in fashion:
        raise UserError(
            f"data.path belongs to data.source=fashion-mnist, not to {config.source}; "
            "for a folder of images set data.source to the folder"
        )
    if config.source == "digits":
        return open_digits(config.size, config.channels)
    if (split := fashion.get(config.source)) is not None:
        return open_fashion_mnist(config.path, config.size, config.channels, split=split)
    folder = Path(config.source).expanduser()
    if not folder.is_dir():
        alone = "holds prompts alone, and a folder of images is needed here"
        known = "is neither digits, fashion-mnist nor an existing folder"
        prompts = config.source.endswith(".txt")
        raise UserError(f"data.source={config.source} {alone if prompts else known}")
    return FolderSet(
        folder,
        size=config.size,
        channels=config.channels,
        on_error=config.on_error,
        workers=config.workers,
    )
