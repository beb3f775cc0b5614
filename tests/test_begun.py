"""Students that begin as another method's student, and what is refused as a beginning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file

from stepdistill.commands.export import export
from stepdistill.commands.train import train
from stepdistill.run.assets import ASSETS, load_teacher
from stepdistill.run.config import digest
from stepdistill.run.errors import UserError
from tests.helpers import dit_teacher, make, same, saved
from tests.helpers import run as run_steps

QUICK = ("steps=1", "batch_size=8", "log.tensorboard=false", "device=cpu", "ema.decay=0")
QUIET = ("eval.every_steps=0", "sample.every_steps=0", "optim.warmup_steps=0")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, ``first``, and its student's pipeline, ``student``."""
    folder = tmp_path_factory.mktemp("begun")
    train("consistency-digits", [f"run={folder / 'first'}", *QUICK, *QUIET])
    export(folder / "first", folder / "student")
    return folder


def network(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "diffusion_pytorch_model.safetensors")


def begun(method: str, folder: Path, **keys):
    return make(method, load_teacher("digits-dit"), student=str(folder), **keys)


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("dmd", {}),
        ("phased_dmd", {"levels": [1.0, 0.6, 0.0]}),
        ("msd", {"students": 2}),
        ("swiftbrush", {"lora": {"rank": 2, "players": ["critic"]}}),
        ("flow_map", {}),
        ("reflow", {}),
        ("tlcm", {"pairs": {"kind": "grid", "steps": 32}}),
    ],
)
def test_every_student_begins_as_it_and_the_fake_score_as_the_teacher(base, method, keys) -> None:
    made = begun(method, base / "student", **keys)
    given, teacher = network(base / "student"), made.teacher.weights()
    assert not torch.equal(given["proj_out_2.weight"], teacher["proj_out_2.weight"])
    for player in made.students():
        assert player.ema is not None
        for den in (player.denoiser, player.ema):
            own = den.weights()
            assert all(torch.equal(own[name], value) for name, value in given.items())
    for name, player in made.players.items():
        if name.startswith("critic") and player.denoiser.lora is None:
            assert all(torch.equal(v, teacher[k]) for k, v in player.denoiser.weights().items())


def test_later_phases_begin_as_it_too(base) -> None:
    made = begun("phased_dmd", base / "student", levels=[1.0, 0.6, 0.0])
    run_steps(made, 0, 3)
    made.prepare(3)
    given, last = network(base / "student"), made.students()[-1].denoiser.weights()
    assert len(made.students()) == 2
    assert all(torch.equal(last[name], value) for name, value in given.items())


def test_a_stopped_run_goes_on_to_the_bit_also_without_the_folder(base, tmp_path) -> None:
    """One method after another, by the commands that users have."""
    folder = tmp_path / "student"
    shutil.copytree(base / "student", folder)
    keys = [f"student={folder}", *QUICK[1:], *QUIET, "optim.decay=constant"]
    whole = train("dmd-digits", [f"run={tmp_path / 'whole'}", "steps=2", *keys])
    train("dmd-digits", [f"run={tmp_path / 'cut'}", "steps=1", *keys])
    cut = train("dmd-digits", [f"run={tmp_path / 'cut'}", "steps=2", "resume=auto", *keys])
    for name in ("student/diffusion_pytorch_model.safetensors",):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    shutil.rmtree(folder)
    assert export(cut, tmp_path / "pipeline") < 1e-5


def test_a_beginning_changes_what_is_learnt(base) -> None:
    kept = []
    for student in (None, str(base / "student")):
        made = make("dmd", load_teacher("digits-dit"), student=student)
        run_steps(made, 0, 1)
        kept.append(saved(made)[0])
    with pytest.raises(AssertionError):
        same(*kept)


def test_a_stock_scheduler_tells_what_a_network_means(tmp_path) -> None:
    """A shipped teacher is a beginning as any pipeline is."""
    teacher = load_teacher("digits-dit")
    made = make("sim", teacher, student="digits-dit")
    own = made.students()[0].denoiser.weights()
    assert all(torch.equal(own[name], value) for name, value in teacher.weights().items())


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"student": "nowhere"}, "^student=nowhere: no such folder"),
        ({"student": "digits-unet"}, "is a UNet2DModel, and the student's a DiTTransformer2DModel"),
        ({"lora": {"rank": 2}}, "^student: adapters begin as the teacher; set lora=null"),
        ({"scratch": True, "solver": "data"}, "^scratch: fresh weights are no saved student's"),
    ],
)
def test_what_cannot_be_a_beginning_is_told(base, keys, line) -> None:
    with pytest.raises(UserError, match=line):
        make(
            "consistency", load_teacher("digits-dit"), **{"student": str(base / "student"), **keys}
        )


def test_a_network_of_another_size_is_refused(base) -> None:
    with pytest.raises(UserError, match="its DiTTransformer2DModel differs from the student's in"):
        make("consistency", dit_teacher(), student=str(base / "student"))


def test_a_run_s_folder_is_not_its_student(base) -> None:
    with pytest.raises(UserError, match="the folder of a run; .*stepdistill export"):
        begun("dmd", base / "first")


@pytest.mark.parametrize("change", [{"a": 0.0}, {"scale": 0.5}, {"sigma": 0.5}])
def test_another_output_or_process_is_refused(base, tmp_path, change) -> None:
    folder = tmp_path / "student"
    shutil.copytree(base / "student", folder)
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    config["grids"]["1"][0] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="by another process or output than the teacher's"):
        begun("dmd", folder)


def test_another_stock_scheduler_is_refused(tmp_path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(ASSETS / "digits-dit", folder)
    (file,) = folder.glob("scheduler/scheduler_config.json")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    file.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(UserError, match="by another process or output than the teacher's"):
        begun("dmd", folder)


def test_a_network_that_is_told_more_is_refused(base, tmp_path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(base / "student", folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"extra": ["extra", "Embedding"]}))
    with pytest.raises(UserError, match="is told further numbers"):
        begun("dmd", folder)


class Before(BaseModel):
    """A config of before a key was there."""

    steps: int = 1


class After(Before):
    """The same with the key."""

    student: str | None = None


def test_a_key_that_is_null_does_not_change_a_config_s_hash() -> None:
    """So records and runs of before a key was there stay known."""
    assert digest(Before()) == digest(After()) != digest(After(student="a"))
