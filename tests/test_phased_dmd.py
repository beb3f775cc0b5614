"""Phased DMD: target forms by name, margins, a teacher of two experts, adapters by phase."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.adapters import lora
from stepdistill.adapters.cond import Cond
from stepdistill.diffusion.denoiser import Denoiser, Prediction
from stepdistill.diffusion.heads import HEADS
from stepdistill.diffusion.process import EDM, RF, VP, Coefs, Process, Trig
from stepdistill.diffusion.split import Split
from stepdistill.diffusion.timesteps import Uniform
from stepdistill.losses.distribution import Renoise
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.score import phased_dmd
from tests.children import stepdistill
from tests.helpers import (
    batch_of,
    gaussian_clean,
    hermite2,
    make,
    mlp_teacher,
    run,
    same,
    saved,
    scaled_linear,
)

Z, E, W = hermite2(60)
DATA_MEAN, DATA_STD = 0.4, 0.7
PLACES: list[tuple[Process, float, float]] = [
    (RF(), 0.5, 0.75),
    (VP(scaled_linear()), 0.3, 0.8),
    (EDM(), 0.4, 1.5),
    (Trig(sigma_data=1.0), 0.6, 1.1),
]
LORA = {"rank": 4, "alpha": 8}


# Targets --------------------------------------------------------------------------------------


def line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and intercept of the regression of y on x; exact, as both are Gaussian."""
    mean_x, mean_y = (W * x).sum(), (W * y).sum()
    slope = (W * (x - mean_x) * (y - mean_y)).sum() / (W * (x - mean_x) ** 2).sum()
    return float(slope), float(mean_y - slope * mean_x)


def noised(process: Process, low: float, high: float) -> tuple[Renoise, Tensor]:
    """The kernel between two levels, and the data's samples at the lower one."""
    at_s, at_t = (process.coefs(torch.tensor([t], dtype=torch.float64)) for t in (low, high))
    spread = (at_s.alpha**2 * DATA_STD**2 + at_s.sigma**2).sqrt()
    return Renoise(at_s, at_t), at_s.alpha * DATA_MEAN + spread * Z


