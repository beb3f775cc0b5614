"""How a teacher makes pairs: solvers, both directions, mirrored ones, and as a run needs them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.commands.read import read_config
from stepdistill.commands.train import train
from stepdistill.data.digits import open_digits
from stepdistill.data.pairs.folder import open_folder
from stepdistill.data.pairs.make import make_pairs, read_manifest
from stepdistill.data.pairs.merge import verify
from stepdistill.data.pairs.store import PairStore
from stepdistill.data.sets import MemorySet
from stepdistill.diffusion.process import RF, Process
from stepdistill.diffusion.sampler import first_state, full
from stepdistill.oracles.denoiser import Oracle
from stepdistill.run.config import digest, dump
from stepdistill.run.errors import UserError
from stepdistill.trainers.flow.reflow import ReflowConfig
from stepdistill.trainers.pair_walk import (
    FIRST_NOISE,
    OnlinePairs,
    PairWalk,
    check_mirror,
    images_of,
    plan_of,
)
from stepdistill.trainers.settings import PairsConfig
from tests.children import stepdistill
from tests.helpers import mlp_teacher, processes

SHAPE = (1, 4, 4)
MEAN, STD = 0.3, 0.4
INDEX = torch.arange(64)


def gaussian(process: Process | None = None, *, mean: Tensor | float = MEAN) -> Oracle:
    centre = torch.zeros(1, *SHAPE) + mean
    return Oracle(process or RF(), "x0", centre, STD)


def carried(teacher: Oracle, state: Tensor, start: float | None = None, end: float = 0.0) -> Tensor:
    """Where the flow of N(m, s^2) takes a state: it keeps its distance in standard deviations."""
    process = teacher.process
    t = torch.tensor([process.t_max if start is None else start, end], dtype=torch.float64)
    c = process.coefs(t)
    radius = torch.sqrt((c.alpha * STD) ** 2 + c.sigma**2)
    return (c.alpha[1] * MEAN + (state - c.alpha[0] * MEAN) * radius[1] / radius[0]).float()


def config(**pairs) -> ReflowConfig:
    keys = {"num": 64, "steps": 16, "shard": 16, "batch_size": 16, **pairs}
    return ReflowConfig(method="reflow", run="unused", teacher="toy", steps=4, pairs=keys)


def walk(teacher: Oracle, images: MemorySet | None = None, **pairs) -> PairWalk:
    c = config(**pairs)
    return PairWalk(c, teacher, plan_of(c, teacher, images), images)


def pictures(count: int = 64) -> MemorySet:
    """Draws of the Gaussian."""
    noise = torch.randn(count, 4, 4, generator=torch.Generator().manual_seed(0))
    grey = (MEAN + STD * noise + 1) * 32_768
    return MemorySet("pictures", grey, torch.arange(count) % 3, "abc", white=65_536)


# Down from noise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rf", "vp", "edm", "trig"])
@pytest.mark.parametrize("solver", [None, "heun", "dpm"])
def test_images_are_the_flow_s_to_the_order_of_the_solver(name, solver) -> None:
    """Halved steps halve Euler's error, and that of the others more."""
    teacher = gaussian(processes()[name])
    errors = []
    for steps in (64, 128):
        made = walk(teacher, solver=solver, steps=steps)(INDEX)
        exact = carried(teacher, first_state(teacher.process, made.z, teacher.process.t_max))
        errors.append(float((made.x - exact).square().mean().sqrt()) / STD)
    first_order = solver is None or name == "vp"  # whose last step is a long one of Euler's
    assert errors[0] / errors[1] > (1.7 if first_order else 2.5)
    assert errors[1] < (0.04 if first_order else 2e-3)


def test_guidance_and_labels_are_the_store_s() -> None:
    teacher = mlp_teacher()
    plain, guided = (
        PairWalk(c, teacher, plan_of(c, teacher))(INDEX)
        for c in (config(), config().model_copy(update={"guidance": 2.0}))
    )
    assert torch.equal(plain.z, guided.z) and torch.equal(plain.label, guided.label)
    assert set(plain.label.tolist()) == {0, 1, 2}
    assert not torch.allclose(plain.x, guided.x)


def test_euler_by_name_is_the_plan_that_names_none() -> None:
    teacher = gaussian()
    plans = {
        solver: plan_of(config(solver=solver), teacher) for solver in (None, "euler", "heun", "dpm")
    }
    assert plans[None] == plans["euler"]
    assert len({plan.digest() for plan in plans.values()}) == 3
    assert plan_of(config(store="fp32"), teacher) == plans[None]
    one, two = (walk(teacher, solver=solver)(INDEX).x for solver in (None, "euler"))
    assert torch.equal(one, two)


