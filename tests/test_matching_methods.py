"""Diff-Instruct, f-distill, SwiftBrush and SNOOPI: their gradients in closed form, and what they
are in terms of each other."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.commands.read import read_config
from stepdistill.diffusion.process import Coefs
from stepdistill.losses.gap import Kl, Seen, Vsd, product
from stepdistill.losses.guides import Spread
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from tests.helpers import (
    MEAN,
    STD,
    batch_of,
    descend,
    dit_teacher,
    gaussian_clean,
    hermite,
    hermite2,
    make,
    mlp_teacher,
    run,
    same,
    saved,
    turn_gradients,
)

Z, E, W = hermite2(80)
A, S = 0.8, 0.6
STATE = {"features": "state", "head": "mlp"}


def plain(alpha: float, sigma: float) -> Coefs:
    """Coefficients given outright, without derivatives."""
    parts = (torch.tensor([[value]], dtype=torch.float64) for value in (alpha, sigma, 0, 0))
    return Coefs(*parts)


def log_density(x: Tensor, mean: float, var: float) -> Tensor:
    """Of a Gaussian."""
    return -0.5 * ((x - mean) ** 2 / var + math.log(2 * math.pi * var))


def bench(mu: float, u: float) -> Seen:
    """What a comparison sees of the student mu + u z and of the target, both exact, at bench A."""
    c, x = plain(A, S), (mu + u * Z)[:, None]
    x_t = A * x + S * E[:, None]
    fake = gaussian_clean(x_t, A, S, mu, u * u)
    real = gaussian_clean(x_t, A, S, MEAN, STD**2)
    q = log_density(x_t, A * MEAN, A * A * STD**2 + S * S)
    p = log_density(x_t, A * mu, A * A * u * u + S * S)
    t = torch.full((len(x),), S, dtype=torch.float64)
    return Seen(x, x, None, t, c, x_t, fake, real, (q - p).exp()[:, 0])


def slopes(direction: Tensor) -> tuple[float, float]:
    """The gradient in (mu, u) of a student that moves along a direction [N, 1]."""
    moved = W * direction[:, 0]
    return float(moved.sum()), float((moved * Z).sum())


# Diff-Instruct -------------------------------------------------------------------------------


def test_diff_instruct_s_gap_is_the_gradient_of_the_kl() -> None:
    """Weight 1 between clean estimates; times alpha^2 / sigma^2 it is KL(p_t || q_t)'s."""
    made = make("diff_instruct", mlp_teacher())
    seen = bench(0.2, 1.1)
    bare = made.direction(seen)
    assert torch.equal(bare, seen.fake - seen.real)
    assert slopes(product((Kl(),), seen) * bare) == pytest.approx((-0.133185, -0.132246), abs=1e-6)


def test_diff_instruct_is_dmd_without_a_normaliser() -> None:
    edm = {"kind": "logit_normal", "mean": -1.2, "std": 1.2}
    keys = {"weights": (), "student_t": edm, "critic_t": edm}
    pair = [make("diff_instruct", mlp_teacher()), make("dmd", mlp_teacher(), **keys)]
    other = make("dmd", mlp_teacher(), student_t=edm, critic_t=edm)
    for made in (*pair, other):
        run(made, 0, 4)
    same(saved(pair[0])[0], saved(pair[1])[0])
    with pytest.raises(AssertionError):
        same(saved(pair[0])[0], saved(other)[0])


CENTRES, NARROW = (-1.5, 1.5), 0.4


def two_modes(x_t: Tensor) -> tuple[Tensor, Tensor]:
    """E[x | x_t] and the log density at x_t of two equal modes."""
    var = A * A * NARROW**2 + S * S
    logs = torch.stack([log_density(x_t, A * m, var) for m in CENTRES])
    parts = torch.stack([gaussian_clean(x_t, A, S, m, NARROW**2) for m in CENTRES])
    return (logs.softmax(0) * parts).sum(0), logs.logsumexp(0) - math.log(2)


