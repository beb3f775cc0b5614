"""Solvers of the teacher, and the methods made of segments: SCott, TLCM, Hyper-SD, DCM, Flash-WAM.

Numbers are those of a Gaussian's closed forms: of a state at t, of data with the standard deviation
s, rho^2 = alpha^2 s^2 + sigma^2 and phi = atan2(sigma, alpha s).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.process import EDM, RF, Process, Trig, expand
from stepdistill.diffusion.sampler import full
from stepdistill.losses.distribution import Renoise
from stepdistill.oracles.denoiser import Oracle
from stepdistill.run.config import digest
from stepdistill.run.rng import Rng
from stepdistill.trainers.find import trainer
from stepdistill.trainers.solvers import Asked, Dpm, Euler, Heun, Sde, Walk
from stepdistill.trainers.trajectory.rival import lifted
from tests.helpers import batch_of, make, mlp_teacher

STD = 0.5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def oracle(process: Process | None = None, std: float = STD, mean: float = 0.0) -> Oracle:
    return Oracle(process or RF(), "velocity", torch.full((1, 1), mean), std)


def radius(process: Process, t: float, std: float = STD) -> float:
    c = process.coefs(torch.tensor([t], dtype=torch.float64))
    return math.hypot(float(c.alpha) * std, float(c.sigma))


@torch.no_grad()
def walked(solver: Walk, process: Process, t: float, r: float) -> float:
    """What the mean of a solver's walk multiplies a state by."""
    x = torch.ones(1, 1)
    return float(solver(Asked(oracle(process), Cond()), x, full(x, t), full(x, r)))