def test_solvers_that_make_no_pairs_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="pairs.solver=sde: draws noise"):
        walk(gaussian(), solver="sde")
    walk(gaussian(), solver={"kind": "sde", "eta": 0})
    with pytest.raises(ValueError, match="takes no substeps: pairs.steps says how many"):
        config(solver={"kind": "heun", "substeps": 2})
    with pytest.raises(ValueError, match="asks no teacher; take euler, heun or dpm"):
        config(solver="data")
    with pytest.raises(UserError, match="pairs.solver=dpm: extrapolates .* take euler or heun"):
        walk(gaussian(), pictures(), solver="dpm", invert=True)


def test_keys_that_are_off_change_no_hash_and_configs_are_read_back(tmp_path) -> None:
    off = config(invert=False, flip=False, online=False)
    assert digest(off) == digest(config())
    for solver in ("dpm", {"kind": "sde", "eta": 0.0}):
        c = config(solver=solver, store="uint8", path="s3://a/b")
        path = tmp_path / "c.yaml"
        path.write_text(dump(c))
        _, again = read_config(str(path))
        assert again == c and digest(again) == digest(c)
    assert PairsConfig(path=Path("a") / "b").path == PairsConfig(path="./a//b/").path == "a/b"
    with pytest.raises(ValueError, match="online pairs are not kept"):
        config(online=True, path="a")
    with pytest.raises(ValueError, match="must not be negative, nor all be 0"):
        config(shares=[0.0, 0.0])


# Up from images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rf", "vp", "edm", "trig"])
@pytest.mark.parametrize("solver", [None, "heun"])
def test_noise_of_images_is_the_flow_s(name, solver) -> None:
    images, process = pictures(), processes()[name]
    teacher = gaussian(process)
    one = walk(teacher, images, solver=solver, steps=128, invert=True)
    made = one(INDEX)
    assert torch.equal(made.x, images.load(INDEX.tolist())[0])
    assert torch.equal(made.label, INDEX % 3)
    low = float(process.time_of_flow(torch.tensor(FIRST_NOISE, dtype=torch.float64)))
    first = process.noise(made.x, one.plan.noise(INDEX), full(made.x, low))
    top = carried(teacher, first, low, process.t_max)
    exact = top / process.coefs(torch.tensor(process.t_max)).sigma
    error = float((made.z - exact).square().mean().sqrt())
    assert error < (0.03 if solver is None else 1e-3)
    back = one.image(made.z, one.cond(made.label))
    assert float((back - made.x).square().mean().sqrt()) / STD < (
        0.1 if solver is None or name == "vp" else 0.005
    )


def test_an_inverted_store_is_made_read_and_checked(tmp_path) -> None:
    images = pictures()
    one = walk(gaussian(), images, invert=True, store="fp16", num=40)
    folder = open_folder(tmp_path)
    make_pairs(folder, one.plan, one, batch_size=16, told=lambda *counts: None)
    assert read_manifest(folder) == one.plan and one.plan.images
    assert list(verify(folder, one.plan)) == [None] * 3
    read, made = PairStore(tmp_path, one.plan).at(torch.arange(40)), one(torch.arange(40))
    assert torch.equal(read.label, made.label)
    for name in "xz":
        torch.testing.assert_close(getattr(read, name), getattr(made, name), atol=2e-3, rtol=1e-3)
    shards = sorted(tmp_path.glob("pairs-*"))
    assert set(load_file(shards[0])) == {"x", "z", "label"}


def test_the_plan_knows_the_images() -> None:
    teacher, images = gaussian(), pictures()
    plans = [plan_of(config(), teacher, one) for one in (images, pictures(63), pictures())]
    assert plans[0] == plans[2] != plans[1]
    changed = pictures()
    changed._pixels[7, 0, 0, 0] += 1
    assert plan_of(config(), teacher, changed) != plans[0]


def test_more_pairs_than_images_are_refused() -> None:
    with pytest.raises(UserError, match="pairs.num=1798: data.source=digits has 1797 images"):
        images_of(config(invert=True, num=1798))
    assert len(images_of(config(invert=True, num=1797))) == len(open_digits())
    assert images_of(config()) is None


# Mirrored -----------------------------------------------------------------------------------------


def test_a_symmetric_teacher_passes_the_check_of_mirrored_pairs() -> None:
    half = torch.linspace(-1, 1, 16).reshape(SHAPE)
    means, shares = torch.stack([half, half.flip(-1)]), torch.full((1, 2), 0.5).log()
    both = Oracle(RF(), "x0", means, 0.3, log_weights=shares)
    for teacher in (gaussian(), both):
        check_mirror(walk(teacher, flip=True), 64)


