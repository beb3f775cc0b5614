"""The pair store: resumable to the shard, the same bytes for any number of workers."""

from __future__ import annotations

import json
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepdistill.adapters.cond import Cond
from stepdistill.data.pairs import claims as claim_files
from stepdistill.data.pairs.claims import CLAIM, Claims
from stepdistill.data.pairs.folder import Folder, open_folder
from stepdistill.data.pairs.make import MANIFEST, make_pairs, of_noise
from stepdistill.data.pairs.plan import PairPlan, pieces
from stepdistill.data.pairs.shards import lacking, shard_name
from stepdistill.data.pairs.store import PairStore
from stepdistill.run.errors import UserError
from tests.children import CONTEXT, Child, ranks, stepdistill
from tests.faults import FAULT

PLAN = PairPlan(
    teacher="toy 0",
    precision="fp32",
    steps=2,
    guidance=1.0,
    num=50,
    seed=3,
    shape=(1, 4, 4),
    classes=3,
    shard=8,
)
CPU = torch.device("cpu")


def draw(z: Tensor, cond: Cond) -> Tensor:
    assert cond.label is not None
    return torch.tanh(z + cond.label[:, None, None, None])


def make(root: Path | str, plan: PairPlan = PLAN, draw=draw, **keys) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    keys = {"batch_size": 3, "told": lambda *counts: told.append(counts), **keys}
    make_pairs(open_folder(root), plan, of_noise(plan, draw), **keys)
    return told


def shard_path(root: Path, shard: int) -> Path:
    return root / shard_name(shard)


def whole(root: Path, plan: PairPlan, shard: int) -> bool:
    return not lacking(open_folder(root), [list(pieces(plan))[shard]])


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_what_is_in_a_store(tmp_path) -> None:
    told = make(tmp_path)
    assert told[0] == (0, 0) and told[-1] == (PLAN.num, PLAN.num)
    assert len(list(tmp_path.glob("pairs-*.safetensors"))) == PLAN.shards() == 7
    assert json.loads((tmp_path / MANIFEST).read_text())["num"] == 50
    index = torch.arange(50)
    kept = PairStore(tmp_path, PLAN).at(index)
    assert torch.equal(kept.label, PLAN.labels(index))
    assert torch.equal(kept.z, PLAN.noise(index))
    assert torch.equal(kept.x, draw(kept.z, Cond(kept.label)))
    assert set(kept.label.tolist()) == {0, 1, 2}


def test_batches_pair_noise_with_its_image_and_share_a_step(tmp_path) -> None:
    make(tmp_path)
    store = PairStore(tmp_path, PLAN)
    seen: list[float] = []
    for step in range(5):
        z, x, label = store.batch(step, 10, 0, slice(0, 10), CPU)
        assert torch.equal(x, draw(z, Cond(label)))
        parts = [store.batch(step, 10, 0, slice(k, k + 5), CPU) for k in (0, 5)]
        for whole_one, halves in zip((z, x, label), zip(*parts, strict=True), strict=True):
            assert torch.equal(whole_one, torch.cat(halves))
        seen += z[:, 0, 0, 0].tolist()
    assert len(set(seen)) == 50  # one epoch uses every pair once


@pytest.mark.parametrize("world", [2, 3, 9])
def test_any_number_of_parts_gives_the_same_bytes(tmp_path, world) -> None:
    make(tmp_path / "one")
    for k in range(world):
        told = make(tmp_path / "many", part=(k, world))
        assert told[-1][0] == sum(len(PLAN.indices(shard)) for shard in range(7)[k::world])
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_bytes_are_the_same_in_another_process(tmp_path) -> None:
    make(tmp_path / "here")
    child = CONTEXT.Process(target=make, args=(tmp_path / "there",))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert files(tmp_path / "there") == files(tmp_path / "here")


def test_shards_that_are_whole_are_not_made_again_and_torn_ones_are(tmp_path) -> None:
    make(tmp_path)
    before = files(tmp_path)
    made: list[int] = []

    def counting(z: Tensor, cond: Cond) -> Tensor:
        made.append(len(z))
        return draw(z, cond)

    assert make(tmp_path, draw=counting)[-1] == (50, 0) and made == []
    torn = shard_path(tmp_path, 2)
    torn.write_bytes(torn.read_bytes()[:-5])
    shard_path(tmp_path, 4).unlink()
    shard_path(tmp_path, 5).write_bytes(b"")
    (tmp_path / f".{shard_path(tmp_path, 6).name}.ab.part").write_bytes(b"of a killed worker")
    shard_path(tmp_path, 6).unlink()
    with pytest.raises(UserError, match=r"4 of 7 shards are missing or torn, first pairs-000002"):
        PairStore(tmp_path, PLAN)
    assert not whole(tmp_path, PLAN, 2)
    make(tmp_path, draw=counting)
    assert sum(made) == 8 + 8 + 8 + 2
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"num": 49},
        {"steps": 3},
        {"teacher": "toy 1"},
        {"guidance": 2.0},
        {"precision": "bf16"},
    ],
)
def test_another_plan_is_refused(tmp_path, change) -> None:
    make(tmp_path)
    before, other = files(tmp_path), replace(PLAN, **change)
    for use in (make, PairStore):
        with pytest.raises(UserError, match=r"pairs-000000.* another plan; give pairs.path an em"):
            use(tmp_path, other)
    assert files(tmp_path) == before


