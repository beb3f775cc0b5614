"""Clamped estimates: one rule for training, sampler and exported scheduler."""

from __future__ import annotations

import pytest
import torch

from stepdistill.adapters.cond import Cond
from stepdistill.commands.export import literal_rows
from stepdistill.diffusion.process import RF
from stepdistill.diffusion.sampler import sample
from stepdistill.diffusion.timesteps import uniform_grid
from stepdistill.losses.regression import clip_through
from stepdistill.pipelines.literal_grid import LiteralGridScheduler
from stepdistill.run.errors import UserError
from tests.helpers import make, mlp_teacher


def test_the_value_is_clamped_and_no_gradient_pushes_outwards() -> None:
    x = torch.tensor([-3.0, -3.0, -0.5, 0.25, 2.0, 2.0], requires_grad=True)
    shown = clip_through(x, 1.5)
    assert torch.equal(shown.detach(), torch.tensor([-1.5, -1.5, -0.5, 0.25, 1.5, 1.5]))
    grad = torch.tensor([1.0, -1.0, 2.0, -3.0, 4.0, -4.0])
    shown.backward(grad)  # descent goes against it: the first and the last would go further out
    assert torch.equal(x.grad, torch.tensor([0.0, -1.0, 2.0, -3.0, 4.0, 0.0]))


@pytest.mark.parametrize("clip", [None, 1.0, 1.25])
def test_the_scheduler_clamps_as_the_sampler_does(clip: float | None) -> None:
    den = mlp_teacher()
    shape = den.sample_shape
    source = torch.Generator().manual_seed(0)
    noises = [2 * torch.randn((5, *shape), generator=source) for _ in range(4)]
    grid = uniform_grid(RF(), 4)
    cond = Cond(torch.zeros(5, dtype=torch.long) if den.classes else None)
    with torch.no_grad():
        ours = sample(
            den, noises[0], grid, cond, noise="fresh", fresh=noises.__getitem__, clip=clip
        )
        rows = literal_rows(den, grid)
        scheduler = LiteralGridScheduler({"4": rows}, "predicted", 4, clip=clip)
        x = noises[0]
        for i, row in enumerate(rows):
            t = torch.full((5,), grid[i])
            clean = scheduler.step(den.raw(x, t, cond), row["time"], x).pred_original_sample
            level = grid[i + 1]
            x = clean if level == 0 else (1 - level) * clean + level * noises[i + 1]
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)
    assert clip is None or float(ours.abs().max()) <= clip


@pytest.mark.parametrize("method", ["phased_dmd", "reflow"])
def test_methods_that_do_not_clamp_say_so(method: str) -> None:
    with pytest.raises(UserError, match="clip"):
        make(method, mlp_teacher(), clip=1.5)


@pytest.mark.parametrize("method", ["sim", "dmd", "consistency"])
def test_training_sees_what_is_shown(method: str) -> None:
    made = make(method, mlp_teacher(), clip=1.5)
    wide = torch.tensor([[4.0, -4.0]])
    assert torch.equal(made.shown(wide), wide.clamp(-1.5, 1.5))
    assert torch.equal(make(method, mlp_teacher()).shown(wide), wide)
