"""Small classifiers whose last hidden layers are feature spaces: ``digits``, ``fashion-mnist``.

``python -m stepdistill.eval.classifier NAME --out DIR`` trains those that ship, of digits in a few
seconds and of Fashion-MNIST in some minutes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from stepdistill.data.digits import open_digits
from stepdistill.data.idx import open_fashion_mnist
from stepdistill.run.assets import ASSETS
from stepdistill.run.errors import UserError
from stepdistill.run.files import whole_folder

FEATURES, CLASSES = 64, 10
_BATCH, _RATE, _NOISE = 128, 3e-3, 0.1

Labelled = tuple[Tensor, Tensor]
"""Images [N, 1, H, H] in [-1, 1] and their classes [N]."""


class Classifier(nn.Module):
    """Two convolutions, a hidden layer of 64 and ten logits, of grey images; some 38,000 weights
    at 8x8 pixels, 106,000 at 28x28.

    Args:
        side: of the images; those of more than 8 pixels are halved after the first convolution.
        generator: draws the initial weights; torch's global generator if left out.
    """

    def __init__(self, side: int = 8, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.side, self.early = side, 2 if side > 8 else 1
        rest = side // self.early // 2
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * rest * rest, FEATURES)
        self.logits = nn.Linear(FEATURES, CLASSES)
        for weights in self.parameters():
            if weights.ndim > 1:
                nn.init.kaiming_normal_(weights, generator=generator)
            else:
                nn.init.zeros_(weights)

    def features(self, images: Tensor) -> Tensor:
        """Features [B, 64] of images [B, 1, side, side] in [-1, 1]."""
        h = functional.silu(self.conv1(images))
        h = functional.max_pool2d(h, self.early) if self.early > 1 else h
        h = functional.max_pool2d(functional.silu(self.conv2(h)), 2)
        return functional.silu(self.hidden(h.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, side, side] in [-1, 1]."""
        logits: Tensor = self.logits(self.features(images))
        return logits


def split_digits(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of the half of the digits to train on (898) and of the half to test on (899)."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    return order[:898], order[898:]


def halves_of_digits(seed: int) -> tuple[Labelled, Labelled]:
    """The digits to train on, and those to test on."""
    digits = open_digits()
    train, test = (digits.load(part.tolist()) for part in split_digits(seed))
    return train, test


def parts_of_fashion(seed: int) -> tuple[Labelled, Labelled]:
    """Fashion-MNIST's training images, and its test images.

    Raises:
        UserError: its files are not there.
    """
    parts = [open_fashion_mnist(split=part) for part in ("train", "test")]
    train, test = (part.load(range(len(part))) for part in parts)
    return train, test


@dataclass(frozen=True)
class Recipe:
    """How a classifier that ships was trained.

    Args:
        side: of its images.
        parts: images to train on and to test on, by a seed.
        steps: of training.
    """

    side: int
    parts: Callable[[int], tuple[Labelled, Labelled]]
    steps: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        return 1, self.side, self.side


RECIPES = {
    "digits": Recipe(8, halves_of_digits, 800),
    "fashion-mnist": Recipe(28, parts_of_fashion, 6000),
}
"""The classifiers that ship, by the names of their feature spaces."""


def shipped(name: str) -> Classifier:
    """A classifier that ships, frozen, by the name of its feature space."""
    folder = ASSETS / f"{name}-classifier"
    return load_classifier(folder, RECIPES[name].side).requires_grad_(False)


def train_classifier(name: str = "digits", seed: int = 0) -> tuple[Classifier, float]:
    """Train on the images to train on; return the classifier and its accuracy on the others.

    AdamW with a cosine rate; a training image is moved by at most one pixel and gets a little
    noise, so that the features see faults of that size in samples.
    """
    recipe, generator = RECIPES[name], torch.Generator().manual_seed(seed)
    (images, labels), test = recipe.parts(seed)
    model = Classifier(recipe.side, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        chosen = torch.randint(len(images), (_BATCH,), generator=generator)
        batch = _moved(images[chosen], generator)
        batch = batch + _NOISE * torch.randn(batch.shape, generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(batch), labels[chosen], label_smoothing=0.05).backward()
        optimizer.step()
    model.eval()
    return model, accuracy(model, test)


@torch.no_grad()
def accuracy(model: Classifier, labelled: Labelled) -> float:
    """Share of the images that the classifier names right."""
    images, labels = labelled
    found = torch.cat([model(part).argmax(1) for part in images.split(1000)])
    return float((found == labels).double().mean())


def save_classifier(model: Classifier, config: dict[str, object], folder: Path) -> None:
    """Write config.json and model.safetensors, in the place of what was there."""
    with whole_folder(folder) as temporary:
        save_file(model.state_dict(), temporary / "model.safetensors")
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_classifier(folder: Path, side: int = 8) -> Classifier:
    """Read a classifier of images of a side that `save_classifier` wrote.

    Raises:
        UserError: missing or damaged weights.
    """
    path = folder / "model.safetensors"
    model = Classifier(side, torch.Generator().manual_seed(0))
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"cannot read the classifier {path}: {error}") from error
    return model.eval()


def main() -> None:
    """Train the classifier and write it to a folder."""
    parser = argparse.ArgumentParser(prog="python -m stepdistill.eval.classifier")
    parser.add_argument("name", choices=RECIPES, nargs="?", default="digits", help="of its space")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing classifier")
    asked = parser.parse_args()
    if (asked.out / "model.safetensors").exists() and not asked.overwrite:
        parser.error(f"{asked.out} already holds a classifier; pass --overwrite")
    torch.set_num_threads(1)
    model, correct = train_classifier(asked.name, asked.seed)
    recipe = RECIPES[asked.name]
    config = {
        "kind": f"{asked.name}-classifier",
        "command": f"python -m stepdistill.eval.classifier {asked.name} --seed {asked.seed}",
        "input": recipe.shape,
        "features": FEATURES,
        "classes": CLASSES,
        "test_images": len(recipe.parts(asked.seed)[1][1]),
        "test_accuracy": round(correct, 4),
        "torch": str(torch.__version__),
    }
    save_classifier(model, config, asked.out)
    print(f"test accuracy {correct:.4f}, written to {asked.out}")


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [B, 1, H, H] moved by -1, 0 or 1 pixel on both axes, black coming in."""
    padded = functional.pad(images[:, 0], (1, 1, 1, 1), value=-1)
    count, side = len(images), torch.arange(images.shape[-1])
    top, left = torch.randint(3, (2, count), generator=generator)
    rows = (top[:, None] + side)[:, :, None]
    columns = (left[:, None] + side)[:, None, :]
    return padded[torch.arange(count)[:, None, None], rows, columns][:, None]


if __name__ == "__main__":
    main()
