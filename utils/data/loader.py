"""Batches: which samples form them is decided here, in one process; workers only do what they are told.

A request names epoch, positions and images of one batch, so a worker keeps no state, and the same global batches come
from any number of workers and processes, from any step on.
"""

import contextlib
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from utils.core.errors import UserError
from utils.data.augment import generator
from utils.data.dataset import DetectionDataset, Sample
from utils.data.order import ORDER, aspect_order, batch_shape, before, epoch_order, eval_batches
from utils.ops.letterbox import Letterbox

__all__ = ["Batch", "EvalLoader", "TrainLoader", "epoch_order"]

TIMEOUT = 600  # seconds without a batch after which a loader gives up
PREFETCH = 2  # batches that each worker prepares ahead


@dataclass(frozen=True)
class Request:
    """One batch: epoch, positions and dataset indices [b], shape (h, w) or None, partner candidates of each or None."""

    epoch: int
    positions: np.ndarray
    indices: np.ndarray
    hw: tuple[int, int] | None = None
    windows: tuple[np.ndarray, ...] | None = None


@dataclass(frozen=True)
class Failure:
    """What a worker could not do, in one line."""

    message: str


@dataclass(frozen=True)
class Batch:
    """images uint8 [B, 3, H, W] in channels-last memory; targets float32 [M, 6]: image number in the batch, class,
    cx, cy, w, h in parts of the image; dataset indices int64 [B]; letterboxes (None where augmented)."""

    images: Tensor
    targets: Tensor
    indices: Tensor
    geometries: list[Letterbox | None]

    def __len__(self) -> int:
        return len(self.images)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(self, images=change(self.images), targets=change(self.targets), indices=change(self.indices))

    def pin_memory(self) -> "Batch":
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> "Batch":
        """On `device`; from pinned memory without waiting."""
        return self._each(lambda t: t.to(device, non_blocking=True))


def collate(samples: Sequence[Sample], images: Tensor | None = None) -> Batch:
    """Join samples of one size. `images` uint8 [B, H, W, 3] already holds their pixels where given."""
    if images is None:
        images = torch.from_numpy(np.stack([sample.image for sample in samples]))
    targets = np.zeros((sum(len(s.cls) for s in samples), 6), np.float32)
    if samples:
        targets[:, 0] = np.repeat(np.arange(len(samples)), [len(s.cls) for s in samples])
        targets[:, 1] = np.concatenate([s.cls for s in samples])
        targets[:, 2:] = np.concatenate([s.cxcywh for s in samples])
    indices = torch.tensor([s.index for s in samples], dtype=torch.int64)
    return Batch(images.permute(0, 3, 1, 2), torch.from_numpy(targets), indices, [s.geometry for s in samples])


class _Reader:
    """Answers requests; what the loader's processes run."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, request: Request) -> Batch | Failure:
        dataset = self.dataset
        shape = (len(request.indices), *(request.hw or (dataset.imgsz,) * 2), 3)
        if torch.utils.data.get_worker_info() is not None and len(request.indices):
            # drawn where the other process will see it, not copied there
            images = torch.empty(shape, dtype=torch.uint8).share_memory_()
        else:
            # torch's aligned blocks fit no hole that an equal one left, so that the process would grow
            images = torch.from_numpy(np.empty(shape, np.uint8))
        rows = images.numpy()
        try:
            samples = [
                dataset.sample(
                    request.epoch,
                    int(position),
                    int(i),
                    window=request.windows[row] if request.windows else None,
                    hw=request.hw,
                    out=rows[row],
                )
                for row, (position, i) in enumerate(zip(request.positions, request.indices, strict=True))
            ]
        except (UserError, OSError) as error:
            return Failure(str(error))
        return collate(samples, images)


class _Requests(Sampler):
    """The requests of the epoch at hand; a new list each time the loader is iterated."""

    def __init__(self) -> None:
        self.pending: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.pending


def _identity(batch: Batch | Failure) -> Batch | Failure:
    return batch


def _start_worker(_: int) -> None:
    import cv2

    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Torch's workers look at the number of their parent, which with start method forkserver is not the loader's."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Pump:
    """A torch DataLoader that is fed requests: in this process, or in persistent workers."""

    def __init__(
        self, dataset: DetectionDataset, workers: int, batch: int, start_method: str | None, timeout: float
    ) -> None:
        if workers:
            _check_shared_memory(workers, batch, dataset.imgsz)
        self.requests, self.workers, self.timeout = _Requests(), workers, timeout
        self.loader = DataLoader(
            _Reader(dataset),  # type: ignore[arg-type]
            batch_size=None,
            sampler=self.requests,
            collate_fn=_identity,  # type: ignore[arg-type]
            num_workers=workers,
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers else None,
            timeout=timeout if workers else 0,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=start_method if workers else None,
            generator=torch.Generator(),  # torch draws a seed here, which must not touch the global state
        )

    def run(self, requests: Iterator[Request]) -> Iterator[Batch]:
        self.requests.pending = requests
        try:
            for batch in self.loader:
                if isinstance(batch, Failure):
                    raise UserError(batch.message)
                yield batch
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            raise UserError(_explain(str(error), self.workers, self.timeout)) from error

    def close(self) -> None:
        """End the workers; one that dies meanwhile is no news."""
        iterator = getattr(self.loader, "_iterator", None)
        if iterator is not None and self.workers:
            with contextlib.suppress(RuntimeError):
                iterator._shutdown_workers()
        self.loader._iterator = None


def _explain(message: str, workers: int, timeout: float) -> str:
    if "timed out" in message:
        return f"no batch came from {workers} workers in {timeout:.0f} s; check the disk, or use --workers 0 to see why"
    if "ulimit" in message or "shared memory" in message or "Bus error" in message:
        return (
            "a data worker ran out of /dev/shm (shared memory); use fewer --workers or enlarge it (Docker: --shm-size)"
        )
    return f"a data worker ended ({message.splitlines()[0]}); often the memory is short: use fewer --workers"


def _check_shared_memory(workers: int, batch: int, imgsz: int) -> None:
    """Batches travel through /dev/shm; too small a one kills workers with a bus error."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    needed = (workers * PREFETCH + 1) * batch * imgsz * imgsz * 3
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{workers} workers with batches of {batch} at {imgsz} px need {needed / 2**20:.0f} MiB of shared memory, "
            f"/dev/shm has {free / 2**20:.0f} MiB free; use fewer --workers or enlarge it (Docker: --shm-size)"
        )


