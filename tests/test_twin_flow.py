"""TwinFlow: targets in closed form, its four kinds of steps, and the two fields."""

from __future__ import annotations

import pytest
import torch

from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.process import RF
from stepdistill.losses.twin_flow import barron_weighted, recursive_target, span_weight
from stepdistill.oracles.denoiser import Oracle
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.trajectory.twin_flow import PARTS
from tests.helpers import batch_of, dit_teacher, make, mlp_teacher, processes, run, same, saved


def average(s: torch.Tensor, r: torch.Tensor, std: float) -> torch.Tensor:
    """u*(y, s, r) / y of data N(0, std^2): (1 - rho_r / rho_s) / (s - r)."""

    def rho(at: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(((1 - at) * std) ** 2 + at**2)

    return (1 - rho(r) / rho(s)) / (s - r)


def test_twin_flow_rests_where_the_flow_goes_to_first_order_of_its_short_step() -> None:
    """At u* the residual of the recursion is O(d): half of it for half the step."""
    s, r, std = torch.tensor([[1.0], [0.7]]), torch.tensor([[0.0], [0.2]]), 0.5
    y, gaps = torch.ones(2, 1), []
    v = (s - (1 - s) * std**2) / ((1 - s) ** 2 * std**2 + s**2)  # z - x of the exact denoiser
    for short in (0.02, 0.01):
        d = torch.full_like(s, short)
        after = y - d * v
        rest = (s - d - r) * average(s - d, r, std) * after
        u = average(s, r, std) * y
        gaps.append((u - recursive_target(u, v, rest, s - r, d, 1.0)).abs())
    assert torch.allclose(gaps[1] / gaps[0], torch.full((2, 1), 0.5), atol=0.05)
    assert float(gaps[1].max()) < 0.01


def test_residuals_are_bounded_entry_by_entry() -> None:
    u, v, d = torch.tensor([[5.0, 0.0]]), torch.zeros(1, 2), torch.full((1, 1), 0.01)
    target = recursive_target(u, v, torch.zeros(1, 2), torch.ones(1, 1), d, 1.0)
    assert target.tolist() == [[4.0, 0.0]]


def test_weights_are_the_published_ones() -> None:
    assert span_weight(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([4.0777, 1.0], abs=1e-3)
    e = torch.tensor([0.3], requires_grad=True)
    loss = barron_weighted(e.square(), 1e-3)
    assert float(loss) == pytest.approx(0.3, abs=1e-4)
    loss.backward()
    assert float(e.grad) == pytest.approx(2.0, abs=1e-4)


@pytest.mark.parametrize("std", [0.4, 1.5])
def test_the_two_fields_move_a_student_of_another_spread_towards_the_data_s(std) -> None:
    """With the exact fields of N(0, std^2) and N(0, 1), an image goes outwards if std < 1."""
    made = make("twin_flow", mlp_teacher(), batch_size=256)
    fields = {v: Oracle(RF(), "velocity", torch.zeros(1, 4), v) for v in (std, 1.0)}

    def told(x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> object:
        return fields[std if cond.twin.any() else 1.0](x_t, t, Cond())

    made.denoiser = lambda name: told
    batch, rng = made.batch(0), Rng(0).at(0)
    x = std * torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    u = torch.zeros(256, 4, requires_grad=True)
    made.pull(u, x, batch, rng).backward()
    moved = (u.grad * x).sum()  # a step downhill takes u by -grad, and the image by +grad
    assert float(moved) > 0 if std < 1 else float(moved) < 0


@pytest.mark.parametrize("name", processes())
def test_four_neighbours_have_the_four_kinds_of_steps(name) -> None:
    teacher = mlp_teacher()
    teacher.process = processes()[name]
    made = make("twin_flow", teacher, batch_size=64)
    top, firsts = float(made.process.flow_time(torch.tensor(made.top))), set()
    for step in range(6):
        kind, s, r = made.times(batch_of(made, step), Rng(0).at(step))
        firsts.add(int(kind[0]))
        assert sorted(kind[:4].tolist()) == [0, 1, 2, 3] and kind.equal(kind[:4].repeat(16))
        whole, short, some, own = (kind == place for place in range(4))
        assert s[whole].tolist() == pytest.approx([top] * 16) and not r[whole].any()
        assert (r[short] >= 0.95 * s[short]).all() and (r[short] <= s[short]).all()
        assert (r[some] <= s[some]).all() and r[own].equal(s[own])
        for times in (s, r):
            told = made.process.flow_time(made.placed(times))
            assert torch.allclose(told, times, atol=2e-5), float((told - times).abs().max())
    assert len(firsts) > 1


def test_whose_image_it_is_is_told_and_at_first_not_heeded() -> None:
    made = make("twin_flow", mlp_teacher())
    batch, student = batch_of(made, 0), made.denoiser("student")
    x_t, t = batch.x, torch.full((8,), 0.5)
    plain = Cond(batch.cond.label, t)
    twin = Cond(batch.cond.label, t, torch.ones(8))
    with torch.no_grad():
        assert student(x_t, t, plain).h.equal(made.teacher(x_t, t, batch.cond).h)
        assert student(x_t, t, twin).h.equal(student(x_t, t, plain).h)
    run(made, 0, 3)
    with torch.no_grad():
        assert not student(x_t, t, twin).h.equal(student(x_t, t, plain).h)


def test_own_images_learn_their_straight_paths_and_others_the_recursion() -> None:
    """Only a quarter's target is made of the student's images: its loss alone sees them."""
    made = make("twin_flow", mlp_teacher(), batch_size=8, rectify=0.0)
    before, batch, rng = made.images_of_its_own, batch_of(made, 0), Rng(0).at(0)
    made.denoiser("student").requires_grad_(False)
    found = []
    for scale in (1.0, 3.0):
        made.images_of_its_own = lambda b, g, k=scale: k * before(b, g)
        seen = []
        student = made.denoiser("student")
        handle = student.register_forward_pre_hook(
            lambda den, args, out=seen: out.append(args[0].clone())
        )
        made.loss(batch, rng)
        handle.remove()
        found.append(seen[1])  # after the pass that makes the images
    differs = (found[0] != found[1]).any(dim=1)
    assert differs.equal(made.times(batch, rng)[0] == 3)


def test_without_images_the_teacher_alone_is_asked() -> None:
    made = make("twin_flow", mlp_teacher(), images=False)
    assert made.needs == "labels"
    run(made, 0, 2)
    with pytest.raises(UserError, match="velocity=teacher"):
        make("twin_flow", mlp_teacher(), images=False, velocity="data")


def test_without_a_teacher_nothing_is_guided() -> None:
    with pytest.raises(UserError, match="method=mean_flow, which guides itself"):
        make("twin_flow", mlp_teacher(), velocity="data", guidance=2.0)


def test_twin_flow_goes_on_bit_for_bit_on_images_after_a_resume() -> None:
    made, again, third = (make("twin_flow", dit_teacher(), steps=6) for _ in range(3))
    run(made, 0, 4)
    run(again, 0, 2)
    third.load_state(2, *saved(again))
    run(third, 2, 4)
    same(made.state(), third.state())


@pytest.mark.parametrize("world", [1, 2])
def test_own_images_are_made_for_the_samples_of_that_kind_alone(world) -> None:
    """Of batches that the kinds do not divide too; others keep their images."""
    for rank in range(world):
        made = make("twin_flow", mlp_teacher(), batch_size=10, rank=rank, world=world)
        for step in range(4):
            rng, batch = Rng(0).at(step), batch_of(made, step)
            kind = made.times(batch, rng)[0]
            own = kind == PARTS - 1
            for place in range(PARTS):
                assert (
                    batch.index[made.rows(place, rng)].tolist()
                    == batch.index[kind == place].tolist()
                )
            x = made.images(batch, rng)
            assert torch.equal(x[~own], batch.x[~own])
            whole = made.images_of_its_own(batch, rng)
            torch.testing.assert_close(x[own], whole[own])