def test_noise_that_cannot_be_made_again_is_refused(tmp_path, monkeypatch) -> None:
    make(tmp_path)
    monkeypatch.setattr(PairPlan, "noise", lambda self, index: torch.ones(len(index), 1, 4, 4))
    with pytest.raises(UserError, match="pairs-000000.*its noise cannot be made again"):
        PairStore(tmp_path, PLAN)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_is_named(tmp_path, value) -> None:
    def spoilt(z: Tensor, cond: Cond) -> Tensor:
        x = draw(z, cond)
        x[z == PLAN.noise(torch.tensor([21]))] = value
        return x

    with pytest.raises(UserError, match="pairs: image 21 is not finite"):
        make(tmp_path, draw=spoilt)
    assert [whole(tmp_path, PLAN, shard) for shard in range(4)] == [True, True, False, False]


def test_unconditional_pairs(tmp_path) -> None:
    plan = replace(PLAN, classes=0)

    def blind(z: Tensor, cond: Cond) -> Tensor:
        assert cond.label is None
        return z.tanh()

    make(tmp_path, plan, draw=blind)
    assert not PairStore(tmp_path, plan).at(torch.arange(50)).label.any()


# Killed workers -----------------------------------------------------------------------------------


def _slow(z: Tensor, cond: Cond) -> Tensor:
    time.sleep(0.004)
    return draw(z, cond)


def _slowly(root: str) -> None:
    make(root, draw=_slow)


@pytest.mark.parametrize("seed", range(3))
def test_workers_killed_at_a_random_moment_leave_a_store_that_can_be_finished(
    tmp_path, seed
) -> None:
    make(tmp_path / "whole")
    cut, moment = tmp_path / "cut", random.Random(seed)
    for world in (1, 3):
        workers = [CONTEXT.Process(target=_slowly, args=(str(cut),)) for _ in range(world)]
        for worker in workers:
            worker.start()
        time.sleep(moment.uniform(0.05, 0.15))
        for worker in workers:
            worker.kill()  # it may have ended by itself
            worker.join()
    make(cut)
    assert files(cut) == files(tmp_path / "whole")


@pytest.mark.parametrize("name", [MANIFEST, shard_path(Path(), 0).name])
def test_what_a_worker_killed_in_a_write_has_left_is_removed(tmp_path, name) -> None:
    make(tmp_path / "whole")
    assert (tmp_path / "whole" / name).is_file()
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / f".{name}.0123abcd.part").write_bytes(b"torn")
    make(cut)
    assert files(cut) == files(tmp_path / "whole")


def command(run: str, *more: str) -> list[str]:
    keys = ["pairs.num=200", "pairs.steps=8", "pairs.shard=16", "pairs.batch_size=8"]
    return ["pairs", "reflow-digits", f"run={run}", *keys, *more]


