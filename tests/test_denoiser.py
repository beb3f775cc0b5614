"""Denoiser: saved pipelines of others, wrappers of its network, and features."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser, read_classes
from tests.helpers import dit_teacher, mlp_teacher, noise
from tests.test_denoising import UNET

DDIM = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}


def saved(folder: Path, net: Any, key: str, **index: Any) -> Path:
    """A pipeline folder as diffusers writes it, and its index with ``index`` merged in."""
    net.save_pretrained(folder / key)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(DDIM))
    entries = {
        "_class_name": "SomePipeline",
        key: ["diffusers", type(net).__name__],
        "scheduler": ["diffusers", "DDIMScheduler"],
        **index,
    }
    text = json.dumps({k: v for k, v in entries.items() if v != "left out"})
    (folder / "model_index.json").write_text(text)
    return folder


def small_unet(**config: Any) -> nn.Module:
    from diffusers import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(**{**UNET, **config})


@pytest.mark.parametrize(
    ("index", "classes", "null"),
    [
        ({}, ("0", "1", "2"), 3),
        ({"null_label": None}, ("0", "1", "2"), None),
        ({"id2label": {"2": "fox", "0": "owl", "1": "elk"}}, ("owl", "elk", "fox"), 3),
        ({"id2label": {"0": "crane", "1": "crane"}}, ("crane (0)", "crane (1)"), 3),
        ({"classes": {"owl": 1, "elk": 0}}, ("elk", "owl"), 3),
    ],
)
def test_classes_of_a_stock_dit(tmp_path, index, classes, null) -> None:
    den = Denoiser.from_pipeline(saved(tmp_path, dit_teacher().net, "transformer", **index))
    assert (den.classes, den.null_label) == (classes, null)
    assert (den.process.name, den.head.name) == ("vp", "eps")
    with pytest.raises(ValueError, match="needs a class label"):
        den(torch.zeros(2, 1, 8, 8), torch.full((2,), 0.5), Cond())


@pytest.mark.parametrize(
    ("config", "index", "classes", "null"),
    [
        ({}, {}, (), None),
        ({"num_class_embeds": 3}, {}, ("0", "1", "2"), None),
        ({"num_class_embeds": 3}, {"null_label": 2}, ("0", "1"), 2),
    ],
)
def test_classes_of_a_stock_unet(tmp_path, config, index, classes, null) -> None:
    den = Denoiser.from_pipeline(saved(tmp_path, small_unet(**config), "unet", **index))
    assert (den.classes, den.null_label) == (classes, null)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"vae": ["diffusers", "Autoencoder0"]}, "no network class Autoencoder0"),
        ({"vqvae": ["diffusers", "VQModel"]}, r"a model of quantised latents \(vqvae\)"),
        ({"unet_2": ["diffusers", "UNet2DModel"]}, r"several networks \(unet, unet_2\)"),
        ({"scheduler": "left out"}, "names no scheduler"),
        ({"scheduler": [None, None]}, "names no scheduler"),
        ({"unet": [None, None]}, "names none of the networks"),
        ({"unet": ["diffusers", "UNet0DModel"]}, "no network class UNet0DModel"),
    ],
)
def test_a_folder_that_is_not_understood_is_refused_in_a_line(tmp_path, index, message) -> None:
    folder = saved(tmp_path, small_unet(), "unet", **index)
    with pytest.raises(ValueError, match=message) as caught:
        Denoiser.from_pipeline(folder)
    assert re.fullmatch("[^\n]+", str(caught.value))


def test_names_that_the_labels_do_not_fit_are_refused() -> None:
    for index in ({"id2label": {"1": "a"}}, {"classes": ["a", "b", "c"]}):
        with pytest.raises(ValueError, match="class names for 2 labels"):
            read_classes(index, 2, None)


class Wrapper(nn.Module):
    """Counts its calls and has no hooks of the network's modules, as a compiled one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = net, 0

    def forward(self, *args: Any) -> Any:
        self.calls += 1
        return self.module(*args)


def test_a_wrapper_is_called_but_never_a_part() -> None:
    den = mlp_teacher()
    wrapper, names = Wrapper(den.net), list(den.state_dict())
    x, t, cond = noise(), torch.full((16,), 0.5), Cond(torch.zeros(16, dtype=torch.long))
    plain = den(x, t, cond).h
    den.route(wrapper)
    assert torch.equal(den(x, t, cond).h, plain) and wrapper.calls == 1
    assert list(den.state_dict()) == names and wrapper not in list(den.modules())
    den.route(None)
    assert torch.equal(den(x, t, cond).h, plain) and wrapper.calls == 1


def test_features_come_from_the_network_itself() -> None:
    den = mlp_teacher()
    wrapper = Wrapper(den.net)
    x, t, cond = noise(), torch.full((16,), 0.5), Cond(torch.zeros(16, dtype=torch.long))
    den.route(wrapper)
    tapped = den(x, t, cond, taps=("enter", "leave"))
    assert wrapper.calls == 0
    torch.testing.assert_close(tapped.features["enter"], den.net.enter(x))
    assert torch.equal(tapped.features["leave"], tapped.h)
    den(x, t, cond)
    assert wrapper.calls == 1  # the wrapper is back
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        den(x, t, cond, taps=("nowhere",))
    den(x, t, cond)
    assert wrapper.calls == 2
