"""LCM: the student is told the guidance that its teacher was asked by, also in its export."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from stepdistill.adapters import scalars
from stepdistill.commands.export import scheduler_of
from stepdistill.diffusion.cond import Cond
from stepdistill.diffusion.sampler import sample
from stepdistill.pipelines.folder import write_pipeline
from stepdistill.pipelines.image import ImagePipeline
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.trajectory.consistency import ConsistencyTrainer
from tests.helpers import batch_of, dit_teacher, make, mlp_teacher, run, same, saved


def told(made, label, scale):
    with torch.no_grad():
        x_t, t = torch.ones(4, 1, 8, 8), torch.full((4,), 0.7)
        return made.denoiser("student")(x_t, t, Cond(label, guidance=torch.full((4,), scale))).h


def test_lcm_is_told_the_scale_that_the_teacher_is_asked_by(monkeypatch) -> None:
    made, seen = make("lcm", mlp_teacher(), guidance_range=(1.0, 5.0)), {}
    asked, jump = ConsistencyTrainer.asked, ConsistencyTrainer.jump

    def ask(self, batch, rng):
        seen["asked"] = asked(self, batch, rng).scale
        return asked(self, batch, rng)

    def leap(self, den, x_t, t, end, batch):
        seen.setdefault("told", []).append(batch.cond.guidance)
        return jump(self, den, x_t, t, end, batch)

    monkeypatch.setattr(ConsistencyTrainer, "asked", ask)
    monkeypatch.setattr(ConsistencyTrainer, "jump", leap)
    made.loss(batch_of(made, 0), Rng(0).at(0))
    assert len(seen["told"]) == 2 and len(set(seen["asked"].tolist())) > 4
    assert all(torch.allclose(one, seen["asked"]) for one in seen["told"])
    assert ((seen["asked"] >= 1) & (seen["asked"] <= 5)).all()


def test_a_student_heeds_the_scale_once_it_has_learnt() -> None:
    made, label = make("lcm", dit_teacher(), steps=6), torch.tensor([0, 1, 2, 0])
    assert told(made, label, 1.0).equal(told(made, label, 3.0))
    run(made, 0, 4)
    assert not told(made, label, 1.0).equal(told(made, label, 3.0))
    assert told(made, label, 2.0).equal(told(made, label, made.config.guidance))


def test_lcm_goes_on_bit_for_bit_after_a_resume() -> None:
    made, again, third = (make("lcm", dit_teacher(), steps=6) for _ in range(3))
    run(made, 0, 4)
    run(again, 0, 2)
    third.load_state(2, *saved(again))
    run(third, 2, 4)
    same(made.state(), third.state())


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
