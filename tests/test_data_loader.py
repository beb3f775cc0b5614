"""The loader: order, resuming, sharing among processes, errors, closing."""

from __future__ import annotations

import threading
from itertools import islice

import pytest
import torch

from stepdistill.data.images import DataConfig, ImageSet, open_data
from stepdistill.data.loader import Loader
from stepdistill.data.order import batch_positions
from stepdistill.run.errors import UserError


class Slow(ImageSet):
    """Images that hold their own index, read by whichever thread asks."""

    name, shape, classes = "slow", (1, 2, 2), ("a", "b")

    def __init__(self, n: int = 10, bad: int | None = None, error: type[Exception] = OSError):
        self.n, self.bad, self.error = n, bad, error
        self.threads: set[str] = set()

    def __len__(self):
        return self.n

    def load(self, indices):
        self.threads.add(threading.current_thread().name)
        if self.bad in indices:
            raise self.error("the disk is gone")
        labels = torch.tensor(indices)
        return labels.float()[:, None, None, None].expand(-1, 1, 2, 2), labels


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_follow_the_order_for_any_number_of_workers(workers):
    data = Slow()
    with Loader(data, 4, seed=1, workers=workers) as loader:
        for step, x, label in islice(loader, 8):
            assert label.tolist() == batch_positions(step, 4, 10, seed=1).tolist()
            assert torch.equal(x[:, 0, 0, 0], label.float())
    assert ("MainThread" in data.threads) == (workers == 0)
    assert not running()


def test_a_resumed_loader_continues():
    with Loader(Slow(), 4, seed=1) as loader:
        whole = [label.tolist() for _, _, label in islice(loader, 6)]
    with Loader(Slow(), 4, seed=1, start=3) as loader:
        rest = [(step, label.tolist()) for step, _, label in islice(loader, 3)]
    assert rest == [(3 + i, batch) for i, batch in enumerate(whole[3:])]


def test_two_processes_make_up_the_batch():
    loaders = [Loader(open_data(DataConfig()), 6, 0, rank=rank, world=2) for rank in range(2)]
    alone = Loader(open_data(DataConfig()), 6, 0)
    for (_, left, _), (_, right, _), (_, both, _) in islice(zip(*loaders, alone, strict=True), 3):
        assert torch.equal(torch.cat([left, right]), both)


def test_sets_in_memory_need_no_thread():
    with Loader(open_data(DataConfig()), 6, 0, workers=4) as loader:
        next(loader)
        assert not running()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_reaches_the_main_thread(workers):
    order = batch_positions(0, 10, 10, seed=0)
    with Loader(Slow(bad=int(order[7])), 2, 0, workers=workers) as loader:
        assert [step for step, _, _ in islice(loader, 3)] == [0, 1, 2]
        for _ in range(2):  # the step is not passed over when it is asked for again
            with pytest.raises(UserError, match="data slow: step 3 cannot be read: the disk is"):
                next(loader)
    assert not running()


def test_a_mistake_in_the_code_is_not_the_users_error():
    with Loader(Slow(bad=0, error=AttributeError), 10, 0) as loader:
        with pytest.raises(AttributeError):
            next(loader)


def test_closing_early_ends_the_threads():
    loader = Loader(Slow(), 2, 0, workers=3)
    next(loader)
    assert running()
    loader.close()
    assert not running()
