"""Entropic transport between two estimates, and VDOT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stepdistill.losses.transport import (
    Entropic,
    Plain,
    barycentres,
    points,
    squared_distances,
)
from stepdistill.run.rng import Rng
from tests.helpers import batch_of, dit_teacher, make, mlp_teacher, noise, run, same, saved

BARE = Entropic(lam=0.0)  # the transport alone
SHARP = Entropic(blur=1e-4, iterations=20, lam=0.0)
SHAPES = [(5, 6), (5, 2, 3, 3), (5, 2, 2, 3, 3)]


def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Two estimates of a shape."""
    return noise(1, shape), noise(2, shape)


def test_points_are_positions_or_coordinates() -> None:
    image = noise(0, (2, 3, 4, 5))
    assert points(image).shape == (2, 20, 3)
    assert torch.equal(points(image)[1, 7], image[1, :, 1, 2])
    assert torch.equal(points(image[:, :, 0, 0])[..., 0], image[:, :, 0, 0])


@pytest.mark.parametrize("debias", [True, False])
def test_where_each_point_goes_to_its_partner_it_is_the_plain_difference(debias) -> None:
    """Positions far apart, moved a little, under little blur: the plan is diagonal."""
    real = (5.0 * torch.arange(9.0)).reshape(1, 1, 3, 3).expand(2, 1, 3, 3)
    fake = real + 0.3 * noise(0, (2, 1, 3, 3))
    got = Entropic(blur=1e-4, iterations=20, debias=debias, lam=0.0)(fake, real)
    torch.testing.assert_close(got, Plain()(fake, real), rtol=1e-5, atol=1e-5)


def test_it_moves_to_where_mass_is_not_to_the_same_place() -> None:
    """Real positions may be permuted: a fake estimate that is one of the permutations rests."""
    real = 5.0 * torch.arange(6.0)[None]
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    assert float(SHARP(real[:, order], real).abs().max()) < 1e-4
    fake, real = pair((3, 2, 3, 3))
    moved = real.flatten(2)[..., torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(
        BARE(fake, moved.reshape(real.shape)), BARE(fake, real), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_estimates_give_exactly_nothing_but_with_the_bias(shape) -> None:
    x = noise(0, shape)
    assert not BARE(x, x.clone()).any()
    assert float(Entropic(debias=False, lam=0.0)(x, x.clone()).abs().max()) > 1e-3
    flat = torch.full(shape, 0.5)
    assert not BARE(flat, flat).any()
    torch.testing.assert_close(BARE(flat, flat - 1), torch.ones(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_are_transported_each_by_itself_in_their_own_unit(shape) -> None:
    fake, real = pair(shape)
    whole = Entropic(lam=0.5)(fake, real)
    assert whole.shape == fake.shape
    torch.testing.assert_close(Entropic(lam=0.5)(fake[2:3], real[2:3]), whole[2:3])
    torch.testing.assert_close(Entropic(lam=0.5)(3 * fake, 3 * real), 3 * whole)
    bare = BARE(fake, real)
    torch.testing.assert_close(whole, bare + 0.5 * (fake - real))


def value(a: Tensor, b: Tensor, blur: float) -> Tensor:
    """Entropic cost between uniform clouds a [N, C] and b [M, C] by its dual, fp64, converged."""
    costs = (a[:, None] - b[None]).square().sum(-1)
    n, m = costs.shape
    f, g = torch.zeros(n, 1, dtype=a.dtype), torch.zeros(1, m, dtype=a.dtype)
    for _ in range(3000):
        f = -blur * (((g - costs) / blur).logsumexp(1, keepdim=True) - torch.tensor(m).log())
        g = -blur * (((f - costs) / blur).logsumexp(0, keepdim=True) - torch.tensor(n).log())
    return f.mean() + g.mean()


def test_the_direction_is_the_transport_s_gradient() -> None:
    """By finite differences of a dual of its own; the gradient's 2 / N is divided out."""
    fake, real = (one.double() for one in pair((1, 2, 2, 3)))
    a, b = fake.flatten(2)[0].T.contiguous(), real.flatten(2)[0].T.contiguous()
    mean = float((a[:, None] - b[None]).square().sum(-1).mean())
    blur, step = 0.2 * mean, 1e-4

    def cost(at: Tensor, debias: bool) -> float:
        bias = value(at, at, blur) / 2 if debias else 0.0
        return float(value(at, b, blur) - bias)

    for debias in (False, True):
        got = Entropic(blur=0.2, iterations=500, debias=debias, lam=0.0)(fake, real)
        for i, k in ((0, 0), (3, 1)):
            up, down = a.clone(), a.clone()
            up[i, k] += step
            down[i, k] -= step
            slope = (cost(up, debias) - cost(down, debias)) / (2 * step)
            expected = len(a) / 2 * slope
            assert float(got[0, k, i // 3, i % 3]) == pytest.approx(expected, abs=2e-4)


def test_the_plan_keeps_both_marginals() -> None:
    fake, real = (points(one.double()) for one in pair((4, 2, 3, 3)))
    costs = squared_distances(fake, real)
    blur = 0.2 * costs.mean(dim=(1, 2), keepdim=True)
    one = torch.eye(9).expand(4, 9, 9)  # each point as its own mark: the rows are the plan
    plan = barycentres(costs, one, blur, 300)
    torch.testing.assert_close(plan.sum(2), torch.ones(4, 9))
    torch.testing.assert_close(plan.sum(1), torch.ones(4, 9), rtol=1e-4, atol=1e-4)


def test_in_bf16_it_computes_in_fp32() -> None:
    fake, real = pair((3, 2, 3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = Entropic()(fake, real)
    assert torch.equal(rounded, Entropic()(fake, real))


# VDOT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", [mlp_teacher, dit_teacher])
def test_vdot_without_transport_and_head_is_dmd_to_the_bit(teacher) -> None:
    bare, dmd, vdot = (
        make("vdot", teacher(), batch_size=4, transport="plain", adversary=None),
        make("dmd", teacher(), batch_size=4),
        make("vdot", teacher(), batch_size=4, adversary=None),
    )
    for made in (bare, dmd, vdot):
        run(made, 0, 4)
    same(saved(bare)[0], saved(dmd)[0])
    with pytest.raises(AssertionError):
        same(saved(vdot)[0], saved(dmd)[0])


def test_vdot_s_head_is_relativistic_and_asks_for_real_features() -> None:
    """VDOT: the student's adversarial loss changes with the real images."""
    pushes = []
    for shift in (0.0, 0.3):
        made = make("vdot", mlp_teacher(), adversary={"features": "state", "student": 1.0})
        assert made.config.adversary.loss.compares and made.needs == "data"
        assert made.config.transport == Entropic()
        for weight in made.adversary.net.parameters():
            weight.data += 0.1 * noise(3, weight.shape)
        batch = batch_of(made, 0)
        batch = replace(batch, x=batch.x + shift)
        pushes.append(float(made.student_loss(batch, Rng(0)).logs["adversarial"]))
    assert abs(pushes[0] - pushes[1]) > 1e-4


def test_any_matching_method_takes_the_transport() -> None:
    """``dmd`` with VDOT's transport is VDOT without its head."""
    pair = [
        make("dmd", mlp_teacher(), transport={"kind": "entropic", "lam": 1.0}),
        make("vdot", mlp_teacher(), adversary=None),
    ]
    for made in pair:
        run(made, 0, 3)
    same(*(saved(made)[0] for made in pair))
