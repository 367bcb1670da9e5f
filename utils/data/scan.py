"""Looking at every image and label file once, on all cores.

`scan` gives packed arrays for a list of images. Long lists are dealt out to child processes that run this very module
(`python -m utils.data.scan`) and speak JSON and npz over pipes: nothing is forked while threads run, nothing imports
the calling program again, and a child needs neither torch nor the network.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO

import numpy as np

from utils.core.machine import available_cores
from utils.data.images import (
    MAX_MISSING,
    Header,
    ImageError,
    decode_image,
    image_header,
    missing_share,
    read_regular,
    reason,
)
from utils.data.labels import Labels, judge, no_labels, read_yolo, settle
from utils.data.problems import LEFT_OUT, USED, Problem

CHUNK = 512
SMALL, SMALL_TO_VERIFY = 4000, 200  # images: below this, starting processes costs more than it saves
_SUFFIX_FORMATS = {
    ".jpg": "jpeg", ".jpeg": "jpeg", ".jpe": "jpeg", ".jfif": "jpeg", ".mpo": "jpeg", ".png": "png", ".gif": "gif",
    ".bmp": "bmp", ".dib": "bmp", ".webp": "webp", ".tif": "tiff", ".tiff": "tiff", ".jp2": "jp2", ".avif": "avif",
}  # fmt: skip
TINY_PX = 10
_NO_HEADER = Header("", 0, 0)


@dataclass(frozen=True)
class Job:
    """How to look at files. `labels`: yolo, voc, or none (sizes only)."""

    labels: str
    policy: str
    names: tuple[str, ...]
    single_cls: bool = False
    verify: bool = False  # decode every image, and take a hash of its content


@dataclass
class Scan:
    """What was found, one row an image and one an object, in the order of the images; packed for transport."""

    ok: np.ndarray  # bool [n]: the image can be used; the others have no objects
    hw: np.ndarray  # int32 [n, 2], upright
    orientation: np.ndarray  # uint8 [n], EXIF
    has_file: np.ndarray  # bool [n]: there is a label file
    digest: np.ndarray  # uint8 [n, 16] of the content, zeros unless verified
    count: np.ndarray  # int32 [n] objects
    cls: np.ndarray  # int32 [m]
    xyxy: np.ndarray  # float32 [m, 4]
    area: np.ndarray  # float64 [m]
    crowd: np.ndarray  # bool [m]
    poly_count: np.ndarray  # int32 [m] points
    poly_xy: np.ndarray  # float32 [k, 2]
    problems: list[Problem] = field(default_factory=list)


class Packer:
    """Gathers the labels of one image after another."""

    def __init__(self) -> None:
        self._images: list[tuple] = []
        self._labels: list[Labels] = []
        self.problems: list[Problem] = []

    def add(self, ok: bool, header: Header, has_file: bool, digest: bytes, labels: Labels) -> None:
        """Append an image; one that is not `ok` must come without objects."""
        row = (ok, header.height, header.width, header.orientation, has_file, len(labels), digest)
        self._images.append(row)
        if len(labels):
            self._labels.append(labels)

    def pack(self) -> Scan:
        """Everything so far as arrays."""
        rows = np.array([row[:6] for row in self._images], np.int64).reshape(-1, 6)
        some = self._labels
        xyxy = _join([x.xyxy for x in some], (0, 4), np.float64)
        wh = xyxy[:, 2:] - xyxy[:, :2]
        area = [x.area if x.area is not None else np.full(len(x), np.nan) for x in some]
        areas = _join(area, (0,), np.float64)
        crowd = [x.crowd if x.crowd is not None else np.zeros(len(x), bool) for x in some]
        points = [[len(p) for p in x.polygons] if x.polygons is not None else [0] * len(x) for x in some]
        polygons = [p for x in some if x.polygons is not None for p in x.polygons if len(p)]
        return Scan(
            ok=rows[:, 0].astype(bool),
            hw=rows[:, 1:3].astype(np.int32),
            orientation=rows[:, 3].astype(np.uint8),
            has_file=rows[:, 4].astype(bool),
            digest=np.frombuffer(b"".join(row[6] for row in self._images), np.uint8).reshape(-1, 16),
            count=rows[:, 5].astype(np.int32),
            cls=_join([x.cls for x in some], (0,), np.int32),
            xyxy=xyxy.astype(np.float32),
            area=np.where(np.isnan(areas), wh[:, 0] * wh[:, 1], areas),
            crowd=_join(crowd, (0,), bool),
            poly_count=np.array([n for counts in points for n in counts], np.int32),
            poly_xy=_join(polygons, (0, 2), np.float32),
            problems=self.problems,
        )


def _join(parts: list, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(shape, dtype)


def merge(scans: Sequence[Scan]) -> Scan:
    """Scans of consecutive runs of images as one."""
    arrays = [f.name for f in fields(Scan) if f.name != "problems"]
    joined = {name: np.concatenate([getattr(scan, name) for scan in scans]) for name in arrays}
    return Scan(**joined, problems=[problem for scan in scans for problem in scan.problems])


# ---------------------------------------------------------------------------------------------------- one image


def scan_here(job: Job, pairs: Sequence[tuple[str, str]]) -> Scan:
    """Look at (image, label file) pairs in this process."""
    packer = Packer()
    for image, label in pairs:
        _scan_one(job, image, label, packer)
    return packer.pack()


def _scan_one(job: Job, image: str, label: str, packer: Packer) -> None:
    header, digest = look_at_image(image, job.verify, packer.problems)
    if header is None:
        packer.add(False, _NO_HEADER, False, digest, no_labels())
        return
    hw = header.height, header.width
    if job.labels == "none":
        packer.add(True, header, False, digest, no_labels())
        return
    nc = 0 if job.single_cls else len(job.names)
    if job.labels == "voc":
        from utils.data.voc import read_voc

        labels, issues, has_file = read_voc(label, hw, job.names)
    else:
        labels, issues, has_file = read_yolo(label, hw, nc)
    if len(labels):
        labels, more = settle(labels, hw, job.policy)
        issues += more
    ok = True
    if issues:
        problems, out = judge(label, issues, job.policy)
        packer.problems += problems
        ok = not out
    if job.single_cls:
        labels.cls[:] = 0
    packer.add(ok, header, has_file, digest, labels if ok else no_labels())


def look_at_image(path: str, verify: bool, problems: list[Problem]) -> tuple[Header | None, bytes]:
    """The header of an image that can be used, else None and a problem; and its content's digest if `verify`."""
    digest = bytes(16)
    try:
        header = image_header(path)
        if verify or not header.complete:
            data = read_regular(path)
            digest = hashlib.blake2b(data, digest_size=16).digest() if verify else digest
            if not header.complete and not _enough_left(path, header, data, problems):
                return None, digest
            if verify:
                decode_image(data)
    except FileNotFoundError:
        detail = "is a link to nothing" if os.path.islink(path) else "does not exist"
        problems.append(Problem("image-missing", path, LEFT_OUT, detail))
        return None, digest
    except (OSError, ImageError) as error:
        problems.append(Problem("image-unreadable", path, LEFT_OUT, reason(error)))
        return None, digest
    said = _SUFFIX_FORMATS.get(os.path.splitext(path)[1].lower())
    if said is not None and said != header.format:
        detail = f"is {header.format.upper()} under the suffix of a {said.upper()} file"
        problems.append(Problem("image-misnamed", path, USED, detail))
    if min(header.height, header.width) < TINY_PX:
        problems.append(Problem("image-tiny", path, USED, f"has {header.width} x {header.height} px"))
    return header, digest


