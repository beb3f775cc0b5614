"""Stores of pairs read back, checked and merged."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.data.pairs.folder import open_folder
from stepdistill.data.pairs.make import MANIFEST, make_pairs
from stepdistill.data.pairs.merge import merge, plan_in, verify
from stepdistill.data.pairs.plan import MergedPlan, PairPlan, Pairs
from stepdistill.data.pairs.shards import packed, shard_name, unpacked
from stepdistill.data.pairs.store import PairStore, fetch
from stepdistill.run.errors import UserError
from tests.children import stepdistill

PLAN = PairPlan("toy", "fp32", 2, 1.0, num=50, seed=3, shape=(1, 4, 4), classes=3, shard=8)
CPU = torch.device("cpu")
EVERY = torch.arange(50)


def pairs(plan: PairPlan, index: Tensor) -> Pairs:
    z, label = plan.noise(index), plan.labels(index)
    return Pairs(z, torch.tanh(z + label[:, None, None, None]), label)


def make(root: Path | str, plan: PairPlan = PLAN, *, part: tuple[int, int] = (0, 1)) -> Path:
    make_pairs(
        open_folder(root),
        plan,
        lambda index: pairs(plan, index),
        batch_size=3,
        told=lambda *counts: None,
        part=part,
    )
    return Path(root)


def same(a: Pairs, b: Pairs) -> bool:
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("z", "x", "label"))


def spoil(path: Path, name: str, place: int, value: float) -> None:
    """Change one number of a shard, whose facts stay."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = file.metadata()
    tensors = {key: kept.clone() for key, kept in load_file(path).items()}
    tensors[name][place].fill_(value)
    save_file(tensors, path, metadata=meta)


# What a plan is -----------------------------------------------------------------------------------


def test_the_digest_of_plain_pairs_is_what_it_was() -> None:
    """Of a store that was made before there were solvers, directions and types."""
    assert PLAN.digest() == "8c103d52ae25d527"
    others = {"solver": '"heun"', "images": "ab", "store": "fp16"}
    digests = {replace(PLAN, **{key: value}).digest() for key, value in others.items()}
    assert len(digests | {PLAN.digest()}) == 4
    for plan in (PLAN, replace(PLAN, **others)):
        assert PairPlan.read(plan.facts()) == plan


# Types --------------------------------------------------------------------------------------------


def test_uint8_rounds_half_to_even_and_gives_back_every_pixel() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(packed(unpacked(levels), "uint8"), levels)
    assert packed(torch.zeros(1), "uint8").tolist() == [128]  # 127.5
    assert packed(torch.tensor([-1.4, 1.4]), "uint8").tolist() == [0, 255]