def fitted(divergence: str) -> tuple[float, float]:
    """Where a Gaussian student of two modes rests at one level, from near the right one."""
    keys = {"least_ratio": 1e-9, "greatest_ratio": 1e9, "weights": ["kl"]}
    made = make("f_distill", mlp_teacher(), divergence=divergence, adversary=STATE, **keys)

    def loss(mu: Tensor, u: Tensor) -> Tensor:
        x = (mu + u * Z)[:, None]
        m, v = float(mu), float(u) ** 2
        x_t = (A * x + S * E[:, None]).detach()
        real, q = two_modes(x_t)
        p = log_density(x_t, A * m, A * A * v + S * S)
        fake = gaussian_clean(x_t, A, S, m, v)
        t = torch.full((len(x),), S, dtype=torch.float64)
        r = (q - p).exp()[:, 0]
        seen = Seen(x.detach(), x.detach(), None, t, plain(A, S), x_t, fake, real, r)
        return (W * (x * made.direction(seen))[:, 0]).sum()

    return descend(loss, (1.0, 1.0), 0.03, 500)


def reverse_kl(mu: Tensor, u: Tensor) -> Tensor:
    """KL(p_t || q_t) [M] of students [M], by quadrature."""
    z, w = hermite(60)
    std = (A * A * u * u + S * S).sqrt()[:, None]
    x_t = A * mu[:, None] + std * z
    p = -0.5 * (z**2 + math.log(2 * math.pi)) - std.log()
    return (w * (p - two_modes(x_t)[1])).sum(dim=1)


def test_the_reverse_kl_rests_at_its_least_and_the_forward_kl_matches_moments() -> None:
    """The one stays in a part of the modes, the other spreads over both."""
    mu, u = fitted("reverse_kl")
    grid = torch.linspace(-0.05, 0.05, 41, dtype=torch.float64)
    near = torch.cartesian_prod(mu + grid, u + grid)
    best = near[reverse_kl(near[:, 0], near[:, 1]).argmin()]
    assert (mu, u) == pytest.approx(best.tolist(), abs=5e-3)
    assert fitted("forward_kl") == pytest.approx((0, math.hypot(1.5, NARROW)), abs=0.01)
    assert u < math.hypot(1.5, NARROW) - 0.1


# f-distill -----------------------------------------------------------------------------------

ROWS = {  # bench A: the divergence's gradient, and its weight at a ratio of 1
    "reverse_kl": ((-0.133185, -0.132246), 1.0),
    "forward_kl": ((-0.169252, -0.199570), 1.0),
    "chi_square": ((-0.517012, -0.777371), 2.0),
    "jensen_shannon": ((-0.036158, -0.038188), 0.25),
}


@pytest.mark.parametrize("divergence", ROWS)
def test_f_distill_s_direction_is_the_gradient_of_its_divergence(divergence) -> None:
    """With the exact ratio; the weight is divided by that at 1."""
    keys = {"least_ratio": 1e-9, "greatest_ratio": 1e9, "weights": ["kl"]}
    made = make("f_distill", mlp_teacher(), divergence=divergence, adversary=STATE, **keys)
    expected, at_one = ROWS[divergence]
    got = slopes(at_one * made.direction(bench(0.2, 1.1)))
    assert got == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("teacher", [mlp_teacher, dit_teacher])
def test_f_distill_by_the_reverse_kl_is_dmd2_to_the_bit(teacher) -> None:
    made = [
        make("dmd2", teacher(), batch_size=4),
        make("f_distill", teacher(), batch_size=4, divergence="reverse_kl"),
        make("f_distill", teacher(), batch_size=4),
    ]
    for one in made:
        run(one, 0, 4)
    same(saved(made[0])[0], saved(made[1])[0])
    with pytest.raises(AssertionError):
        same(saved(made[0])[0], saved(made[2])[0])


def test_f_distill_clips_the_ratio() -> None:
    made = make("f_distill", mlp_teacher(), divergence="forward_kl", adversary=STATE)
    seen = bench(0.2, 1.1)
    many = Seen(**{**vars(seen), "ratio": torch.full_like(seen.t, 1e4)})
    few = Seen(**{**vars(seen), "ratio": torch.full_like(seen.t, 1e-4)})
    one = Seen(**{**vars(seen), "ratio": torch.ones_like(seen.t)})
    torch.testing.assert_close(made.direction(many), 20 * made.direction(one))
    torch.testing.assert_close(made.direction(few), 0.1 * made.direction(one))


def test_before_its_head_takes_part_f_distill_is_dmd() -> None:
    late = make("f_distill", mlp_teacher(), critic_steps=1, adversary={**STATE, "from_step": 3})
    dmd = make("dmd", mlp_teacher())
    for made in (late, dmd):
        run(made, 0, 3)
    assert torch.equal(
        saved(late)[0]["student"]["net.leave.weight"], saved(dmd)[0]["student"]["net.leave.weight"]
    )


