"""LCM: the student is told the guidance that its teacher was asked by, in its export too."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import DiffusionPipeline

from stepdistill.adapters import scalars
from stepdistill.adapters.cond import Cond
from stepdistill.commands.export import scheduler_of, told_scales
from stepdistill.diffusion.sampler import sample
from stepdistill.pipelines.folder import write_pipeline
from stepdistill.pipelines.image import ImagePipeline
from stepdistill.run.errors import UserError
from tests.helpers import dit_teacher, make, mlp_teacher, run


@pytest.mark.parametrize("scale", [None, 1.0, 2.7])
def test_the_pipeline_takes_any_scale_in_one_pass(tmp_path, scale) -> None:
    """As the training sampler, told the same, does; without a second half of the batch."""
    made = make("lcm", dit_teacher(), steps=8)
    run(made, 0, 6)
    best = made.best()
    write_pipeline(
        tmp_path / "out",
        [best.plain()],
        scheduler_of(made, 1),
        classes=made.teacher.classes,
        null_label=made.teacher.null_label,
        default_steps=1,
        default_guidance=best.scale,
        card="# card",
        dtype=None,
        extra=scalars.held(best.net),
    )
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    sizes = []
    pipe.model.register_forward_pre_hook(lambda net, args: sizes.append(len(args[0])))
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {} if scale is None else {"guidance_scale": scale}
    images = pipe(["a", "b", "c"], latents=z, output_type="pt", num_inference_steps=1, **given)
    guidance = torch.full((3,), made.config.guidance if scale is None else scale)
    cond = Cond(torch.tensor([0, 1, 2]), guidance=guidance)
    with torch.no_grad():
        x = sample(best, z, made.grids()[1], cond, noise=made.noise)
    expected = (x.clamp(-1, 1) + 1) / 2
    assert torch.allclose(images.images.cpu(), expected, atol=1e-5)
    assert sizes == [3]
    with pytest.raises(ValueError, match="told scales from 1 on"):
        pipe(["a"], guidance_scale=0.5)
    assert isinstance(pipe, ImagePipeline) or type(pipe).__name__ == "ImagePipeline"


def test_the_pipeline_warns_of_scales_that_were_not_learnt() -> None:
    made = make("lcm", dit_teacher(), steps=8, guidance_range=(1.0, 4.0))
    best = made.best()
    pipe = ImagePipeline(
        best.plain(),
        scheduler_of(made, 1),
        null_label=made.teacher.null_label,
        extra=scalars.held(best.net),
        guidance_range=told_scales(made),
    )
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (1.0, 4.0):
            pipe([0], guidance_scale=scale, output_type="pt")
    with pytest.warns(UserWarning, match=r"^guidance_scale is 4.5, learnt were \[1.0, 4.0\]$"):
        pipe([0], guidance_scale=4.5, output_type="pt")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"guidance_range": None}, "without guidance_range there is one scale only"),
        ({"guidance": 4.0}, "must begin at 1 or more and hold it"),
        ({"guidance_range": (0.5, 3.0)}, "must begin at 1 or more and hold it"),
        ({"lora": {"rank": 2}}, "set embedding=false or lora=null"),
    ],
)
def test_what_cannot_be_told_is_refused(keys, line) -> None:
    with pytest.raises(UserError, match=line):
        make("lcm", mlp_teacher(), **keys)


def test_adapters_learn_without_being_told() -> None:
    made = make("lcm", mlp_teacher(), embedding=False, lora={"rank": 2})
    run(made, 0, 2)
    assert made.denoiser("student").lora is not None
