"""Networks trained from scratch: what a config may ask of them, and the labels they must know."""

from __future__ import annotations

from typing import Any

import pytest

from stepdistill.run.errors import UserError
from stepdistill.trainers.flow.denoising import DenoisingConfig, fresh_network
from tests.helpers import SMALL_NETWORK, make, mlp_teacher

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}
DIT = {
    "sample_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 1,
    "num_attention_heads": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 1,
}
ABC = ("a", "b", "c")


def fresh(kind: str, classes: tuple[str, ...], **config: Any) -> Any:
    network = {"type": kind, "config": config}
    return fresh_network(DenoisingConfig(run="unused", steps=1, network=network), classes)


@pytest.mark.parametrize(
    ("kind", "config", "classes"),
    [
        ("UNet2DModel", UNET | {"num_class_embeds": 4}, ABC),
        ("UNet2DModel", UNET, ()),
        ("DiTTransformer2DModel", DIT | {"num_embeds_ada_norm": 3}, ABC),
        ("DiTTransformer2DModel", DIT | {"num_embeds_ada_norm": 7}, ABC),
    ],
)
def test_label_tables_that_fit(kind, config, classes) -> None:
    den = fresh(kind, classes, **config)
    assert den.classes == classes
    assert den.null_label == (3 if classes else None)


def test_a_network_without_labels_leaves_those_of_the_data_unused() -> None:
    den = fresh("UNet2DModel", ABC, **UNET)
    assert (den.classes, den.null_label) == ((), None)


@pytest.mark.parametrize(
    ("kind", "config", "classes", "message"),
    [
        ("UNet2DModel", UNET | {"num_class_embeds": 3}, ABC, "num_class_embeds=3 .* to 4"),
        ("UNet2DModel", UNET | {"num_class_embeds": 11}, ABC, "num_class_embeds=11 .* to 4"),
        ("UNet2DModel", UNET | {"num_class_embeds": 11}, (), "the data has none"),
        ("UNet2DModel", UNET | {"class_embed_type": "timestep"}, ABC, "class_embed_type"),
        ("UNet2DModel", UNET | {"norm_num_groups": 0}, ABC, "refuses it"),
        ("UNet2DModel", UNET | {"colour": 1}, ABC, "refuses it"),
        ("DiTTransformer2DModel", DIT | {"num_embeds_ada_norm": 2}, ABC, "ada_norm=2 .* to 3"),
        ("DiTTransformer2DModel", DIT, (), "the data has none"),
        ("UNet3DModel", {}, ABC, "no class UNet3DModel"),
        ("AutoencoderKL", {}, ABC, "AutoencoderKL has no adapter"),
        ("DDIMScheduler", {}, ABC, "DDIMScheduler has no adapter"),
    ],
)
def test_networks_that_do_not_fit_are_refused(kind, config, classes, message) -> None:
    with pytest.raises(UserError, match=rf"^network\..*{message}"):
        fresh(kind, classes, **config)


def test_a_teacher_is_not_trained_with_guidance() -> None:
    with pytest.raises(UserError, match="guidance=2"):
        make("denoising", mlp_teacher(), network=SMALL_NETWORK, guidance=2.0)
