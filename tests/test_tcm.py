"""TCM (truncated consistency): where its second stage trains, its targets and weights."""

from __future__ import annotations

import pytest
import torch

from stepdistill.diffusion.denoiser import Experts
from stepdistill.diffusion.process import EDM
from stepdistill.run.errors import UserError
from stepdistill.run.rng import Rng
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.find import trainer
from tests.helpers import batch_of, make, mlp_teacher, run, same, saved

TWO = {"steps": 8, "pairs": {"kind": "ect", "stages": 2}, "solver": "data"}


def second(**keys: object) -> Trainer:
    """A trainer at the start of its second stage."""
    made = make("tcm", mlp_teacher(), batch_size=512, **{**TWO, **keys})
    run(made, 0, 4)
    made.prepare(4)
    return made


def test_times_of_the_second_stage_lie_at_the_border_or_above() -> None:
    made = second()
    t, r = made.times(made.batch(4), Rng(0).at(4))
    assert float(t.min()) == 0.5 and float(t.max()) <= 1
    share = float((t == 0.5).float().mean())
    assert share == pytest.approx(0.25, abs=0.06)
    torch.testing.assert_close(r, t * 0.75)  # the gap of the first stage's end


def test_targets_below_the_border_are_the_first_network_s() -> None:
    """Above it they are the student's own."""
    made = second()
    first, own = (made.players[name].denoiser for name in ("student", "student_2"))
    for param in own.net.parameters():
        param.data.add_(0.05)
    batch, rng = batch_of(made, 4), Rng(0).at(4)
    r = made.times(batch, rng)[1]
    x_r, end = made.noised(r, batch, rng), torch.zeros_like(r)
    aim, low = made.aim(x_r, r, end, batch), r < 0.5
    assert low.any() and not low.all()
    with torch.no_grad():
        torch.testing.assert_close(aim[low], first(x_r, r, batch.cond).x[low])
        torch.testing.assert_close(aim[~low], own(x_r, r, batch.cond).x[~low])


def test_samples_at_the_border_weigh_their_own_share() -> None:
    """border_weight of their mean, 1 of the others': 1/(t - r) beside."""
    made = second(weight="one", border_share=0.5, border_weight=0.2)
    t = torch.tensor([0.5, 0.5, 0.8, 0.9])
    torch.testing.assert_close(made.worth(t, 0.75 * t), torch.tensor([0.4, 0.4, 2.0, 2.0]))


def test_the_second_network_begins_as_the_first_ends_and_both_sample() -> None:
    made = second()
    best = made.best()
    assert isinstance(best, Experts) and best.boundaries == (0.5,)
    first, own = (made.players[name].best for name in ("student", "student_2"))
    assert best.at(1.0) is own and best.at(0.5) is first
    same({"net": first.weights()}, {"net": own.weights()})
    assert made.players["student"].ema is None and trainer("tcm").kept == ("steps",)


@pytest.mark.parametrize("at", [2, 4, 6])
def test_stages_and_the_curriculum_survive_a_resume_in_their_middle(at) -> None:
    whole, first, again = (make("tcm", mlp_teacher(), target="ema", **TWO) for _ in range(3))
    run(whole, 0, 8)
    run(first, 0, at)
    again.load_state(at, *saved(first))
    run(again, at, 8)
    same(saved(again)[0], saved(whole)[0])


def test_the_border_is_where_image_and_noise_are_as_large() -> None:
    teacher = mlp_teacher()
    teacher.process = EDM()
    assert make("tcm", teacher, **TWO).boundary == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"pairs": {"kind": "grid"}}, "pairs: tcm takes those of kind ect"),
        ({"boundary": 1.5}, "boundary=1.5: must lie between 0 and 1, where students start"),
        ({"steps": 1}, "steps=1 leaves a stage without a step"),
    ],
)
def test_what_does_not_fit_is_refused(keys, line) -> None:
    with pytest.raises(UserError, match=line):
        make("tcm", mlp_teacher(), **{**TWO, **keys})