Form = Callable[[Coefs, Coefs, Tensor, Tensor], Tensor]
FORMS: dict[str, tuple[Form, Callable[[Coefs, Tensor, Tensor], Tensor]]] = {
    # the target from (at s, at t, B, x_s) and E; what it means of clean and noise parts
    "score": (lambda s, t, b, x: -E / b, lambda t, x, z: -z / t.sigma),
    "eps": (lambda s, t, b, x: t.sigma / b * E, lambda t, x, z: z),
    "x0": (
        lambda s, t, b, x: x / s.alpha - t.alpha * s.sigma**2 / (s.alpha**2 * b) * E,
        lambda t, x, z: x,
    ),
    "flow": (
        lambda s, t, b, x: (
            (s.alpha**2 * t.sigma + t.alpha * s.sigma**2) / (s.alpha**2 * b) * E - x / s.alpha
        ),
        lambda t, x, z: z - x,
    ),
    "v": (  # where alpha^2 + sigma^2 = 1
        lambda s, t, b, x: t.alpha * t.sigma / (s.alpha**2 * b) * E - t.sigma / s.alpha * x,
        lambda t, x, z: t.alpha * z - t.sigma * x,
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("process", "low", "high"), PLACES, ids=["rf", "vp", "edm", "trig"])
def test_phased_dmd_target_by_its_name(process, low, high, form) -> None:
    """Regressed on x_t, each form of Phased DMD's target is what the full process says."""
    if form == "v" and process.name not in ("vp", "trig"):
        pytest.skip("v is defined where alpha^2 + sigma^2 = 1")
    kernel, x_s = noised(process, low, high)
    x_t, c = kernel.state(x_s, E), kernel.at_t
    target, meaning = FORMS[form]
    points = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x = gaussian_clean(points, c.alpha, c.sigma, DATA_MEAN, DATA_STD**2)
    truth = meaning(c, x, (points - c.alpha * x) / c.sigma)
    slope, intercept = line(x_t, target(kernel.at_s, c, kernel.spread, x_s))
    assert intercept == pytest.approx(float(truth[0]), abs=1e-9)
    assert slope == pytest.approx(float(truth[1] - truth[0]), abs=1e-9)
    if form == "score":  # the same as of the noised data's own density
        total = float((c.alpha * DATA_STD) ** 2 + c.sigma**2)
        assert slope == pytest.approx(-1 / total, rel=1e-9)
        assert intercept == pytest.approx(float(c.alpha) * DATA_MEAN / total, rel=1e-9)
    else:  # a loss takes the same one, by the network's head
        head = {"flow": "velocity" if process.name == "rf" else None}.get(form, form)
        if head:
            own = kernel.target(HEADS[head], x_s, E, process.sigma_data)
            torch.testing.assert_close(own, target(kernel.at_s, c, kernel.spread, x_s))


@pytest.mark.parametrize(("process", "low", "high"), PLACES, ids=["rf", "vp", "edm", "trig"])
def test_phased_dmd_targets_are_one_through_the_heads(process, low, high) -> None:
    """Whatever a fake score's head, its target stands for one clean part, noise part and score."""
    kernel, x_s = noised(process, low, high)
    x_t, c = kernel.state(x_s, E), kernel.at_t
    x, z = kernel.parts(x_s, E)
    torch.testing.assert_close(c.alpha * x + c.sigma * z, x_t)
    for head in HEADS.values():
        target = kernel.target(head, x_s, E, process.sigma_data)
        pred = Prediction(target, x_t, c, head, process.sigma_data)
        torch.testing.assert_close(pred.x, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(pred.z, z, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(pred.score, -E / kernel.spread, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", [place[0] for place in PLACES], ids=["rf", "vp", "edm", "trig"])
def test_phased_dmd_targets_become_those_of_clean_samples(process) -> None:
    """As the level of the samples falls to 0, state, targets and weight go to DMD2's."""
    t = process.coefs(torch.tensor([0.5 * process.t_max], dtype=torch.float64))
    kernels = [
        Renoise(process.coefs(torch.tensor([s], dtype=torch.float64)), t) for s in (1e-9, 1e-5)
    ]
    x, z = 0.3 + Z, E
    for head in HEADS.values():
        clean = head.output(x, z, t, process.sigma_data)
        for kernel, slack in zip(kernels, (1e-3, 0.05), strict=True):  # VP's table begins above 0
            found = kernel.target(head, kernel.at_s.alpha * x, z, process.sigma_data)
            torch.testing.assert_close(found, clean, rtol=slack, atol=slack)
    assert float(kernels[0].weight("ratio")) == pytest.approx(1, abs=1e-3)


# Margins --------------------------------------------------------------------------------------


def test_times_keep_a_margin_off_the_level() -> None:
    made = make("phased_dmd", mlp_teacher(), margin=0.1, batch_size=512)
    plain = make("phased_dmd", mlp_teacher(), batch_size=512)
    batch, rng = batch_of(made, 0), Rng(0).at(0)
    assert isinstance(made, phased_dmd.PhasedDMDTrainer)
    for density in (made.config.student_t, made.config.critic_t, Uniform()):
        t, wide = (one.times(density, 0.6, batch, rng) for one in (made, plain))
        torch.testing.assert_close(t, 0.64 + (wide - 0.6) * (0.36 / 0.4))
        clean = [one.times(density, 0.0, batch, rng) for one in (made, plain)]
        assert torch.equal(*clean)  # clean samples need none
    edge, near = (made.times(Uniform(), 0.6, batch, rng).min() for made in (made, plain))
    assert 0.64 <= float(edge) < 0.645 and 0.6 <= float(near) < 0.605


def test_a_margin_bounds_the_unweighted_target() -> None:
    """Beside critic_weight, the other way to tame the target's 1/B."""
    grown = []
    for margin in (0.0, 0.1):
        weight = "none" if margin else "ratio"  # one of the two must be there
        made = make("phased_dmd", mlp_teacher(), margin=margin, critic_weight=weight)
        u = torch.linspace(1e-4, 1, 512, dtype=torch.float64)
        assert isinstance(made, phased_dmd.PhasedDMDTrainer)
        t = made.placed(Uniform(), u, 0.6)
        kernel = Renoise(RF().coefs(torch.tensor([0.6], dtype=torch.float64)), RF().coefs(t))
        one = torch.ones(512, dtype=torch.float64)
        grown.append(float(kernel.target(HEADS["velocity"], 0 * one, one).abs().max()))
    assert grown[0] > 100 and grown[1] < 5


def test_one_step_a_phase_leaves_nothing_to_truncate() -> None:
    """SGTS draws no exit then: the truncated rollout is the whole one, to the bit."""
    for steps, equal in ((1, True), (3, False)):
        made = make("phased_dmd", mlp_teacher(), phase_steps=steps)
        run(made, 0, 4)  # into the second phase
        batch, found = batch_of(made, 4), []
        for at in range(6):
            whole, cut = (
                made.generate(batch, Rng(0).at(at), exact=exact) for exact in (True, False)
            )
            found.append(torch.equal(whole.x, cut.x))
        assert all(found) if equal else not all(found)


# A teacher of two experts ---------------------------------------------------------------------

BORDER = 0.6


def other_teacher(scale: float = 0.1) -> Denoiser:
    """A teacher whose weights are not those of :func:`mlp_teacher`."""
    den = mlp_teacher()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in den.net.parameters():
            param += scale * torch.randn(param.shape, generator=draw)
    return den


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """Makes a trainer whose teacher is split at the border of its phases."""

    def made(low: Denoiser | None = None, high: Denoiser | None = None, **keys: Any) -> Trainer:
        given = low or other_teacher()
        monkeypatch.setattr(phased_dmd, "load_teacher", lambda *_, **__: given)
        keys = {"teacher_low": "low", "teacher_boundary": BORDER, **keys}
        return make("phased_dmd", high or mlp_teacher(), **keys)

    return made


def asked(den: Denoiser, t: Tensor | None = None) -> Tensor:
    """What a denoiser says of four fixed states."""
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([0.2, 0.6, 0.61, 0.9]) if t is None else t
    with torch.no_grad():
        return den.raw(x, times, Cond(torch.tensor([0, 1, 2, 3])))


def test_a_split_answers_by_the_owner_of_each_row() -> None:
    high, low = mlp_teacher(), other_teacher()
    both = Split(high, low, BORDER)
    rows = asked(both)
    assert torch.equal(rows[:2], asked(low)[:2]) and torch.equal(rows[2:], asked(high)[2:])
    assert both.at(0.61) is high and both.at(0.6) is low and both.at(0.1) is low
    for place, part in enumerate((high, low)):
        with both.only(place):
            assert torch.equal(asked(both), asked(part))
    pred = both(torch.zeros(4, 4), torch.tensor([0.2, 0.6, 0.61, 0.9]), Cond(torch.zeros(4).long()))
    assert pred.x.shape == (4, 4)


def recorded(net: torch.nn.Module) -> tuple[list[Tensor], Any]:
    """Times, as fractions, of each call of a network from now on, and the hook that notes them."""
    seen: list[Tensor] = []
    return seen, net.register_forward_pre_hook(lambda _, args: seen.append(args[1] / 1000))


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_each_expert_is_asked_at_its_own_levels_alone(split, margin) -> None:
    made = split(steps=120, margin=margin)
    for first, last in ((0, 60), (60, 120)):
        made.prepare(first)  # players copied later would copy the hooks too
        (high, hook), (low, hook_low) = (recorded(made.teacher.part(i).net) for i in (0, 1))
        run(made, first, last)
        hook.remove()
        hook_low.remove()
        assert len(high) + len(low) == last - first  # one call a comparison
        assert torch.cat(high).min() >= BORDER - 1e-6
        if first == 0:
            assert not low
        else:
            assert torch.cat(low).max() <= BORDER + 1e-6
            share = (BORDER - 0.02) / 0.96
            assert abs(len(low) / 60 - share) < 4 * (share * (1 - share) / 60) ** 0.5


def test_the_share_of_a_side_is_that_of_its_times(split) -> None:
    made = split(levels=(1.0, 0.6, 0.3, 0.0), margin=0.1)
    assert made.cleaner_share(0.6) == 0
    assert made.cleaner_share(0.3) == pytest.approx(((0.6 - 0.37) / 0.63 - 0.02) / 0.96, abs=1e-9)
    assert made.cleaner_share(0.0) == pytest.approx((0.6 - 0.02) / 0.96, abs=1e-9)
    t = made.placed(made.config.student_t, torch.rand(4000, generator=torch.manual_seed(0)), 0.3)
    assert float((t <= 0.6).float().mean()) == pytest.approx(made.cleaner_share(0.3), abs=0.03)


def test_every_phase_begins_as_the_expert_that_owns_its_levels(split) -> None:
    high, low = mlp_teacher(), other_teacher()
    made = split(low, high, levels=(1.0, 0.6, 0.3, 0.0))
    assert torch.equal(asked(made.denoiser("student")), asked(high))
    assert torch.equal(asked(made.denoiser("critic")), asked(high))
    ahead = made.best()
    assert [torch.equal(asked(ahead.at(t)), asked(low)) for t in (0.9, 0.5, 0.2)] == [0, 1, 1]
    run(made, 0, 2)
    for step in (2, 4):  # into the second phase, then the third
        made.prepare(step)
        for den in (made.denoiser(made.active), made.denoiser("critic"), made.students()[-1].best):
            assert torch.equal(asked(den), asked(low))
        assert made.players["critic"].updates == 0
        run(made, step, step + 2)
    assert made.held() == {"teacher": 2, "student": 1, "critic": 1, "average": 1, "expert": 2}
    assert not any(param.requires_grad for param in (*high.net.parameters(), *low.net.parameters()))


def test_a_network_split_into_itself_is_the_unsplit_teacher(split) -> None:
    """Above the border to the bit: nothing but which network answers has changed."""
    one = split(mlp_teacher())
    two = make("phased_dmd", mlp_teacher())
    for made in (one, two):
        run(made, 0, 3)
    same(saved(one)[0], saved(two)[0])


@pytest.mark.parametrize("adapters", [None, LORA], ids=["whole", "lora"])
def test_a_split_run_resumes_the_same(split, adapters) -> None:
    made, kept = split(lora=adapters), {}
    for step in range(6):
        run(made, step, step + 1)
        kept[step + 1] = saved(made)
    for step in (2, 3, 5):  # before the border of the phases, at it, and behind
        again = split(lora=adapters)
        again.load_state(step, *copy.deepcopy(kept[step]))
        run(again, step, 6)
        same(saved(again)[0], kept[6][0])


def test_adapters_lie_on_the_expert_that_owns_their_levels(split) -> None:
    high, low = mlp_teacher(), other_teacher()
    made = split(low, high, lora=LORA)
    run(made, 0, 3)
    assert set(lora.names(high.net)) == {"student", "student_average", "critic"}
    assert lora.names(low.net) == ()
    made.prepare(3)
    assert set(lora.names(high.net)) == {"student"}  # at its averaged weights
    assert set(lora.names(low.net)) == {"student_2", "student_2_average", "critic"}
    run(made, 3, 6)
    assert made.held() == {"teacher": 2}
    assert made.adapters() == {"student": 1, "critic": 1, "average": 1, "expert": 1}
    assert torch.equal(asked(high), asked(mlp_teacher()))
    assert torch.equal(asked(low), asked(other_teacher()))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"teacher_low": "low"}, "teacher_low and teacher_boundary go together"),
        ({"teacher_boundary": 0.6}, "teacher_low and teacher_boundary go together"),
        (
            {"teacher_low": "low", "teacher_boundary": 0.5},
            r"levels=\[1.0, 0.6, 0.0\] has no border at teacher_boundary=0.5: .* among the levels",
        ),
        (
            {"teacher_low": "./nowhere", "teacher_boundary": 0.6},
            "^teacher_low=./nowhere: no such folder",
        ),
        (
            {"teacher_low": "digits-dit", "teacher_boundary": 0.6},
            r"^teacher_low=digits-dit: its sample shape is \(1, 8, 8\), the other's \(4,\)",
        ),
        (
            {
                "teacher_low": "digits-dit",
                "teacher_boundary": 0.6,
                "adversary": {"features": "teacher"},
            },
            "adversary.features: with teacher_low .* set adversary.features=critic",
        ),
    ],
)
def test_mistakes_of_a_split_are_told(keys, line) -> None:
    with pytest.raises(UserError, match=line):
        make("phased_dmd", mlp_teacher(), **keys)