class TrainLoader:
    """The batches of each epoch. `batch_size` is that of all processes together; this one gets the rows rank,
    rank + world_size, ... of each, possibly none. The last batch may be smaller."""

    def __init__(
        self,
        dataset: DetectionDataset,
        batch_size: int,
        *,
        workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        weights: np.ndarray | None = None,
        shuffle: bool = True,
        start_method: str | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        assert batch_size > 0 and 0 <= rank < world_size
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size, self.weights, self.shuffle = rank, world_size, weights, shuffle
        self._pump = _Pump(dataset, workers, -(-batch_size // world_size), start_method, timeout)

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """Dataset indices by position, int64 [n]. `weights` may be changed between epochs."""
        n = len(self.dataset)
        if self.dataset.rect:
            ordered = aspect_order(self.dataset.shapes)
            if not self.shuffle:
                return ordered
            # whole batches change places, the incomplete one stays last
            full = n // self.batch_size
            blocks = generator(self.seed, ORDER, epoch).permutation(full)
            rows = ordered[: full * self.batch_size].reshape(full, self.batch_size)[blocks].reshape(-1)
            return np.concatenate([rows, ordered[full * self.batch_size :]])
        if not self.shuffle:
            return np.arange(n)
        return epoch_order(n, self.seed, epoch, self.weights)

    def _request(self, epoch: int, step: int, order: np.ndarray) -> Request:
        dataset = self.dataset
        everyone = np.arange(step * self.batch_size, min((step + 1) * self.batch_size, len(order)))
        hw = None
        if dataset.rect:
            hw = batch_shape(dataset.shapes[order[everyone]], dataset.imgsz, dataset.stride, dataset.pad)
        mine = everyone[self.rank :: self.world_size]
        # the dataset knows the plain shuffled order itself
        known = self.shuffle and self.weights is None and not dataset.rect and self.seed == dataset.seed
        windows = None if known else tuple(before(order, int(p), dataset.hyp.mosaic_window) for p in mine)
        return Request(epoch, mine, order[mine], hw, windows)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on."""
        order = self.order(epoch)
        return self._pump.run(self._request(epoch, step, order) for step in range(start_step, len(self)))

    def close(self) -> None:
        self._pump.close()


class EvalLoader:
    """All items once, in order (`eval_batches` where `dataset.rect`), in the batches that one process would form; batch
    b goes to rank b % world_size."""

    def __init__(
        self,
        dataset: DetectionDataset,
        batch_size: int,
        *,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_method: str | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        assert batch_size > 0 and 0 <= rank < world_size
        self.dataset, self.batch_size, self.rank, self.world_size = dataset, batch_size, rank, world_size
        self._pump = _Pump(dataset, workers, batch_size, start_method, timeout)
        batches: list[tuple[np.ndarray, tuple[int, int] | None]]
        if dataset.rect:
            batches = [*eval_batches(dataset.shapes, batch_size, dataset.imgsz, dataset.stride, dataset.pad)]
        else:
            n = len(dataset)
            batches = [(np.arange(i, min(i + batch_size, n)), None) for i in range(0, n, batch_size)]
        starts = np.cumsum([0] + [len(indices) for indices, _ in batches])
        positions = [np.arange(i, j) for i, j in zip(starts[:-1], starts[1:], strict=True)]
        requests = [Request(0, at, *batch) for at, batch in zip(positions, batches, strict=True)]
        self._requests = requests[rank::world_size]

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Batch]:
        return self._pump.run(iter(self._requests))

    def close(self) -> None:
        self._pump.close()