# Solvers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eta", "expected"), [(0.0, 0.70711), (0.5, 0.64842), (1.0, 0.5)])
def test_a_stochastic_walk_shrinks_its_mean_by_a_power_of_the_cosine(eta, expected) -> None:
    """(s / rho) cos(phi)^(eta^2) in many steps; at eta = 1 it is the posterior mean's s^2/rho^2."""
    assert walked(Sde(eta=eta, substeps=4000), EDM(), 0.5, 0.0) == pytest.approx(expected, abs=3e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_stochastic_step_keeps_the_law_of_noise(eta) -> None:
    """From N(alpha x, sigma^2) to the same at r, where the clean estimate is x itself."""
    process, many = RF(), torch.arange(40_000)
    z, e = (Rng(0).normal(name, many, (1,)) for name in "ze")
    teacher = Asked(oracle(process, std=0.0, mean=2.0), Cond())
    t, r = full(z, 0.8), full(z, 0.3)
    x_r = Sde(eta=eta)(teacher, process.noise(torch.full_like(z, 2.0), z, t), t, r, lambda k: e)
    rest = (x_r - 0.7 * 2.0) / 0.3
    assert float(rest.mean()) == pytest.approx(0, abs=0.02)
    assert float(rest.var()) == pytest.approx(1, abs=0.03)
    kept = ((0.3 / 0.7) / (0.8 / 0.2)) ** (eta * eta)
    assert float((rest * z).mean()) == pytest.approx(kept, abs=0.02)


def test_without_noise_of_its_own_a_stochastic_step_is_euler_s() -> None:
    for process in (RF(), EDM(), Trig()):
        t, r = 0.8 * process.t_max, 0.3 * process.t_max
        assert walked(Sde(eta=0.0), process, t, r) == pytest.approx(
            walked(Euler(), process, t, r), rel=1e-6
        )


def test_from_pure_noise_a_stochastic_step_forgets_it() -> None:
    e = torch.tensor([[0.4]])
    got = Sde(eta=0.5)(
        Asked(oracle(mean=1.0), Cond()),
        torch.full((1, 1), 3.0),
        full(e, 1.0),
        full(e, 0.6),
        lambda k: e,
    )
    assert float(got) == pytest.approx(0.4 * 1.0 + 0.6 * 0.4, abs=1e-6)


@pytest.mark.parametrize(("solver", "order"), [(Euler, 1), (Heun, 2), (Dpm, 2)])
def test_substeps_draw_near_the_flow_at_the_solver_s_order(solver, order) -> None:
    process = RF()
    exact = radius(process, 0.5) / radius(process, 0.9)
    errors = [abs(walked(solver(substeps=n), process, 0.9, 0.5) - exact) for n in (16, 32, 64)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert coarse / fine == pytest.approx(2**order, rel=0.2)


@pytest.mark.parametrize("process", [RF(), EDM(), Trig()], ids=["rf", "edm", "trig"])
def test_a_multistep_walk_begins_and_ends_as_euler_s(process) -> None:
    whole = process.t_max
    one = walked(Dpm(substeps=1), process, whole, 0.4 * whole)
    assert one == pytest.approx(walked(Euler(), process, whole, 0.4 * whole), rel=1e-5)
    two = walked(Dpm(substeps=2), process, whole, 0.0)
    assert two == pytest.approx(walked(Euler(substeps=2), process, whole, 0.0), rel=1e-5)


def test_a_solver_s_substeps_are_told_as_passes_and_drawn_from_the_step() -> None:
    keys = {"solver": {"kind": "sde", "eta": 0.5, "substeps": 3}, "metric": "l2", "weight": "one"}
    made = make("consistency", mlp_teacher(), **keys)
    assert made.passes()[0].count == 3
    batch = batch_of(made, 0)
    first, again, other = (
        float(made.loss(batch, Rng(0).at(step)).value.detach()) for step in (0, 0, 1)
    )
    assert first == again != other


def test_a_solver_by_its_name_alone_is_written_so() -> None:
    """So that records of runs by their configs' hashes stay what they are."""
    model = trainer("consistency").Config
    base = {"method": "consistency", "run": "a", "teacher": "b", "steps": 1}
    for name in ("euler", "heun", "data"):
        assert model(**base, solver=name).model_dump(mode="json")["solver"] == name
    assert digest(model(**base)) == digest(model(**base, solver={"kind": "euler", "substeps": 1}))
    two = model(**base, solver={"kind": "euler", "substeps": 2})
    assert two.model_dump(mode="json")["solver"] == {"kind": "euler", "substeps": 2}
    assert model(**two.model_dump(mode="json")).solver == two.solver


# SCott -------------------------------------------------------------------------------------------


class Scaled(Denoiser):
    """A student whose clean estimate is gain(t) x_t."""

    gain: Callable[[float], float]

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """See :meth:`Denoiser.raw`."""
        times, place = t.unique(return_inverse=True)
        return torch.tensor([self.gain(float(one)) for one in times])[place][:, None] * x_t


def scaled(gain: Callable[[float], float], process: Process | None = None) -> Scaled:
    base = oracle(process)
    made = Scaled(base.net, base.process, "x0", adapter=base.adapter)
    made.gain = gain
    return made


def stepped(eta: float, width: float) -> Callable[[float], float]:
    """The gain of theory by even steps to 0 on RF: of each, of its mean in closed form."""

    def gain(t: float) -> float:
        total = 1.0
        for k in range(round(t / width), 0, -1):
            now, then = k * width, (k - 1) * width
            kept = (then * (1 - now) / (now * (1 - then))) ** (eta**2)
            up = (1 - now) * (1 - then) * STD**2 + kept * now * then
            total *= up / radius(RF(), now) ** 2
        return total

    return gain


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_scott_rests_at_the_mean_over_its_solver_s_noise(eta) -> None:
    """Where gain(r) is theory's, the squared distance is least at theory's gain(t) too."""
    made = make(
        "scott",
        oracle(),
        batch_size=40_000,
        start=0.75,
        pairs={"kind": "grid", "steps": 6},
        solver={"kind": "sde", "eta": eta, "substeps": 2},
        metric="l2",
        weight="one",
    )
    theory, losses = stepped(eta, 0.0625), []
    made.target_net = scaled(theory)
    batch = made.batch(0)
    batch = replace(batch, x=STD * Rng(1).normal("x", batch.index, (1,)))
    for factor in (0.9, 1.0, 1.1):
        made.players["student"].denoiser = scaled(lambda t, f=factor: f * theory(t))
        losses.append(float(made.loss(batch, Rng(0).at(0)).value))
    low, middle, high = losses  # a parabola
    assert 1 - 0.05 * (high - low) / (high - 2 * middle + low) == pytest.approx(1, abs=0.01)
    if eta == 1:  # the posterior mean, whatever the steps
        assert theory(0.5) == pytest.approx(0.5 * STD**2 / radius(RF(), 0.5) ** 2)
    assert theory(0.75) < 0.85 * stepped(0.0, 0.0625)(0.75)


def test_scott_s_discriminator_tells_clean_estimates_from_the_data() -> None:
    """Its level is drawn from all times, and the student's part is its weight times its loss."""
    keys = {"adversary": {"student": 0.4}, "metric": "l2", "pairs": {"kind": "grid", "steps": 6}}
    made, plain = make("scott", mlp_teacher(), **keys), make("scott", mlp_teacher(), metric="l2")
    batch, rng = batch_of(made, 0), Rng(0).at(0)
    loss = made.loss(batch, rng)
    with_it, cost = float(loss.value.detach()), float(loss.logs["adversarial"].detach())
    made.rival = None
    assert with_it == pytest.approx(float(made.loss(batch, rng).value.detach()) + cost)
    assert [turn.player for turn in plain.turns(0)] == ["student"]
    made = make("scott", mlp_teacher(), **keys)
    made.loss(batch, rng)
    states, real, further = made.rival.seen
    assert not states.requires_grad and real is batch.x and not further.end.any()


def test_states_are_noised_further_by_the_process_s_own_kernel() -> None:
    """States at end whose law is N(0, sigma^2) become those of a later time, above the end."""
    many, end = torch.arange(20_000), torch.full((20_000,), 0.4)
    for process in (RF(), Trig(1.0)):
        t = lifted(process.t_max * torch.rand(20_000, generator=seeded(0)), end, process)
        assert (t >= end).all() and (t <= process.t_max).all() and t.min() < 0.41
        x = expand(process.coefs(end).sigma, many[:, None]) * Rng(0).normal("z", many, (1,))
        kernel = Renoise(process.coefs(end).expand(x), process.coefs(t).expand(x))
        x_t = kernel.state(x, Rng(0).normal("e", many, (1,)))
        unit = x_t / process.coefs(t).expand(x).sigma
        assert float(unit.var()) == pytest.approx(1, abs=0.03)
    low = torch.zeros(5)
    same = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0])
    torch.testing.assert_close(lifted(same, low, RF()), same)
