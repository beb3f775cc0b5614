"""Teachers in EDM's form: trained, saved on diffusers' own scheduler, read, distilled, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from stepdistill.adapters.cond import Cond
from stepdistill.commands.export import export
from stepdistill.commands.teacher import teacher
from stepdistill.commands.train import train
from stepdistill.diffusion.heads import HEADS
from stepdistill.diffusion.process import EDM
from stepdistill.diffusion.sampler import first_state, sample
from stepdistill.diffusion.saved import read_scheduler, stock_config
from stepdistill.run.assets import load_teacher
from stepdistill.run.errors import UserError

QUICK = ["batch_size=8", "log.tensorboard=false", "device=cpu", "optim.warmup_steps=0"]
QUICK += ["eval.every_steps=0", "sample.every_steps=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small UNet's pipeline, trained as EDM for a few steps."""
    run = tmp_path_factory.mktemp("edm") / "run"
    density = "t={kind: logit_normal, mean: -1.2, std: 1.2}"
    teacher("teacher-digits-unet", [f"run={run}", "head=edm-f", density, "steps=4", *QUICK])
    return run / "pipeline"


def test_it_is_read_as_it_was_trained(folder) -> None:
    den = load_teacher(str(folder))
    assert isinstance(den.process, EDM) and den.head.name == "edm-f"
    assert (den.process.t_min, den.process.t_max, den.process.sigma_data) == (0.002, 80.0, 0.5)


@torch.no_grad()
def test_diffusers_own_walk_is_ours(folder) -> None:
    """Of diffusers' own spacing, whose last step leaves sigma_min for 0."""
    den, steps = load_teacher(str(folder)), 6
    pipe = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(folder / "pipeline.py"), trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.model.to(torch.float32)
    z = torch.randn(3, *den.sample_shape, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 4, 9])
    found = pipe(label, num_inference_steps=steps, latents=z, output_type="pt").images * 2 - 1
    grid = (*pipe.scheduler.sigmas[:-1].tolist(), 0.0)
    begin = float(pipe.scheduler.init_noise_sigma) / grid[0]  # of sqrt(sigma_max^2 + 1)
    ours = sample(den, z * begin, grid, Cond(label)).clamp(-1, 1)
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-4)
    assert float(first_state(den.process, z, 80.0).std()) == pytest.approx(80, rel=0.2)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("scm-digits", ["warmup=1"]),
        ("consistency-digits", []),
        ("dmd2-digits", ["adversary.from_step=0", "critic_first=0"]),
    ],
)
def test_it_is_distilled_and_its_student_exported(name, own, folder, tmp_path) -> None:
    """The export compares its images with the training sampler's."""
    keys = [f"teacher={folder}", "steps=2", *QUICK, *own]
    run = train(name, [f"run={tmp_path / 'run'}", *keys])
    export(run, tmp_path / "out")
    with pytest.raises(UserError, match="of diffusers' schedulers none knows edm-f"):
        export(run, tmp_path / "stock", stock=True)


def test_a_flow_of_it_is_a_teacher_again(folder, tmp_path) -> None:
    few = ["pairs.num=16", "pairs.steps=2", "pairs.shard=16", f"teacher={folder}", "steps=2"]
    run = train("reflow-digits", [f"run={tmp_path / 'run'}", *few, *QUICK])
    export(run, tmp_path / "flow")
    den = load_teacher(str(tmp_path / "flow"))
    assert isinstance(den.process, EDM) and den.head.name == "edm-f"


@pytest.mark.parametrize("kind", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize(("told", "head"), [("epsilon", "edm-f"), ("v_prediction", "trig-f")])
def test_a_scheduler_s_numbers_are_kept(kind, told, head, tmp_path) -> None:
    """And its output means what our head says."""
    own = {"sigma_min": 0.01, "sigma_max": 40.0, "sigma_data": 0.7, "rho": 5.0}
    stock = kind(prediction_type=told, **own)
    stock.save_pretrained(tmp_path)
    process, name = read_scheduler(tmp_path, kind.__name__)
    assert name == head
    said = stock_config(process, HEADS[name])
    assert said == {"_class_name": "EDMEulerScheduler", "prediction_type": told, **own}
    x_t, h = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.02, 0.5, 3.0, 40.0])
    mine = HEADS[name].clean(h, x_t, process.coefs(t).expand(x_t), process.sigma_data)
    for row, sigma in enumerate(t):
        stocks = stock.precondition_outputs(x_t[row], h[row], sigma)
        torch.testing.assert_close(mine[row], stocks, rtol=1e-4, atol=1e-5)
        fed = stock.precondition_inputs(x_t[row], sigma)
        torch.testing.assert_close(process.scale_input(x_t, t)[row], fed, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(process.network_time(t), stock.precondition_noise(t))
    even = torch.linspace(0, 0.75, 4, dtype=torch.float64)
    torch.testing.assert_close(process.warp(1 - even), stock._compute_karras_sigmas(even))


def test_another_spacing_is_refused(tmp_path) -> None:
    EDMEulerScheduler(sigma_schedule="exponential").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sigma_schedule=exponential"):
        read_scheduler(tmp_path, "EDMEulerScheduler")
