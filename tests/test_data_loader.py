"""Batches: the same from any number of workers and processes, from any step on; empty and last ones included."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.samples import make_index
from utils.core.device import loader_workers
from utils.core.errors import UserError
from utils.core.hyp import Hyp
from utils.data.dataset import DetectionDataset
from utils.data.loader import Batch, EvalLoader, TrainLoader, epoch_order

HYP = Hyp(mosaic=0.7, mixup=0.3)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("loader") / "set", 11)


def train(index, batch=4, **options):
    rect = options.pop("rect", False)
    return TrainLoader(DetectionDataset(index, 64, HYP, augment=True, rect=rect), batch, **options)


def batches(loader, epoch=0, start=0):
    found = [
        Batch(b.images.clone(), b.targets.clone(), b.indices.clone(), b.geometries) for b in loader.epoch(epoch, start)
    ]
    return found


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("images", "targets", "indices"))


def test_batches_are_what_the_network_wants(index):
    loader = train(index)
    found = batches(loader)
    assert [len(b) for b in found] == [4, 4, 3] and len(loader) == 3
    for batch in found:
        assert batch.images.dtype == torch.uint8 and batch.images.shape[1:] == (3, 64, 64)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.targets.shape[1] == 6 and batch.targets.dtype == torch.float32
        assert (batch.targets[:, 0].diff() >= 0).all() and batch.targets[:, 0].max() < len(batch)
        assert batch.geometries == [None] * len(batch)
    assert sorted(torch.cat([b.indices for b in found]).tolist()) == list(range(11))
    assert torch.cat([b.indices for b in found]).tolist() == epoch_order(11, 0, 0).tolist()
    moved = found[0].to("cpu")
    assert same(moved, found[0]) and len(moved) == 4


def test_workers_do_not_change_a_batch(index):
    alone = [batches(train(index), epoch) for epoch in range(2)]
    loader = train(index, workers=2, start_method="fork")
    try:
        for epoch in range(2):
            assert all(same(a, b) for a, b in zip(alone[epoch], batches(loader, epoch), strict=True))
        resumed = batches(loader, 1, start=2)  # after an epoch that another iteration left unfinished
        next(iter(loader.epoch(0)))
        assert same(batches(loader, 1, 1)[0], alone[1][1]) and same(resumed[0], alone[1][2])
    finally:
        loader.close()


def test_spawned_workers_do_not_change_a_batch(index):
    loader = train(index, workers=1, start_method="spawn")
    try:
        assert all(same(a, b) for a, b in zip(batches(train(index)), batches(loader), strict=True))
    finally:
        loader.close()


def test_loading_leaves_the_global_random_state_alone(index):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches(train(index))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_the_global_batches(index, world):
    whole = batches(train(index))
    parts = [batches(train(index, rank=r, world_size=world)) for r in range(world)]
    for step, batch in enumerate(whole):
        for rank in range(world):
            mine = parts[rank][step]
            assert torch.equal(mine.images, batch.images[rank::world])
            assert torch.equal(mine.indices, batch.indices[rank::world])
    assert len(parts[-1][-1]) == 0 or world < 4
    if world == 5:  # the last batch has three images
        empty = parts[4][-1]
        assert empty.images.shape == (0, 3, 64, 64) and empty.targets.shape == (0, 6) and empty.geometries == []


def test_weights_and_plain_order(index):
    weights = np.zeros(11)
    weights[[2, 5]] = 1
    weighted = train(index, weights=weights)
    assert set(torch.cat([b.indices for b in batches(weighted)]).tolist()) == {2, 5}
    request = weighted._request(0, 0, weighted.order(0))
    assert all(set(w) <= {2, 5} for w in request.windows), "mosaic partners follow the weights"
    plain = torch.cat([b.indices for b in batches(train(index, shuffle=False))])
    assert plain.tolist() == list(range(11))


def test_rect_batches_have_shapes_of_their_own(index):
    ordered, shuffled = (batches(train(index, 2, rect=True, shuffle=s)) for s in (False, True))
    shapes = [tuple(b.images.shape[2:]) for b in ordered]
    assert len(set(shapes)) > 1 and all(max(s) == 64 and s[0] % 32 == s[1] % 32 == 0 for s in shapes)
    assert sorted(torch.cat([b.indices for b in shuffled]).tolist()) == list(range(11))
    assert sorted(map(str, shapes)) == sorted(str(tuple(b.images.shape[2:])) for b in shuffled)


@pytest.mark.parametrize("rect", [False, True])
def test_evaluation_deals_out_whole_batches(index, rect):
    def loader(**options):
        return EvalLoader(DetectionDataset(index, 64, HYP, augment=False, rect=rect, pad=0.5 * rect), 4, **options)

    whole = list(loader())
    assert sorted(torch.cat([b.indices for b in whole]).tolist()) == list(range(11)) and len(loader()) == 3
    for world in (2, 4):
        for rank in range(world):
            mine = list(loader(rank=rank, world_size=world))
            assert len(mine) == len(loader(rank=rank, world_size=world)) == len(whole[rank::world])
            assert all(same(a, b) for a, b in zip(mine, whole[rank::world], strict=True))
    for batch in whole:
        for row, geometry in enumerate(batch.geometries):
            assert geometry.target_hw == tuple(batch.images.shape[2:])
            assert geometry.source_hw == tuple(index.shapes[batch.indices[row]])
    again = loader(workers=1)
    try:
        for _ in range(2):
            assert all(same(a, b) for a, b in zip(again, whole, strict=True))
    finally:
        again.close()


class Broken(DetectionDataset):
    """Fails on one image, in the ways that a worker can."""

    how = "error"

    def pixels(self, i):
        if i == 3:
            if self.how == "error":
                raise UserError("images/003.jpg: is broken; replace it")
            if self.how == "hang":
                import time

                time.sleep(4)
            os._exit(1)
        return super().pixels(i)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_could_not_read_is_said_in_one_line(index, workers):
    loader = TrainLoader(Broken(index, 64, HYP, augment=True), 4, workers=workers)
    with pytest.raises(UserError, match=r"^images/003.jpg: is broken; replace it$"):
        batches(loader)
    loader.close()


@pytest.mark.parametrize(
    "how, message", [("die", "a data worker ended"), ("hang", "no batch came from 1 workers in 2 s")]
)
def test_a_worker_that_dies_or_hangs_ends_the_run(index, how, message):
    dataset = Broken(index, 64, HYP, augment=True)
    dataset.how = how
    loader = TrainLoader(dataset, 4, workers=1, timeout=2 if how == "hang" else 60)
    with pytest.raises(UserError, match=message):
        batches(loader)
    loader.close()


def _load_forever(index, pids):
    loader = TrainLoader(DetectionDataset(index, 64, HYP, augment=True), 4, workers=2, start_method="forkserver")
    for _ in loader.epoch(0):
        for worker in loader._pump.loader._iterator._workers:
            pids.put(worker.pid)
        time.sleep(100)


def test_workers_end_with_a_process_that_is_killed(index):
    """Under forkserver, too, where their parent by number is another one."""
    context = multiprocessing.get_context("forkserver")
    pids = context.Queue()
    process = context.Process(target=_load_forever, args=(index, pids))
    process.start()
    workers = [pids.get(timeout=120) for _ in range(2)]
    process.kill()
    process.join()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/exe").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in workers)


def test_too_little_shared_memory_is_said_before_workers_start(index, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**20})())
    with pytest.raises(UserError, match="need 1 MiB of shared memory|/dev/shm has 1 MiB free"):
        train(index, batch=64, workers=8)
    train(index, batch=64, workers=0)


@pytest.mark.parametrize(
    ("asked", "batch", "ranks", "workers"),
    [(8, 16, 1, 3), (2, 16, 1, 2), (8, 1, 1, 1), (0, 16, 1, 0), (8, 16, 2, 1), (8, 16, 8, 1)],
)
def test_workers_are_bounded_by_the_cores_that_may_be_used(monkeypatch, asked, batch, ranks, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert loader_workers(asked, batch) == workers


@pytest.mark.slow
def test_workers_add_little_memory_and_it_does_not_grow():
    """PSS of the process tree over an index of 100,000 images."""
    from benchmarks.loader_memory import measure_apart

    alone, four = (measure_apart(workers, 100_000, 60, 3) for workers in (0, 4))
    assert (four[-1] - alone[-1]) / 4 < 350 * 2**20
    assert four[-1] < 1.02 * four[0] and alone[-1] < 1.02 * alone[0]
