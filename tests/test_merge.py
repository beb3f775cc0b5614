"""Two students merged into one, as SwiftBrush v2 merges a whole student with an adapter's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stepdistill.commands.export import blend, finished
from stepdistill.run.errors import UserError
from tests.children import stepdistill

SMALL = "batch_size=4 log.tensorboard=false sample.every_steps=0 eval.every_steps=0".split()
ADAPTERS = "lora.players=[student,critic]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs: a whole student, one by an adapter, one of another sampler."""
    base = tmp_path_factory.mktemp("merge")
    for name, steps, *more in (
        ("whole", 3, "lora=null"),
        ("adapter", 3, ADAPTERS),
        ("unclipped", 1, "clip=null"),
        ("longer", 1, "student_steps=2"),
    ):
        keys = [f"run={name}", f"steps={steps}", *SMALL, *more]
        done = stepdistill("train", "swiftbrush-digits", *keys, folder=base)
        assert done.code == 0, done
    return base


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a saved network."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_merged_weights_are_the_weighted_mean(folder, share) -> None:
    made = finished(folder / "whole")
    blend(made, folder / "adapter", share)
    one, two = (weights(folder / name / "student") for name in ("whole", "adapter"))
    moved = 0
    for name, value in made.students()[0].best.net.state_dict().items():
        torch.testing.assert_close(value, share * one[name] + (1 - share) * two[name])
        moved += not torch.equal(one[name], two[name])
    assert moved


def test_a_student_merged_with_itself_is_itself(folder) -> None:
    made = finished(folder / "whole")
    blend(made, folder / "whole", 0.37)
    for name, value in weights(folder / "whole" / "student").items():
        assert torch.equal(made.students()[0].best.net.state_dict()[name], value)


@pytest.mark.parametrize(
    ("other", "share", "message"),
    [
        ("adapter", 1.5, r"--share 1.5: must lie between 0 and 1"),
        ("nowhere", 0.5, r"nowhere: no config.yaml, so this is no run"),
        ("unclipped", 0.5, r"--merge .*unclipped: clip must be the same in both runs, and is None"),
        ("longer", 0.5, r"--merge .*longer: the sampler's grids must be the same in both runs"),
    ],
)
def test_students_that_are_no_siblings_are_refused(folder, other, share, message) -> None:
    made = finished(folder / "whole")
    before = {k: v.clone() for k, v in made.students()[0].best.net.state_dict().items()}
    with pytest.raises(UserError, match=message):
        blend(made, folder / other, share)
    for name, value in made.students()[0].best.net.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_command_exports_the_merged_student(folder) -> None:
    asked = ["export", "whole", "--merge", "adapter", "--share", "0.3", "--out", "merged"]
    done = stepdistill(*asked, folder=folder)
    assert done.code == 0, done
    (file,) = (folder / "merged").glob("*/*.safetensors")
    made = finished(folder / "whole")
    blend(made, folder / "adapter", 0.3)
    expected = made.students()[0].best.net.state_dict()
    for name, value in load_file(file).items():
        assert torch.equal(value, expected[name])
    assert "--merge adapter --share 0.3" in (folder / "merged" / "README.md").read_text()