def test_the_command_killed_and_run_again_and_by_three_processes(tmp_path) -> None:
    done = stepdistill(*command("whole"), folder=tmp_path)
    assert (done.code, done.out) == (0, "whole/pairs\n")
    child = Child(command("cut"), tmp_path, {FAULT: "shard:4"})
    child.when(lambda: len(list((tmp_path / "cut").glob("pairs/pairs-*"))) >= 2)
    child.signal(signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL
    assert len(list((tmp_path / "cut").glob("pairs/pairs-*"))) < 13
    jobs = ranks(command("cut"), tmp_path, world=3)
    assert [job.wait().code for job in jobs] == [0, 0, 0]
    assert files(tmp_path / "cut" / "pairs") == files(tmp_path / "whole" / "pairs")
    done = stepdistill(*command("whole", "pairs.seed=1"), folder=tmp_path)
    assert done.code == 2 and "pairs of another plan" in done.err.splitlines()[-1]


def test_the_command_stopped_by_a_signal(tmp_path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        root = tmp_path / "run" / "pairs"
        before = len(list(root.glob("pairs-*")))
        child = Child(command("run"), tmp_path, {FAULT: f"shard:{before + 2}"})
        child.when(lambda root=root, n=before: len(list(root.glob("pairs-*"))) > n)
        child.signal(number)
        done = child.wait()
        assert done.code == 128 + number
        assert "Traceback" not in done.err
    assert stepdistill(*command("run"), folder=tmp_path).code == 0


# Workers that know of each other by the folder alone --------------------------------------------


def _counted(root: str, made) -> None:
    def counting(z: Tensor, cond: Cond) -> Tensor:
        with made.get_lock():
            made.value += len(z)
        return _slow(z, cond)

    make(root, draw=counting)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_share_the_shards_and_none_is_made_twice(tmp_path, workers) -> None:
    make(tmp_path / "alone")
    made = CONTEXT.Value("q", 0)
    those = [
        CONTEXT.Process(target=_counted, args=(str(tmp_path / "shared"), made))
        for _ in range(workers)
    ]
    for worker in those:
        worker.start()
    for worker in those:
        worker.join(60)
    assert [worker.exitcode for worker in those] == [0] * workers
    assert made.value == PLAN.num
    assert files(tmp_path / "shared") == files(tmp_path / "alone")


def claimed(root: Path, shard: int, *, host: str = "elsewhere", pid: int = 1) -> Path:
    """The claim of a worker on another machine."""
    path = root / f"{CLAIM}pairs-{shard:06d}"
    root.mkdir(exist_ok=True)
    path.write_text(json.dumps({"host": host, "pid": pid, "beats": 0, "key": "ab"}))
    return path


def test_the_shard_of_a_worker_elsewhere_that_fell_silent_is_taken_over(tmp_path) -> None:
    make(tmp_path / "whole")
    cut = tmp_path / "cut"
    claimed(cut, 2)
    seen: list[bool] = []

    def looking(z: Tensor, cond: Cond) -> Tensor:
        seen.append(whole(cut, PLAN, 6))
        return draw(z, cond)

    began = time.monotonic()
    make(cut, draw=looking, timeout=0.3)
    assert time.monotonic() - began >= 0.3
    assert seen[-1] and not any(seen[:-3])  # the claimed one came last
    assert files(cut) == files(tmp_path / "whole")


def test_the_shard_of_a_process_that_is_no_more_is_taken_over_at_once(tmp_path) -> None:
    gone = CONTEXT.Process(target=time.sleep, args=(0,))
    gone.start()
    gone.join()
    claimed(tmp_path, 2, host=claim_files.socket.gethostname(), pid=gone.pid)
    (tmp_path / f"{CLAIM}pairs-000004").touch()  # one killed before it could write its name
    began = time.monotonic()
    make(tmp_path)
    assert time.monotonic() - began < 30
    assert not list(tmp_path.glob(f"{CLAIM}*"))


def test_a_claim_that_shows_life_is_let_be(tmp_path) -> None:
    folder = open_folder(tmp_path)
    slow, fast = Claims(folder, 0.3), Claims(folder, 0.3)
    with slow.take("a") as first:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            with fast.take("a") as second:
                assert first and not second
            time.sleep(0.05)
    with fast.take("a") as second:
        assert second


def test_a_claim_is_given_back_where_its_work_fails(tmp_path) -> None:
    claims = Claims(open_folder(tmp_path))
    with pytest.raises(UserError), claims.take("a"):
        raise UserError("no")
    assert not list(tmp_path.iterdir())


def test_an_object_store_gets_the_same_bytes(tmp_path) -> None:
    make(tmp_path)
    place = f"memory://{tmp_path.name}/pairs"
    folder = open_folder(place)
    told = make(place)
    assert told[-1] == (50, 50)
    assert {name: folder.read(name) for name in folder.sizes()} == files(tmp_path)
    folder.write(shard_name(2), folder.read(shard_name(2))[:-5])
    folder.remove(shard_name(3))
    assert make(place)[-1] == (50, 16)
    assert {name: folder.read(name) for name in folder.sizes()} == files(tmp_path)
    assert folder.create("new", b"a") and not folder.create("new", b"b")


def test_an_object_store_that_lets_two_claim_gets_the_same_bytes(tmp_path, monkeypatch) -> None:
    make(tmp_path)
    place = f"memory://{tmp_path.name}/twice"
    folder = open_folder(place)
    monkeypatch.setattr(type(folder), "create", lambda self, name, data: not self.beat(name, data))

    def other_first(z: Tensor, cond: Cond) -> Tensor:
        make_pairs(Unclaimed(folder), PLAN, of_noise(PLAN, draw), batch_size=9, told=print)
        return draw(z, cond)

    make(place, draw=other_first)
    assert {name: folder.read(name) for name in folder.sizes()} == files(tmp_path)


class Unclaimed:
    """A folder for a worker that never sees another's claims."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def __getattr__(self, name: str):
        return getattr(self.folder, name)


def test_a_url_that_nothing_reaches_is_told() -> None:
    with pytest.raises(UserError, match="pairs.path=nowhere://a/b: .*nowhere"):
        open_folder("nowhere://a/b")
