"""Decoded images: read at the scale that is needed, kept in memory for reuse, shared in RAM, or stored on disk.

Whether and where an image is cached never changes a picture: every way gives the same array.
"""

import mmap
import os
import random
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from utils.core.errors import UserError
from utils.core.files import atomic_write, cache_dir
from utils.core.log import LOGGER
from utils.core.machine import available_cores, free_memory
from utils.data.images import image_header, read_indexed_image

RECENT_BYTES = (
    160 * 2**20
)  # decoded images that one process keeps at hand: a window of them at COCO's sizes, and a quarter
SHARED_FOLDER = Path("/dev/shm")
_PREFIX = "yolov5-spd-"


def levels_for(long: np.ndarray, size: int) -> np.ndarray:
    """1, 2, 4 or 8 for each long side [n]: the coarsest decoding that still is at least `size` long."""
    levels = np.ones(len(long), np.int64)
    for level in (2, 4, 8):
        levels[-(-long // level) >= size] = level
    return levels


def reduced_hw(hw: tuple[int, int], level: int) -> tuple[int, int]:
    """Height and width at 1 / level, rounded up."""
    return -(-int(hw[0]) // level), -(-int(hw[1]) // level)


def read_reduced(path: Path, hw: tuple[int, int], level: int) -> np.ndarray:
    """Upright RGB at 1 / level of `hw`; a pixel is the mean of level x level source pixels, or as good as that."""
    whole = hw[0] % level == 0 and hw[1] % level == 0
    # a JPEG's partial last blocks would stand at the wrong side after a rotation
    direct = level > 1 and (whole or image_header(path).orientation == 1)
    image = read_indexed_image(path, reduce=level if direct else 1)
    expected = reduced_hw(hw, level)
    if image.shape[:2] == expected:
        return image
    if image.shape[:2] != tuple(hw):
        now, then = f"{image.shape[1]} x {image.shape[0]}", f"{hw[1]} x {hw[0]}"
        raise UserError(f"{path}: is {now} pixels now, was {then} when indexed; start again to index it anew")
    short = expected[0] * level - hw[0], expected[1] * level - hw[1]
    image = cv2.copyMakeBorder(image, 0, short[0], 0, short[1], cv2.BORDER_REPLICATE)
    return cv2.resize(image, expected[::-1], interpolation=cv2.INTER_AREA)


class Recent:
    """The images decoded last, in one block of memory that is written round and round.

    A block instead of many arrays, whose holes the allocator would not give back. What `get` returns is valid
    until the next call.
    """

    def __init__(self, limit: int = RECENT_BYTES) -> None:
        self.limit = limit
        self._block = np.empty(limit, np.uint8)  # pages are taken when first written
        self._arrays: dict[int, np.ndarray] = {}
        self._spans: deque[tuple[int, int]] = deque()  # key and start, oldest first
        self._head = 0

    def get(self, key: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        found = self._arrays.get(key)
        if found is not None:
            return found
        made = make()
        if made.nbytes > self.limit:
            return made
        kept = self._space(key, made.nbytes).reshape(made.shape)
        kept[...] = made
        self._arrays[key] = kept
        return kept

    def _space(self, key: int, size: int) -> np.ndarray:
        """`size` bytes of the block, at the expense of the oldest arrays."""
        start = self._head
        if start + size > self.limit:
            while self._spans and self._spans[0][1] >= start:  # what is left of the last round, up to the block's end
                del self._arrays[self._spans.popleft()[0]]
            start = 0
        while self._spans and start <= self._spans[0][1] < start + size:
            del self._arrays[self._spans.popleft()[0]]
        self._head = start + size
        self._spans.append((key, start))
        return self._block[start : self._head]


class Store(Protocol):
    """Decoded images by number."""

    def get(self, number: int) -> np.ndarray: ...

    def close(self) -> None: ...


Decode = Callable[[int], np.ndarray]


def _fill(numbers: Sequence[int], work: Callable[[int], None], what: str) -> None:
    """Run `work` for every number on all cores, with a progress line."""
    LOGGER.info(f"{what}: {len(numbers):,} images")
    with ThreadPoolExecutor(min(available_cores(), 16)) as pool:
        for done, _ in enumerate(pool.map(work, numbers, chunksize=8), 1):
            if done % 10_000 == 0:
                LOGGER.info(f"{what}: {done:,} of {len(numbers):,}")


class SharedMemory:
    """All images of an index in one block of shared memory, whatever the number of workers and local processes.

    The block is a file in /dev/shm, named by content. The first process fills it under a lock; every user holds a
    shared lock, which the kernel releases when a process dies, so that the last one, or the next run, can remove it.
    """

    def __init__(self, key: str, shapes: Sequence[tuple[int, int]], decode: Decode, hint: str = "--cache ram") -> None:
        self.shapes = np.asarray(shapes, np.int64).reshape(-1, 2)
        sizes = self.shapes.prod(1) * 3
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.path = SHARED_FOLDER / f"{_PREFIX}{os.getuid()}-{key}"
        self._hint = hint
        self._attach(decode)

    def _attach(self, decode: Decode | None) -> None:
        if not SHARED_FOLDER.is_dir():
            raise UserError(f"{self._hint} needs {SHARED_FOLDER}, which this system does not have; use --cache disk")
        import fcntl

        if decode is not None:
            remove_unused_blocks()
        total = int(self.starts[-1])
        while True:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._handle, fcntl.LOCK_SH)
            if self._ready(total):
                break
            if decode is None:
                raise UserError(f"{self.path} was removed while in use; start again")
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # others found it empty too: one of them will build it
                os.close(self._handle)
                time.sleep(random.uniform(0.01, 0.1))
                continue
            try:
                self._build(total, decode)
            except BaseException:
                self.path.unlink(missing_ok=True)
                raise
            finally:
                os.close(self._handle)
        self._map = mmap.mmap(self._handle, total + 1, prot=mmap.PROT_READ)
        self._pixels = np.frombuffer(self._map, np.uint8)

    def _ready(self, total: int) -> bool:
        """Whether the open file is complete (its last byte is written last) and still the one under its name."""
        there = os.fstat(self._handle)
        try:
            return there.st_size == total + 1 and os.path.samestat(there, os.stat(self.path))
        except FileNotFoundError:
            return False

    def _build(self, total: int, decode: Decode) -> None:
        room = min(free_memory(), shutil.disk_usage(SHARED_FOLDER).free)
        if total > 0.8 * room:
            needed, free = f"{total / 2**30:.1f} GiB", f"{room / 2**30:.1f} GiB"
            raise UserError(
                f"{self._hint}: the images need {needed} of shared memory, {free} are free "
                "(at most 80 % is taken); use --cache disk or no cache, or enlarge it (Docker: --shm-size)"
            )
        if total:
            os.posix_fallocate(self._handle, 0, total)  # an error here instead of a bus error later
            pixels = np.frombuffer(mmap.mmap(self._handle, total), np.uint8)

            def work(number: int) -> None:
                pixels[self.starts[number] : self.starts[number + 1]] = decode(number).reshape(-1)

            _fill(range(len(self.shapes)), work, f"{self._hint}: {total / 2**30:.1f} GiB, decoding")
        os.truncate(self._handle, total + 1)

    def get(self, number: int) -> np.ndarray:
        pixels = self._pixels[self.starts[number] : self.starts[number + 1]]
        return pixels.reshape(*self.shapes[number].tolist(), 3)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_handle", "_map", "_pixels")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._attach(None)

    def close(self) -> None:
        """Let go; the last user's memory is given back."""
        if self._handle >= 0:
            del self._pixels, self._map
            os.close(self._handle)
            self._handle = -1
            remove_unused_blocks()


def remove_unused_blocks() -> None:
    """Remove shared blocks of this user that no living process holds."""
    import fcntl

    for path in SHARED_FOLDER.glob(f"{_PREFIX}{os.getuid()}-*"):
        try:
            handle = os.open(path, os.O_RDWR)
        except FileNotFoundError:  # another process was quicker
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(handle)


class DiskStore:
    """Decoded images as raw files in the user's cache folder, named by the content of the image file.

    Large images are memory-mapped, so that a tile costs only its own pixels.
    """

    def __init__(
        self, key: str, files: Sequence[Path], shapes: Sequence[tuple[int, int]], levels: Sequence[int], decode: Decode
    ) -> None:
        self.shapes, self.levels = np.asarray(shapes, np.int64).reshape(-1, 2), np.asarray(levels, np.int8)
        self.folder = cache_dir("images")
        self.hashes = self._hashes(key, files)
        missing = [n for n in range(len(files)) if not self._complete(n)]
        if missing:
            self._room(int(self.shapes[missing].prod(1).sum()) * 3)
            _fill(missing, lambda n: self._write(n, decode(n)), "--cache disk: decoding")

    def _hashes(self, key: str, files: Sequence[Path]) -> np.ndarray:
        """Content hashes uint8 [n, 16], remembered under the index's key (path, size and mtime of every file)."""
        memo = cache_dir("images", "contents") / f"{key}.npy"
        if memo.exists():
            hashes = np.load(memo, allow_pickle=False)
            if hashes.shape == (len(files), 16):
                return hashes
        hashes = np.zeros((len(files), 16), np.uint8)

        def work(number: int) -> None:
            digest = blake2b(files[number].read_bytes(), digest_size=16).digest()
            hashes[number] = np.frombuffer(digest, np.uint8)

        _fill(range(len(files)), work, "--cache disk: reading")
        with atomic_write(memo) as file:
            np.save(file, hashes, allow_pickle=False)
        return hashes

    def _path(self, number: int) -> Path:
        name = self.hashes[number].tobytes().hex()
        return self.folder / name[:2] / f"{name}-{self.levels[number]}.rgb"

    def _complete(self, number: int) -> bool:
        path = self._path(number)
        return path.exists() and path.stat().st_size == int(self.shapes[number].prod()) * 3

    def _room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > 0.9 * free:
            raise UserError(
                f"--cache disk: the images need {needed / 2**30:.1f} GiB in {self.folder}, {free / 2**30:.1f} GiB are "
                "free; name a larger folder in YOLOV5_SPD_CACHE, or use no cache"
            )

    def _write(self, number: int, image: np.ndarray) -> None:
        with atomic_write(self._path(number)) as file:
            file.write(np.ascontiguousarray(image).data)

    def get(self, number: int) -> np.ndarray:
        return np.memmap(self._path(number), np.uint8, "r", shape=(*self.shapes[number].tolist(), 3))

    def close(self) -> None:
        """Nothing is held."""