def test_a_head_reads_both_experts_of_a_split_where_their_widths_are_one(split) -> None:
    head = {"adversary": {"features": "critic"}}
    run(split(**head), 0, 6)
    run(split(mlp_teacher(width=8)), 0, 6)
    with pytest.raises(UserError, match="^adversary: teacher_low has features at other") as caught:
        split(mlp_teacher(width=8), **head)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="^adversary: teacher_low has features at other modules"):
        split(mlp_teacher(depth=4), **head)


@pytest.mark.parametrize("rank", [None, 4], ids=["whole", "lora"])
def test_a_split_teacher_trains_and_exports(tmp_path: Path, rank) -> None:
    """By the command: export holds the two experts' pipeline against the training sampler."""
    keys = "steps=4 batch_size=8 log.tensorboard=false sample.every_steps=2 sample.num=4".split()
    keys += "eval.every_steps=0 sample.teacher_steps=4 device=cpu run=run".split()
    keys += "teacher_low=digits-dit teacher_boundary=0.6 margin=0.05".split()
    keys += [f"lora.rank={rank}"] if rank else []
    done = stepdistill("train", "phased_dmd-digits", *keys, folder=tmp_path)
    assert done.code == 0, done.err
    done = stepdistill("export", "run", "--out", "pipeline", folder=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "pipeline" / "model_2").is_dir()
