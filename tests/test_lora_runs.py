"""Runs with low-rank adapters: what they hold, what they leave, and on two processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepdistill.commands import bench
from stepdistill.trainers.weigh import held_bytes, networks_line, whole_bytes
from tests.children import losses, ranks, rows, stepdistill
from tests.helpers import dit_teacher, run
from tests.test_lora import adapted, every_method


@every_method
def test_held_is_one_network_and_adapters(method, keys) -> None:
    """The figure of full copies is that of a run with full copies, byte for byte."""
    made, full = (adapted(method, dit_teacher(), **keys, **more) for more in ({}, {"lora": None}))
    for each in (made, full):
        run(each, 0, 5)
    base = sum(t.nbytes for t in (*full.teacher.net.parameters(), *full.teacher.net.buffers()))
    adapters = sum(t.nbytes for part in made.state().values() for t in part.values())
    assert made.held() == {"teacher": 1}
    assert sum(made.adapters().values()) == sum(full.held().values()) - 1
    assert held_bytes(made) == base + adapters
    assert whole_bytes(made) == held_bytes(full) == whole_bytes(full)
    assert "MiB with adapters, " in networks_line(made)


def test_bench_prints_both_figures(capsys) -> None:
    keys = ["batch_size=4", "device=cpu", "lora.rank=4"]
    bench.run("sim-digits", keys, rounds=2, threads=1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "networks held: 1 (teacher) and adapters: 3 (student, critic, average)" in shown
    assert "MiB with adapters" in shown and "MiB as full copies" in shown


SHORT = "steps=4 batch_size=16 log.every_steps=1 log.tensorboard=false sample.every_steps=0".split()
SHORT += ["eval.every_steps=0", "lora.rank=4", "checkpoint.every_steps=2"]


def test_a_run_exports_and_two_processes_have_the_curve_of_one(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    keys = [*SHORT, "levels=[1.0,0.5,0.0]", "gradient_checkpointing=true"]
    command = ["train", "phased_dmd-digits", *keys]
    one = stepdistill(*command, "run=one", folder=tmp_path)
    assert one.code == 0, one.err
    two = [child.wait() for child in ranks([*command, "run=two"], tmp_path)]
    assert [done.code for done in two] == [0, 0], two
    assert [row["step"] for row in rows(tmp_path / "two")] == [1, 2, 3, 4]
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)  # a half's own gradient is far from it
    for name in ("student", "student_2"):
        DiTTransformer2DModel.from_pretrained(tmp_path / "one" / name)
        held = {path.name for path in (tmp_path / "one" / name / "adapter").iterdir()}
        assert held == {"adapter_config.json", "adapter_model.safetensors"}
    done = stepdistill("export", "one", "--out", "pipeline", folder=tmp_path)
    assert done.code == 0, done.err  # it holds the pipeline's images against the sampler's
    resumed = stepdistill(*command, "run=one", "resume=auto", "steps=4", folder=tmp_path)
    assert resumed.code == 0, resumed.err
