"""Multi-student distillation: who owns which classes, in training, sampler and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.commands.export import export, literal_rows, members
from stepdistill.commands.train import train
from stepdistill.diffusion.denoiser import Denoiser, Routed
from stepdistill.diffusion.process import RF
from stepdistill.diffusion.sampler import full, sample
from stepdistill.oracles.denoiser import Oracle
from stepdistill.oracles.mixture import Mixture
from stepdistill.pipelines.image import ImagePipeline
from stepdistill.pipelines.literal_grid import LiteralGridScheduler
from stepdistill.run.errors import UserError
from stepdistill.run.player import Player
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from tests.helpers import Affine, AffineAdapter, dit_teacher, make, mlp_teacher, run, same, saved
from tests.recipes import command

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = {
    "type": "DiTTransformer2DModel",
    "config": {
        "num_attention_heads": 1,
        "attention_head_dim": 8,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 1,
        "sample_size": 8,
        "patch_size": 4,
        "num_embeds_ada_norm": 3,
        "norm_num_groups": 1,
    },
    "steps": 2,
    "walk": 2,
}


@pytest.mark.parametrize("more", [{}, {"student_steps": 2, "guidance": 2.0, "critic_steps": 2}])
def test_one_student_is_dmd2_without_its_head_to_the_bit(more) -> None:
    alone = make("msd", mlp_teacher(), students=1, **more)
    dmd2 = make("dmd2", mlp_teacher(), adversary=None, **more)
    for made in (alone, dmd2):
        run(made, 0, 4)
    same(saved(alone)[0], saved(dmd2)[0])
    assert alone.passes() == dmd2.passes()
    assert alone.best() is alone.players["student"].ema


def test_a_step_trains_one_student_and_its_fake_score_on_its_own_classes() -> None:
    made = make("msd", mlp_teacher(), students=2, parts=[["b"], [0, "c"]], batch_size=64)
    seen = []
    for step in range(4):
        before = saved(made)[0]
        batch = made.batch(step)
        run(made, step, step + 1)
        after = saved(made)[0]
        moved = {
            name
            for name in after
            if not torch.equal(after[name]["net.leave.weight"], before[name]["net.leave.weight"])
        }
        # at a student's first step its fake score is the teacher: there is no gradient yet
        seen.append((moved, set(batch.cond.label.tolist())))
    assert [labels for _, labels in seen] == [{1}, {0, 2}] * 2
    assert [sorted(names) for names, _ in seen[2:]] == [
        ["critic", "student"],
        ["critic_2", "student_2"],
    ]
    assert made.held() == {"teacher": 1, "student": 2, "critic": 2, "average": 2}
    assert [player.total for player in made.players.values()] == [3, 15, 3, 15]


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({}, ((0, 1), (2,))),
        ({"students": 3}, ((0,), (1,), (2,))),
        ({"students": 1}, ((0, 1, 2),)),
        ({"parts": [["c", "a"], ["1"]]}, ((2, 0), (1,))),
    ],
)
def test_parts_of_the_classes(keys, parts) -> None:
    made = make("msd", mlp_teacher(), **keys)
    assert made.parts == parts
    assert all(label in parts[place] for label, place in enumerate(made.routes))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"students": 4}, "students=4 share 3 classes"),
        ({"parts": [["a", "b", "c"]]}, "parts: students=2 need as many lists"),
        ({"parts": [["a", "b", "c"], []]}, "parts: students=2 need as many lists"),
        ({"parts": [["a", "b"], ["b", "c"]]}, "parts: class b must be in one part, and is in 2"),
        ({"parts": [["a"], ["b"]]}, "parts: class c must be in one part, and is in 0"),
        ({"parts": [["a"], ["b", "cc"]]}, "parts: the teacher has no class cc; did you mean c"),
        ({"parts": [["a"], ["b", 7]]}, "parts: the teacher has no class 7; there are a, b, c"),
        ({"adversary": {"features": "state", "head": "mlp"}}, "adversary: msd has none"),
        ({"network": {**SMALL, "steps": 6}}, "network.steps=6 leaves one of 2 students none of"),
        ({"network": SMALL}, r"network.config: it makes samples \(1, 8, 8\)"),
        ({"network": SMALL, "critic_follows": 0.1}, "critic_follows: smaller students"),
        ({"network": SMALL, "lora": {}}, "lora.players: a smaller student starts anew"),
        ({"network": {**SMALL, "type": "Nothing"}}, "network.type: diffusers has no class Nothing"),
    ],
)
def test_what_does_not_share_the_classes_out_is_refused(keys, message) -> None:
    with pytest.raises(UserError, match=message):
        make("msd", mlp_teacher(), **keys)


def test_a_teacher_without_classes_is_refused() -> None:
    teacher = mlp_teacher()
    teacher.classes = ()
    with pytest.raises(UserError, match="this teacher has none"):
        make("msd", teacher)


# Sampling -----------------------------------------------------------------------------------------


def trained(teacher: Denoiser, **keys: Any) -> Trainer:
    """After a few steps, in which the students come apart."""
    optim = {"lr": 0.02}
    made = make("msd", teacher, optim=optim, critic=optim, ema={"decay": 0.0}, **keys)
    run(made, 0, 6)
    return made


def test_every_row_of_a_mixed_batch_is_its_owner_s() -> None:
    made = trained(mlp_teacher(), parts=[["b"], ["a", "c"]])
    best, label = made.best(), torch.tensor([0, 1, 2, 1, 0])
    assert isinstance(best, Routed) and best.routes == (1, 0, 1)
    z = made.z(made.batch(0), Rng(0))[:5]
    with torch.no_grad():
        x = sample(best, z, (1.0, 0.0), Cond(label))
        for row, place in enumerate([1, 0, 1, 0, 1]):
            one = label[row : row + 1]
            alone = sample(best.experts[place], z[row : row + 1], (1.0, 0.0), Cond(one))
            other = sample(best.experts[1 - place], z[row : row + 1], (1.0, 0.0), Cond(one))
            torch.testing.assert_close(x[row : row + 1], alone)
            assert (x[row : row + 1] - other).abs().max() > 1e-3
    for cond in (Cond(None), Cond(torch.full((5,), 3))):
        with pytest.raises(ValueError, match="no sample without one"):
            best(z, full(z, 1.0), cond)


def test_students_may_be_adapters_on_one_network() -> None:
    """Which a mixed batch switches between."""
    made = trained(dit_teacher(), batch_size=4, lora={"rank": 2})
    assert made.adapters() == {"student": 2, "critic": 2, "average": 2}
    assert made.held() == {"teacher": 1}
    best, label = made.best(), torch.tensor([0, 2, 1])
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = best(z, full(z, 1.0), Cond(label)).x
        for row, place in enumerate([0, 1, 0]):
            one = Cond(label[row : row + 1])
            alone, other = (
                made.students()[k].best(z[row : row + 1], full(z[:1], 1.0), one).x
                for k in (place, 1 - place)
            )
            torch.testing.assert_close(x[row : row + 1], alone)
            assert (alone - other).abs().max() > 1e-3


def pipeline(made: Trainer) -> Any:
    """The pipeline of a trainer's students."""
    best, grids = made.best(), made.grids()
    rows = {str(n): literal_rows(best, grid) for n, grid in grids.items()}
    nets = [den.net for den in members(best)]
    pipe = ImagePipeline(
        model=nets[0],
        model_2=nets[1],
        scheduler=LiteralGridScheduler(rows, noise=made.noise, default_steps=max(grids)),
        classes=made.teacher.classes,
        default_steps=max(grids),
        null_label=made.teacher.null_label,
        routes={str(label): place for label, place in enumerate(best.routes)},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("more", [{}, {"student_steps": 2, "noise": "predicted"}])
def test_the_pipeline_draws_every_label_with_its_own_student(more) -> None:
    """As the trainer's sampler to 1e-5, mixed labels in one call and by name."""
    made = trained(dit_teacher(), parts=[["c"], ["a", "b"]], batch_size=4, **more)
    pipe, labels = pipeline(made), [2, 0, 1, 2, 0]
    z = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = made.draw(z, Cond(torch.tensor(labels)), max(made.sizes), Rng(0), torch.arange(5))
    got = pipe(["c", "a", "b", "c", "a"], latents=z, output_type="pt").images
    assert (got - (expected / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5
    keys = {"classes": ["a", "b", "c"], "default_steps": max(made.sizes)}
    by_one = ImagePipeline(model=pipe.model, scheduler=pipe.scheduler, **keys)
    by_one.set_progress_bar_config(disable=True)
    assert (by_one(labels, latents=z, output_type="pt").images - got).abs().max() > 1e-3
    with pytest.raises(ValueError, match="class label 3 is out of range"):
        pipe([3])


def test_guidance_asks_each_label_s_student_for_both_halves() -> None:
    made = trained(dit_teacher(), parts=[["c"], ["a", "b"]], batch_size=4)
    pipe = pipeline(made)
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed = pipe([2, 0], latents=z, guidance_scale=2.0, output_type="pt").images
    for row, label in enumerate([2, 0]):
        one = pipe([label], latents=z[row : row + 1], guidance_scale=2.0, output_type="pt").images
        torch.testing.assert_close(mixed[row : row + 1], one, rtol=0, atol=1e-5)


def test_a_run_of_smaller_students_is_exported_with_its_routes(tmp_path, monkeypatch) -> None:
    """The export itself holds the folder's images, labels mixed, to the sampler's, to 1e-5."""
    monkeypatch.chdir(tmp_path)
    _, name, *args = command("msd", "own")
    small = {**SMALL["config"], "num_embeds_ada_norm": 10}
    keys = ["network.type=DiTTransformer2DModel", "network.steps=2", "network.walk=2"]
    keys += [f"network.config.{key}={value}" for key, value in small.items()]
    keys += ["parts=[[9, 1, 3, 5, 7], [0, 2, 4, 6, 8]]", "optim.lr=0.05", "ema.decay=0"]
    run_folder = train(name, [*args, *keys, "batch_size=4"])
    assert export(run_folder, "out") <= 1e-5
    index = json.loads(Path("out/model_index.json").read_text())
    assert index["routes"] == {str(label): 1 - label % 2 for label in range(10)}
    for name in ("model", "model_2"):
        assert json.loads(Path(f"out/{name}/config.json").read_text())["num_layers"] == 1
    one, two = (load_file(f"out/{name}/{WEIGHTS}") for name in ("model", "model_2"))
    assert one.keys() == two.keys() and any(not torch.equal(one[k], two[k]) for k in one)


# Smaller students ---------------------------------------------------------------------------------


def test_smaller_students_learn_scores_first_and_resume_anywhere() -> None:
    """Alone and in turn, from the same fresh weights; then their optimizers start over."""
    keys = {"network": {**SMALL, "steps": 4}, "steps": 8, "batch_size": 4, "students": 2}
    whole, checkpoints = make("msd", dit_teacher(), **keys), []
    assert [whole.players[f"student{k}"].total for k in ("", "_2")] == [2, 2]
    for step in range(8):
        run(whole, step, step + 1)
        checkpoints.append(saved(whole))
    assert checkpoints[3][1] == {"student": 2, "critic": 0, "student_2": 2, "critic_2": 0}
    assert checkpoints[5][1] == {"student": 1, "critic": 5, "student_2": 1, "critic_2": 5}
    assert [whole.players[f"student{k}"].total for k in ("", "_2")] == [2, 2]
    for step in range(1, 8):
        resumed = make("msd", dit_teacher(), **keys)
        resumed.load_state(step, *checkpoints[step - 1])
        run(resumed, step, 8)
        same(saved(resumed)[0], checkpoints[-1][0])


def test_a_smaller_student_comes_near_the_teacher_s_scores() -> None:
    """The passes of these steps are the teacher's walk and one more, and the student's own."""
    keys = {"network": {**SMALL, "steps": 150, "walk": 2}, "students": 1, "steps": 151}
    made = make("msd", dit_teacher(), optim={"lr": 5e-3}, batch_size=16, **keys)
    losses = []
    for step in range(150):
        made.prepare(step)
        losses.append(float(made.step(step, made.batch(step))["student/loss"]))
    assert [(p.role, p.kind, p.count) for p in made.passes()] == [
        ("student", "train", 1),
        ("teacher", "forward", 3),
    ]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    batch, rng = made.batch(150), Rng(0).at(150)
    x_t, t = made.z(batch, rng), full(batch.index, 0.7)
    with torch.no_grad():
        gap = made.denoiser("student")(x_t, t, batch.cond).h - made.teacher(x_t, t, batch.cond).h
        size = made.teacher(x_t, t, batch.cond).h
    assert gap.square().mean() < size.square().mean()


# Gaussians ----------------------------------------------------------------------------------------


def closed(students: int, steps: int) -> tuple[Trainer, list[Affine]]:
    """Two classes of 32 Gaussian coordinates, and students mu + u z that know of no class."""
    means, stds = [[0.8] * 32, [-0.6] * 32], [0.5, 1.2]
    teacher = Oracle.of(RF(), "velocity", Mixture.of(means, stds=stds, labels=[0, 1])).float()
    optim = {"lr": 0.03, "betas": (0.5, 0.99), "decay": "cosine"}
    made = make("msd", teacher, students=students, optim=optim, steps=steps, batch_size=32)
    for name, player in list(made.players.items()):
        if name.startswith("student"):
            den = Denoiser(Affine(0.0, 0.8, 32), RF(), "x0", adapter=AffineAdapter())
            made.players[name] = Player(name, den, made.config.optim, total=player.total)
    return made, [player.denoiser.net for player in made.students()]


@pytest.mark.parametrize(("students", "steps"), [(2, 500), (1, 250)])
def test_each_student_recovers_its_component_which_one_alone_cannot(students, steps) -> None:
    """With exact fake scores: of a student that draws the same whatever the class."""
    made, nets = closed(students, steps)
    for step in range(steps):
        turn = made.turns(step)[0]
        student, fake = made.denoiser(made.active).net, made.denoiser(made.fake).net
        with torch.no_grad():
            fake.means.fill_(float(student.mu))
            fake.stds.fill_(abs(float(student.u)))
        with made.players[turn.player].turn():
            turn.loss(made.batch(step), Rng(0).at(step)).value.backward()
            made.players[turn.player].step()
    found: Tensor = torch.tensor([[float(net.mu), abs(float(net.u))] for net in nets])
    laws = torch.tensor([[0.8, 0.5], [-0.6, 1.2]])
    if students == 2:
        torch.testing.assert_close(found, laws, rtol=0, atol=0.03)
    else:
        assert (found - laws).abs().amax(dim=1).min() > 0.3
