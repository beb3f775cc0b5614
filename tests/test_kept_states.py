"""States of the teacher's walk that are kept with pairs, and students that learn at them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stepdistill.data.pairs.folder import open_folder
from stepdistill.data.pairs.make import make_pairs, read_manifest
from stepdistill.data.pairs.merge import verify
from stepdistill.data.pairs.plan import PairPlan
from stepdistill.data.pairs.store import PairStore
from stepdistill.diffusion.process import RF
from stepdistill.diffusion.sampler import first_state
from stepdistill.diffusion.timesteps import uniform_grid
from stepdistill.oracles.denoiser import Oracle
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.flow.kd import KDConfig
from stepdistill.trainers.pair_walk import OnlinePairs, PairWalk, plan_of
from tests.helpers import make, mlp_teacher, processes
from tests.test_pair_walks import MEAN, SHAPE, STD, carried, gaussian

INDEX = torch.arange(16)


def config(count: int = 4, **pairs) -> KDConfig:
    keys = {"num": 48, "steps": 16, "shard": 16, "batch_size": 16, **pairs}
    settings = {"method": "kd", "run": "unused", "teacher": "toy", "steps": 4, "pairs": keys}
    return KDConfig(**settings, student_steps=count, states="walk")


def walk(teacher, c: KDConfig) -> PairWalk:
    return PairWalk(c, teacher, plan_of(c, teacher))


@pytest.mark.parametrize("name", ["rf", "vp", "edm", "trig"])
@pytest.mark.parametrize("solver", [None, "heun", "dpm"])
def test_kept_states_are_the_flow_s_at_the_student_s_times(name, solver) -> None:
    teacher = gaussian(processes()[name])
    pairs = walk(teacher, config(4, steps=256, solver=solver))(INDEX)
    assert pairs.x.shape == (16, 4, *SHAPE)
    z = first_state(teacher.process, pairs.z, teacher.process.t_max)
    for place, t in enumerate(uniform_grid(teacher.process, 4)[1:], 1):
        exact = carried(teacher, z, end=t)
        error = (pairs.x[:, place % 4] - exact).square().mean().sqrt()
        assert error < 0.04 * exact.std()  # the solver's own


def test_without_kept_states_images_are_the_same() -> None:
    """The walk passes by the student's times where it begins as the walk does."""
    teacher, c = gaussian(), config(4)
    plain = c.model_copy(update={"states": None})
    with_states, without = (
        walk(teacher, c)(INDEX),
        PairWalk(plain, teacher, plan_of(plain, teacher)),
    )
    assert torch.allclose(with_states.x[:, 0], without(INDEX).x, atol=1e-5)


def test_a_store_of_states_is_made_by_any_worker_read_back_and_checked(tmp_path) -> None:
    teacher, c = gaussian(), config(4, store="fp16")
    made = walk(teacher, c)
    for name, parts in (("whole", 1), ("shared", 3)):
        for k in range(parts):
            told: list[int] = []
            make_pairs(
                open_folder(tmp_path / name),
                made.plan,
                made,
                batch_size=5,
                told=lambda there, own, told=told: told.append(own),
                part=(k, parts),
            )
    files = [
        {file.name: file.read_bytes() for file in Path(tmp_path / name).glob("*.safetensors")}
        for name in ("whole", "shared")
    ]
    assert files[0] == files[1] and len(files[0]) == 3
    folder = open_folder(tmp_path / "whole")
    plan = read_manifest(folder)
    assert plan == made.plan and isinstance(plan, PairPlan) and plan.kept == (0.75, 0.5, 0.25)
    assert not [fault for fault in verify(folder, plan) if fault]
    tensors = sum(len(data) for data in files[0].values())
    assert plan.size() <= tensors <= plan.size() + 3 * 1024
    read = PairStore(tmp_path / "whole", plan).at(INDEX)
    assert torch.equal(read.x, made(INDEX).x.half().float())
    flipped = PairStore(tmp_path / "whole", plan, flip=True).at(INDEX + 48)
    assert torch.equal(flipped.x, read.x.flip(-1)) and torch.equal(flipped.z, read.z.flip(-1))
    online = OnlinePairs(made).batches(range(1), 16, 0, slice(0, 16), torch.device("cpu"))
    assert torch.equal(next(online)[1], read.x)


def test_a_plan_without_states_is_as_it_was() -> None:
    plain = config().model_copy(update={"states": None})
    assert "kept" not in plan_of(plain, gaussian()).facts()
    assert config(1).kept_steps is None


@pytest.mark.parametrize(
    ("count", "pairs", "line"),
    [
        (3, {}, "pairs.steps=16 is no multiple of student_steps=3, .* set pairs.steps=15$"),
        (4, {"store": "uint8"}, "pairs.store=uint8: states between noise and image are no pixels"),
        (4, {"invert": True}, "pairs.invert: states are kept of walks down from noise"),
    ],
)
def test_what_has_no_states_is_refused(count, pairs, line) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        walk(gaussian(), config(count, **pairs))


def test_a_network_that_is_told_ends_keeps_none() -> None:
    teacher = make("flow_map", mlp_teacher()).denoiser("student")
    with pytest.raises(UserError, match="^states=walk: .* set states=null$"):
        walk(teacher, config())


def test_students_learn_at_the_states_that_the_teacher_passed_by(monkeypatch) -> None:
    """The exact map has no loss, at any of its times; a state on a line would have one."""
    teacher = Oracle(RF(), "velocity", torch.zeros(1, *SHAPE) + MEAN, STD)
    made = make("kd", teacher, student_steps=4, states="walk", pairs={"steps": 256}, batch_size=64)
    pairs = walk(teacher, config(4, steps=256, solver="heun"))(torch.arange(64))
    batch = made.batch(0, pairs.x, pairs.label, pairs.z)
    seen = []

    def exact(x_t, t, cond):
        seen.append(t)
        images = torch.stack([carried(teacher, x, float(at)) for x, at in zip(x_t, t, strict=True)])
        return type("Guess", (), {"x": images})

    monkeypatch.setattr(made, "denoiser", lambda name: exact)
    loss = made.loss(batch, Rng(0).at(0)).value
    assert float(loss) < 1e-6 * STD**2
    assert len(set(seen[0].tolist())) == 4
    assert torch.equal(seen[0].unique(), made.levels.sort().values)
    lines = make("kd", teacher, student_steps=4, pairs={"steps": 256}, batch_size=64)
    monkeypatch.setattr(lines, "denoiser", lambda name: exact)
    off = lines.loss(lines.batch(0, pairs.x[:, 0], pairs.label, pairs.z), Rng(0).at(0)).value
    assert float(off) > 1e-3 * STD**2
    assert (made.noise, lines.noise) == ("fresh", "predicted")