@pytest.mark.parametrize(
    ("kept", "bits", "off"),
    [("uint8", 8, 1 / 255 + 1e-6), ("fp16", 16, 5e-4), ("bf16", 16, 4e-3), (None, 32, 0.0)],
)
def test_a_type_takes_its_bytes_and_keeps_its_digits(tmp_path, kept, bits, off) -> None:
    plan = replace(PLAN, store=kept)
    store = PairStore(make(tmp_path, plan), plan)
    read, made = store.at(EVERY), pairs(plan, EVERY)
    assert torch.equal(read.z, made.z) and torch.equal(read.label, made.label)
    assert float((read.x - made.x).abs().max()) <= off
    assert read.x.dtype == torch.float32
    size = sum(
        tensor.nbytes for path in tmp_path.glob("pairs-*") for tensor in load_file(path).values()
    )
    assert size == plan.size() == 50 * (16 * bits // 8 + 8)


@pytest.mark.parametrize("kept", ["uint8", "fp16", "bf16", None])
def test_found_noise_is_stored(tmp_path, kept) -> None:
    plan = replace(PLAN, store=kept, images="some set")
    make_pairs(
        open_folder(tmp_path),
        plan,
        lambda index: replace(pairs(plan, index), z=2 * plan.noise(index), label=index % 3),
        batch_size=9,
        told=lambda *counts: None,
    )
    read = PairStore(tmp_path, plan).at(EVERY)
    assert torch.equal(read.label, EVERY % 3)
    torch.testing.assert_close(read.z, 2 * plan.noise(EVERY), atol=0, rtol=8e-3 if kept else 0)
    size = sum(
        tensor.nbytes for path in tmp_path.glob("pairs-*") for tensor in load_file(path).values()
    )
    assert size == plan.size()


@pytest.mark.parametrize(
    ("kept", "value", "line"),
    [
        ("uint8", 4.0, "pairs.store=uint8: image 21 reaches 4, and pixels lie in"),
        ("uint8", float("nan"), "image 21 is not finite"),
        ("fp16", 1e5, "image 21 is not finite"),
    ],
)
def test_what_a_type_cannot_hold_is_refused(tmp_path, kept, value, line) -> None:
    plan = replace(PLAN, store=kept)

    def odd(index: Tensor) -> Pairs:
        made = pairs(plan, index)
        made.x[index == 21] = value
        return made

    with pytest.raises(UserError, match=line):
        make_pairs(open_folder(tmp_path), plan, odd, batch_size=3, told=lambda *counts: None)


# Reading ------------------------------------------------------------------------------------------


def test_batches_come_in_the_order_of_their_steps_and_from_any_step(tmp_path) -> None:
    store = PairStore(make(tmp_path), PLAN)
    alone = [store.batch(step, 12, 5, slice(6, 12), CPU) for step in range(9)]
    for start in (0, 4):
        ahead = list(store.batches(range(start, 9), 12, 5, slice(6, 12), CPU))
        assert len(ahead) == 9 - start
        for one, two in zip(ahead, alone[start:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_leaving_early_ends_the_thread_and_an_error_comes_at_its_step(tmp_path) -> None:
    import threading

    store = PairStore(make(tmp_path), PLAN)
    batches = store.batches(range(100), 4, 0, slice(0, 4), CPU)
    next(batches)
    batches.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("pairs")]
    spoil(tmp_path / shard_name(2), "x", 5, torch.nan)
    store = PairStore(tmp_path, PLAN)
    first = next(step for step in range(20) if 21 in store.positions(step, 4, 0))
    batches = store.batches(range(20), 4, 0, slice(0, 4), CPU)
    for _ in range(first):
        next(batches)
    with pytest.raises(UserError, match="pairs-000002.*image 21 is not finite; remove the file"):
        next(batches)


def test_a_large_store_is_not_held_in_memory(tmp_path) -> None:
    """Of 64 MB on disk, a few pairs are read: memory that is this process's own hardly grows."""
    plan = replace(PLAN, num=64, shard=32, shape=(4, 256, 256), classes=0)
    make_pairs(
        open_folder(tmp_path),
        plan,
        lambda index: Pairs(
            torch.zeros(len(index), *plan.shape),
            torch.zeros(len(index), *plan.shape),
            plan.labels(index),
        ),
        batch_size=32,
        told=lambda *counts: None,
    )
    before = _resident_bytes()
    store = PairStore(tmp_path, plan)
    kept = store.at(np.array([3, 40]))
    assert _resident_bytes() - before < 24 << 20
    assert kept.x.shape == (2, 4, 256, 256)


def _resident_bytes() -> int:
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_mirrored_pairs_come_after_the_others(tmp_path) -> None:
    store = PairStore(make(tmp_path), PLAN, flip=True)
    assert store.num == 100
    plain, mirrored = store.at(EVERY), store.at(EVERY + 50)
    assert torch.equal(mirrored.x, plain.x.flip(-1)) and torch.equal(mirrored.z, plain.z.flip(-1))
    assert torch.equal(mirrored.label, plain.label)
    places = np.concatenate([store.positions(step, 10, 0) for step in range(10)])
    assert sorted(places.tolist()) == list(range(100))


def test_a_store_elsewhere_is_copied_once(tmp_path) -> None:
    place = f"memory://{tmp_path.name}"
    make(place)
    folder, near = open_folder(place), tmp_path / "near"
    assert fetch(folder, PLAN, near, (0, 2)) == near
    assert len(list(near.glob("pairs-*"))) == 4
    fetch(folder, PLAN, near, (1, 2))
    before = {path: path.stat().st_mtime_ns for path in near.iterdir()}
    fetch(folder, PLAN, near)
    assert before == {path: path.stat().st_mtime_ns for path in near.iterdir()}
    assert same(PairStore(near, PLAN).at(EVERY), pairs(PLAN, EVERY))
    folder.remove(shard_name(1))
    (near / shard_name(1)).unlink()
    with pytest.raises(UserError, match="memory://.*/pairs-000001.*: is missing; run"):
        fetch(folder, PLAN, near)


# Merging ------------------------------------------------------------------------------------------


def test_parts_of_one_plan_make_its_store(tmp_path) -> None:
    make(tmp_path / "whole")
    stores = [open_folder(make(tmp_path / f"{k}", part=(k, 3))) for k in range(3)]
    with pytest.raises(UserError, match="pairs-000002.safetensors: is in none of"):
        merge(stores[:2], open_folder(tmp_path / "two"))
    out = tmp_path / "out"
    assert merge(stores, open_folder(out)) == PLAN
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    spoil(tmp_path / "whole" / shard_name(0), "x", 0, 0.5)
    whole = open_folder(tmp_path / "whole")
    merge([whole, *stores], open_folder(tmp_path / "first"))  # by facts they agree; verify tells


def test_two_that_differ_in_a_shard_of_one_plan_are_not_merged(tmp_path) -> None:
    one = open_folder(make(tmp_path / "one"))
    make_pairs(
        open_folder(tmp_path / "other"),
        PLAN,
        lambda index: replace(pairs(PLAN, index), x=torch.zeros(len(index), *PLAN.shape)),
        batch_size=50,
        told=lambda *counts: None,
    )
    with pytest.raises(UserError, match="other/pairs-000000.*: is not the shard of .*one/pairs"):
        merge([one, open_folder(tmp_path / "other")], open_folder(tmp_path / "out"))


def test_seeds_make_a_larger_store(tmp_path) -> None:
    plans = [PLAN, replace(PLAN, seed=4, num=20, shard=16, store="fp16")]
    stores = [open_folder(make(tmp_path / f"{k}", plan)) for k, plan in enumerate(plans)]
    out = tmp_path / "out"
    plan = merge(stores, open_folder(out))
    assert plan == plan_in(open_folder(out)) == MergedPlan(tuple(plans))
    store = PairStore(out, plan)
    assert store.num == 70
    assert same(store.at(EVERY), pairs(PLAN, EVERY))
    for k, place in ((0, 50), (19, 69)):
        read, made = store.at(np.array([place])), pairs(plans[1], torch.tensor([k]))
        assert torch.equal(read.z, made.z)
        torch.testing.assert_close(read.x, made.x, atol=1e-3, rtol=0)
    places = np.concatenate([store.positions(step, 10, 0) for step in range(7)])
    assert sorted(places.tolist()) == list(range(70))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    merge(stores, open_folder(out))  # again
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    further = merge([open_folder(out), stores[0]], open_folder(tmp_path / "again"))
    assert further == plan  # a part that comes twice is there once


@pytest.mark.parametrize("flip", [False, True])
def test_shares_of_parts(tmp_path, flip) -> None:
    plans = [PLAN, replace(PLAN, seed=4, num=20)]
    stores = [open_folder(make(tmp_path / f"{k}", plan)) for k, plan in enumerate(plans)]
    plan = merge(stores, open_folder(tmp_path / "out"))
    store = PairStore(tmp_path / "out", plan, flip=flip, shares=[1, 3])
    places = np.concatenate([store.positions(step, 50, 0) for step in range(40)])
    assert (places % 70 >= 50).mean() == pytest.approx(0.75, abs=0.03)
    assert set(places.tolist()) == set(range(140 if flip else 70))
    with pytest.raises(UserError, match="pairs.shares: 1 numbers, and .* has 2 parts"):
        PairStore(tmp_path / "out", plan, shares=[1])


@pytest.mark.parametrize(
    ("change", "what"), [({"guidance": 2.0}, "guidance is 2.0"), ({"teacher": "b"}, "teacher is b")]
)
def test_pairs_of_another_kind_are_not_merged(tmp_path, change, what) -> None:
    stores = [
        open_folder(make(tmp_path / f"{k}", plan))
        for k, plan in enumerate((PLAN, replace(PLAN, **change)))
    ]
    with pytest.raises(UserError, match=f"{what}, and .*merge pairs of one teacher"):
        merge(stores, open_folder(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# Checking -----------------------------------------------------------------------------------------


def test_every_kind_of_damage_is_told(tmp_path) -> None:
    make(tmp_path)
    folder = open_folder(tmp_path)
    assert list(verify(folder, PLAN)) == [None] * 7
    (tmp_path / shard_name(0)).unlink()
    path = tmp_path / shard_name(1)
    path.write_bytes(path.read_bytes()[:-1])
    spoil(tmp_path / shard_name(2), "x", 1, 0.25)
    other = replace(PLAN, seed=9)
    make(tmp_path / "other", other)
    (tmp_path / shard_name(3)).write_bytes((tmp_path / "other" / shard_name(3)).read_bytes())
    found = list(verify(folder, PLAN))
    assert [fault and fault.what for fault in found] == [
        "is missing",
        "is torn or no safetensors file",
        "has other content than was written",
        "is of another plan",
        None,
        None,
        None,
    ]
    assert found[0].path == f"{tmp_path}/{shard_name(0)}"


def test_a_store_from_before_there_were_hashes_is_checked_by_its_numbers(tmp_path) -> None:
    import json

    from safetensors import safe_open

    make(tmp_path)
    for shard in range(7):
        path = tmp_path / shard_name(shard)
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["shard"])
        facts.pop("sha256")
        tensors = {key: kept.clone() for key, kept in load_file(path).items()}
        save_file(tensors, path, metadata={"shard": json.dumps(facts)})
    folder = open_folder(tmp_path)
    assert list(verify(folder, PLAN)) == [None] * 7
    spoil(tmp_path / shard_name(1), "x", 2, torch.inf)
    spoil(tmp_path / shard_name(2), "label", 2, 7)
    found = [fault and fault.what for fault in verify(folder, PLAN)]
    assert found[1] == "has image 10 that is not finite"
    assert found[2] == "has other labels than its plan"


def test_the_command_verifies_and_merges(tmp_path) -> None:
    keys = ["pairs.num=40", "pairs.steps=1", "pairs.shard=16"]
    for seed in (0, 1):
        args = ["pairs", "reflow-digits", f"run=r{seed}", f"pairs.seed={seed}", *keys]
        done = stepdistill(*args, folder=tmp_path)
        assert done.code == 0
        assert "pairs: 40 of 40 to make, 10.6 KB in" in done.err and "euler steps)" in done.err
    done = stepdistill("pairs", "r0/pairs", "r1/pairs", "--merge", "all", folder=tmp_path)
    assert (done.code, done.out) == (0, "all\n")
    assert "80 pairs of 2 merged stores" in done.err
    done = stepdistill("pairs", "all", "--verify", folder=tmp_path)
    assert done.code == 0 and "in 6 shards, all as they should be" in done.out
    (tmp_path / "all" / shard_name(4)).unlink()
    done = stepdistill("pairs", "all", "--verify", folder=tmp_path)
    assert (done.code, done.out) == (1, "all/pairs-000004.safetensors: is missing\n")
    assert "all: 1 of 6 shards are bad; remove these files and" in done.err
    stepdistill("pairs", "r0/pairs", "r1/pairs", "--merge", "all", folder=tmp_path)
    train = ["train", "reflow-digits", "run=r", "pairs.path=all", "steps=2", "batch_size=4"]
    quiet = ["eval.every_steps=0", "sample.every_steps=0", "log.tensorboard=false"]
    done = stepdistill(*train, *keys, *quiet, folder=tmp_path)
    assert done.code == 0 and "all holds 80 pairs of 2 merged stores, taken" in done.err
    done = stepdistill(*train, "pairs.steps=2", "run=s", *quiet, folder=tmp_path)
    assert done.code == 2
    assert "all: its pairs have steps=1, and this config 2; set it so" in done.err
    done = stepdistill("pairs", "all", "--verify", "--merge", "b", folder=tmp_path)
    assert done.code == 2 and "do not go together" in done.err
    done = stepdistill("pairs", "reflow-digits", "--part", "4/3", folder=tmp_path)
    assert done.code == 2 and "--part 4/3: write it as K/N" in done.err
    (tmp_path / "empty").mkdir()
    done = stepdistill("pairs", "empty", "--verify", folder=tmp_path)
    assert done.code == 2 and f"empty: has no {MANIFEST}, so it is no store" in done.err