@pytest.mark.parametrize(
    ("adversary", "message"),
    [(None, "^adversary: f_distill takes the density ratio"), ({"loss": "hinge"}, "loss=hinge: ")],
)
def test_f_distill_refuses_what_tells_no_ratio(adversary, message) -> None:
    with pytest.raises(UserError, match=message):
        make("f_distill", mlp_teacher(), adversary=adversary)


# SwiftBrush and SNOOPI -----------------------------------------------------------------------


def test_swiftbrush_s_weight_is_vsd_s() -> None:
    """x - sigma^2 (eps_T - eps_F) is where VSD's target lies."""
    seen = bench(0.2, 1.1)
    eps = [(seen.x_t - A * clean) / S for clean in (seen.fake, seen.real)]
    direction = make("swiftbrush", mlp_teacher()).direction(seen)
    torch.testing.assert_close(direction, S**2 * (eps[1] - eps[0]))
    torch.testing.assert_close(direction, Vsd()(seen) * (seen.fake - seen.real))


def directions(**keys: Any) -> list[Tensor]:
    """The student's gradients after two common steps."""
    made = make("swiftbrush", mlp_teacher(), guidance=2.0)
    run(made, 0, 2)
    other = make("swiftbrush", mlp_teacher(), **keys)
    other.load_state(2, *saved(made))
    return turn_gradients(other, 2)[0]


def spread(scale: float) -> dict[str, Any]:
    """A guide whose scale is always the same."""
    return {"guide": {"kind": "spread", "low": scale, "high": scale}}


def test_snoopi_with_one_scale_is_swiftbrush_to_the_bit() -> None:
    for a, b in zip(directions(guidance=3.0), directions(**spread(3.0)), strict=True):
        assert torch.equal(a, b)


def test_snoopi_s_gradient_is_affine_in_the_scale() -> None:
    """So its mean is that of the mean scale; at 1 there is no guidance at all."""
    bare, one, two, three = (
        directions(guidance=1.0),
        *(directions(**spread(scale)) for scale in (1.0, 2.0, 3.0)),
    )
    for zero, a, b, c in zip(bare, one, two, three, strict=True):
        torch.testing.assert_close(a, zero, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close((a + c) / 2, b, rtol=1e-4, atol=1e-6)
    assert any(float((a - b).abs().max()) > 1e-4 for a, b in zip(one, three, strict=True))


def test_swiftbrush_guided_by_the_teacher_alone_is_dmd_in_other_weights() -> None:
    keys = {"weights": ["mean_abs"], "guide": "teacher", "guidance": 2.0}
    keys["critic_t"] = {"kind": "logit_normal"}
    pair = [make(name, mlp_teacher(), **keys) for name in ("swiftbrush", "dmd")]
    for made in pair:
        run(made, 0, 4)
    same(*(saved(made)[0] for made in pair))
    assert pair[0].fixed_point.guided
    assert not make("swiftbrush", mlp_teacher()).fixed_point.guided


def test_the_guided_fake_score_loses_labels_at_times() -> None:
    made = make("swiftbrush", mlp_teacher(), guidance=2.0, batch_size=2000)
    label = made.dropped(batch_of(made, 0), Rng(0)).label
    assert 0.07 < float((label == made.teacher.null_label).double().mean()) < 0.13


def test_snoopi_is_a_config_of_swiftbrush() -> None:
    """SNOOPI's PG-SB: a scale from U(0.5, 4) for every sample anew, the same for both."""
    cls, config = read_config("snoopi-digits")
    assert config.method == "swiftbrush" and config.guide == Spread(low=0.5, high=4.0)
    made = make("swiftbrush", mlp_teacher(), guide=config.guide)
    assert not made.fixed_point.guided
    batch, scales = made.batch(0), []
    for step in range(200):
        draw = partial(Rng(0).at(step).uniform, "guide", batch.index)
        teacher, fake = config.guide.scales(config.guidance, draw)
        assert torch.equal(teacher, fake)
        scales.append(teacher)
    drawn = torch.cat(scales)
    assert 0.5 <= float(drawn.min()) < 0.6 and 3.9 < float(drawn.max()) <= 4
    assert float(drawn.mean()) == pytest.approx(2.25, abs=0.1)
    assert drawn.unique().numel() > 0.99 * drawn.numel()