def _enough_left(path: str, header: Header, data: bytes, problems: list[Problem]) -> bool:
    """Decide on an image without its end marker; ImageError where it cannot be decoded."""
    if header.format != "jpeg":
        decode_image(data)
        return True
    share = missing_share(data)
    if share is not None:
        out = share > MAX_MISSING
        detail = f"ends too early: {share:.0%} of its rows are missing"
        problems.append(Problem("image-truncated", path, LEFT_OUT if out else USED, detail))
        return not out
    return True


# ---------------------------------------------------------------------------------------------------- many images


def scan(
    job: Job,
    pairs: Sequence[tuple[str, str]],
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Scan:
    """Look at (image, label file) pairs on `workers` processes (default: all cores; 0: in this one).

    `progress` is called with the number of images that were done since its last call.
    """
    if workers is None:
        workers = available_cores() if len(pairs) > (SMALL_TO_VERIFY if job.verify else SMALL) else 0
    size = max(16, min(CHUNK, len(pairs) // (4 * workers) + 1)) if workers > 1 else CHUNK
    chunks = [pairs[i : i + size] for i in range(0, len(pairs), size)] or [pairs]
    if workers <= 1:
        scans = []
        for chunk in chunks:
            scans.append(scan_here(job, chunk))
            if progress:
                progress(len(chunk))
        return merge(scans)
    return merge(_scan_in_children(job, chunks, workers, progress))


def _scan_in_children(
    job: Job, chunks: list[Sequence[tuple[str, str]]], workers: int, progress: Callable[[int], object] | None
) -> list[Scan]:
    """Deal the chunks out to children, each fed by a thread of its own."""
    results: list[Scan | None] = [None] * len(chunks)
    todo = iter(range(len(chunks)))  # `next` on it is atomic
    stop = threading.Event()

    def feed() -> None:
        with _Child(job) as child:
            for number in todo:
                if stop.is_set():
                    return
                results[number] = child.ask(chunks[number])
                if progress:
                    progress(len(chunks[number]))

    count = min(workers, len(chunks))
    with ThreadPoolExecutor(count) as pool:
        try:
            for future in [pool.submit(feed) for _ in range(count)]:
                future.result()
        finally:  # an error or Ctrl-C: the others end after their chunk
            stop.set()
    return [result for result in results if result is not None]


class _Child:
    """A process that scans what it is asked to, until its input ends."""

    def __init__(self, job: Job) -> None:
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "utils.data.scan"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin and self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        self._unsent = json.dumps(asdict(job)).encode()

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._to.close()
        self._from.close()
        self._process.wait()

    def ask(self, chunk: Sequence[tuple[str, str]]) -> Scan:
        """What the child finds in a chunk."""
        try:
            if self._unsent:
                _send(self._to, self._unsent)
                self._unsent = b""
            _send(self._to, json.dumps(chunk).encode())
            answer = _receive(self._from)
        except BrokenPipeError:
            answer = None
        if answer is None:
            raise RuntimeError(f"a scanning process ended early (exit code {self._process.wait()})")
        return unpack_scan(answer)


def pack_scan(scan: Scan) -> bytes:
    """A Scan as the bytes of an npz."""
    arrays = {f.name: getattr(scan, f.name) for f in fields(Scan) if f.name != "problems"}
    text = json.dumps([asdict(problem) for problem in scan.problems])
    buffer = io.BytesIO()
    np.savez(buffer, problems=np.frombuffer(text.encode(), np.uint8), **arrays)
    return buffer.getvalue()


def unpack_scan(data: bytes) -> Scan:
    """The inverse of `pack_scan`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        problems = [Problem(**problem) for problem in json.loads(arrays["problems"].tobytes())]
        return Scan(**{f.name: arrays[f.name] for f in fields(Scan) if f.name != "problems"}, problems=problems)


def _send(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(struct.pack("<Q", len(data)) + data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes | None:
    head = pipe.read(8)
    if len(head) < 8:
        return None
    size = struct.unpack("<Q", head)[0]
    data = pipe.read(size)
    return data if len(data) == size else None


def _serve() -> None:
    """The child: a job, then chunks, until the input ends. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, target = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever prints must not disturb the pipe
    first = _receive(source)
    if first is None:
        return
    values = json.loads(first)
    job = Job(**{**values, "names": tuple(values["names"])})
    while (chunk := _receive(source)) is not None:
        _send(target, pack_scan(scan_here(job, [tuple(pair) for pair in json.loads(chunk)])))


if __name__ == "__main__":
    _serve()
