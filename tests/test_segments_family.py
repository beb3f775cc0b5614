"""Solvers of the teacher, and the methods made of segments: SCott, TLCM, Hyper-SD, DCM, Flash-WAM.

Numbers are those of a Gaussian's closed forms: of a state at t, of data with the standard deviation
s, rho^2 = alpha^2 s^2 + sigma^2 and phi = atan2(sigma, alpha s).
"""

from __future__ import annotations

import math

import pytest
import torch

from stepdistill.diffusion.cond import Cond
from stepdistill.diffusion.process import EDM, RF, Process, Trig
from stepdistill.diffusion.sampler import full
from stepdistill.oracles.denoiser import Oracle
from stepdistill.run.config import digest
from stepdistill.run.rng import Rng
from stepdistill.trainers.find import trainer
from stepdistill.trainers.solvers import Asked, Dpm, Euler, Heun, Sde, Walk
from tests.helpers import batch_of, make, mlp_teacher

STD = 0.5


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