@pytest.mark.parametrize("solver", [None, "heun"])
def test_a_slightly_lopsided_teacher_is_refused(solver) -> None:
    mean = torch.tensor([0.06, 0.0, 0.0, -0.06])
    with pytest.raises(UserError, match=r"pairs.flip: of mirrored .* differ by 0.\d+ of the im"):
        check_mirror(walk(gaussian(mean=mean), solver=solver), 64)
    check_mirror(walk(gaussian(mean=mean / 10), solver=solver), 64)


def test_what_is_no_image_is_not_mirrored() -> None:
    teacher = mlp_teacher()
    c = config(flip=True)
    with pytest.raises(UserError, match=r"samples of the shape \[4\] are no images \[C, H, W\]"):
        check_mirror(PairWalk(c, teacher, plan_of(c, teacher)), 16)


def test_the_digits_teacher_is_refused(tmp_path) -> None:
    for command in ("pairs", "train"):
        args = [command, "reflow-digits", "run=r", "pairs.flip=true", "pairs.steps=4"]
        done = stepdistill(*args, folder=tmp_path)
        assert done.code == 2
        last = done.err.splitlines()[-1]
        assert (
            last.startswith("stepdistill: pairs.flip: of mirrored noise") and "pairs.flip=f" in last
        )
        assert not (tmp_path / "r" / "pairs").exists()


# As they are needed -------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [None, "uint8"])
def test_online_pairs_are_the_store_s_in_order(tmp_path, kept) -> None:
    one = walk(gaussian(mean=0.0), store=kept)
    make_pairs(open_folder(tmp_path), one.plan, one, batch_size=8, told=lambda *counts: None)
    store = PairStore(tmp_path, one.plan)
    cpu = torch.device("cpu")
    online = OnlinePairs(one).batches(range(2, 8), 8, 5, slice(4, 8), cpu)
    for step, (z, x, label) in enumerate(online, 2):
        kept_pairs = store.at(torch.arange(8 * step + 4, 8 * step + 8))
        assert torch.equal(z, kept_pairs.z) and torch.equal(label, kept_pairs.label)
        torch.testing.assert_close(x, kept_pairs.x, atol=1e-5 if kept is None else 0.01, rtol=0)


def test_online_mirrors_some_and_inverts_images_again(tmp_path) -> None:
    images, cpu = pictures(), torch.device("cpu")
    one = walk(gaussian(), images, invert=True, num=64)
    plain, mirrored = (
        next(iter(OnlinePairs(one, flip=flip).batches(range(9, 10), 64, 0, slice(0, 64), cpu)))
        for flip in (False, True)
    )
    assert torch.equal(plain[1], images.load(range(64))[0])  # the tenth round of all of them
    turned = (plain[1] != mirrored[1]).flatten(1).any(dim=1)
    assert 16 < int(turned.sum()) < 48
    for k in (0, 1):
        assert torch.equal(mirrored[k][turned], plain[k][turned].flip(-1))
        assert torch.equal(mirrored[k][~turned], plain[k][~turned])


def test_a_run_online_ends_as_one_on_a_store_in_order(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = ["steps=4", "batch_size=8", "eval.every_steps=0", "sample.every_steps=0"]
    keys += ["pairs.steps=2", "pairs.batch_size=8", "pairs.num=32", "log.tensorboard=false"]
    train("reflow-digits", [*keys, "run=online", "pairs.online=true"])
    assert not Path("online/pairs").exists()
    monkeypatch.setattr(
        PairStore,
        "positions",
        lambda self, step, size, seed: np.arange(step * size, (step + 1) * size),
    )
    train("reflow-digits", [*keys, "run=kept"])
    ends = [
        load_file(next(Path(run, "student").glob("*.safetensors"))) for run in ("online", "kept")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_no_store_is_made_of_online_pairs(tmp_path) -> None:
    done = stepdistill("pairs", "reflow-digits", "run=r", "pairs.online=true", folder=tmp_path)
    assert done.code == 2 and "pairs.online=true makes each step's pairs in its run" in done.err


def test_an_image_that_is_not_finite_stops_online_pairs() -> None:
    one = walk(gaussian())
    bad = replace(one(INDEX), x=torch.full((8, *SHAPE), math.nan))
    broken = OnlinePairs(one)
    broken.walk = type("Broken", (), {"plan": one.plan, "__call__": lambda self, index: bad})()
    with pytest.raises(UserError, match="pairs: image 8 is not finite"):
        next(iter(broken.batches(range(1, 2), 8, 0, slice(0, 8), torch.device("cpu"))))
