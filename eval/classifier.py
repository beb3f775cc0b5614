"""A small classifier of 8x8 digits, whose last hidden layer is the feature space ``digits``.

``python -m stepdistill.eval.classifier --out DIR`` trains the one that ships, in a few seconds.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from stepdistill.data.digits import open_digits
from stepdistill.run.errors import UserError
from stepdistill.run.files import whole_folder

FEATURES, CLASSES = 64, 10
_STEPS, _BATCH, _RATE, _NOISE = 800, 128, 3e-3, 0.1


class DigitsClassifier(nn.Module):
    """Two convolutions, a hidden layer of 64 and ten logits; 38,000 weights.

    Args:
        generator: draws the initial weights; torch's global generator if left out.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, FEATURES)
        self.logits = nn.Linear(FEATURES, CLASSES)
        for weights in self.parameters():
            if weights.ndim > 1:
                nn.init.kaiming_normal_(weights, generator=generator)
            else:
                nn.init.zeros_(weights)

    def features(self, images: Tensor) -> Tensor:
        """Features [B, 64] of images [B, 1, 8, 8] in [-1, 1]."""
        h = functional.silu(self.conv1(images))
        h = functional.max_pool2d(functional.silu(self.conv2(h)), 2)
        return functional.silu(self.hidden(h.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 8, 8] in [-1, 1]."""
        logits: Tensor = self.logits(self.features(images))
        return logits


def split_digits(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of the half of the digits to train on (898) and of the half to test on (899)."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    return order[:898], order[898:]


def train_classifier(seed: int = 0) -> tuple[DigitsClassifier, float]:
    """Train on one half of the digits; return the classifier and its accuracy on the other half.

    AdamW with a cosine rate; a training image is moved by at most one pixel and gets a little
    noise, so that the features see faults of that size in samples.
    """
    generator = torch.Generator().manual_seed(seed)
    train, _ = split_digits(seed)
    images, labels = open_digits().load(train.tolist())
    model = DigitsClassifier(generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * step / _STEPS))
        chosen = torch.randint(len(images), (_BATCH,), generator=generator)
        batch = _moved(images[chosen], generator)
        batch = batch + _NOISE * torch.randn(batch.shape, generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(batch), labels[chosen], label_smoothing=0.05).backward()
        optimizer.step()
    model.eval()
    return model, accuracy(model, seed)


@torch.no_grad()
def accuracy(model: DigitsClassifier, seed: int = 0) -> float:
    """Share of the test half that the classifier names right."""
    _, test = split_digits(seed)
    images, labels = open_digits().load(test.tolist())
    return float((model(images).argmax(1) == labels).double().mean())


def save_classifier(model: DigitsClassifier, config: dict[str, object], folder: Path) -> None:
    """Write config.json and model.safetensors, in the place of what was there."""
    with whole_folder(folder) as temporary:
        save_file(model.state_dict(), temporary / "model.safetensors")
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_classifier(folder: Path) -> DigitsClassifier:
    """Read a classifier that `save_classifier` wrote.

    Raises:
        UserError: missing or damaged weights.
    """
    path = folder / "model.safetensors"
    model = DigitsClassifier(torch.Generator().manual_seed(0))
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"cannot read the digits classifier {path}: {error}") from error
    return model.eval()


def main() -> None:
    """Train the classifier and write it to a folder."""
    parser = argparse.ArgumentParser(prog="python -m stepdistill.eval.classifier")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing classifier")
    asked = parser.parse_args()
    if (asked.out / "model.safetensors").exists() and not asked.overwrite:
        parser.error(f"{asked.out} already holds a classifier; pass --overwrite")
    torch.set_num_threads(1)
    model, correct = train_classifier(asked.seed)
    config = {
        "kind": "digits-classifier",
        "command": f"python -m stepdistill.eval.classifier --seed {asked.seed}",
        "input": [1, 8, 8],
        "features": FEATURES,
        "classes": CLASSES,
        "test_images": len(split_digits(asked.seed)[1]),
        "test_accuracy": round(correct, 4),
        "torch": str(torch.__version__),
    }
    save_classifier(model, config, asked.out)
    print(f"test accuracy {correct:.4f}, written to {asked.out}")


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [B, 1, 8, 8] moved by -1, 0 or 1 pixel on both axes, black coming in."""
    padded = functional.pad(images[:, 0], (1, 1, 1, 1), value=-1)
    count, side = len(images), torch.arange(8)
    top, left = torch.randint(3, (2, count), generator=generator)
    rows = (top[:, None] + side)[:, :, None]
    columns = (left[:, None] + side)[:, None, :]
    return padded[torch.arange(count)[:, None, None], rows, columns][:, None]


if __name__ == "__main__":
    main()
