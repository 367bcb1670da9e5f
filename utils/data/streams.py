"""Live streams: webcams and network cameras, one reader thread each that keeps only the newest frame.

A stream that fails is tried again with growing pauses while the others go on; passwords in addresses are never shown.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from utils.core.errors import UserError
from utils.core.log import LOGGER
from utils.data.frames import Frame, Tally, redact

OPEN_TIMEOUT_MS = 10_000
READ_TIMEOUT_MS = 10_000
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0


class Capture(Protocol):
    """The part of cv2.VideoCapture that a reader needs."""

    def grab(self) -> bool: ...

    def retrieve(self) -> tuple[bool, np.ndarray]: ...

    def get(self, propId: int, /) -> float: ...

    def release(self) -> None: ...


Opener = Callable[[str], "Capture | None"]


def open_capture(address: str) -> Capture | None:
    """A capture for a URL or webcam number, or None if it cannot be opened now."""
    quiet_decoder()
    if address.isdigit():
        capture = cv2.VideoCapture(int(address))
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
    else:
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPEN_TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, READ_TIMEOUT_MS]
        capture = cv2.VideoCapture(address, cv2.CAP_FFMPEG, limits)
    if capture.isOpened():
        return capture
    capture.release()
    return None


def finite_fps(value: float) -> float:
    """A frame rate as containers and cameras report it, 0 where it is nonsense."""
    return float(value) if math.isfinite(value) and 0 < value <= 1000 else 0.0


def quiet_decoder() -> None:
    """Keep OpenCV and its decoder from writing to the terminal: their messages can hold whole URLs with passwords."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


@dataclass(frozen=True, eq=False)
class _Newest:
    """The latest undelivered picture of one stream, BGR as the capture gave it."""

    image: np.ndarray
    index: int
    timestamp: float
    fps: float


class _Reader(threading.Thread):
    """Reads one stream until stopped or given up; `take` hands out the newest frame once."""

    def __init__(
        self, address: str, label: str, changed: threading.Condition, opener: Opener, stride: int, give_up: float
    ) -> None:
        super().__init__(name=f"reader of {label}", daemon=True)
        self.label = label
        self.dead = False
        self._address, self._opener, self._stride, self._give_up = address, opener, stride, give_up
        self._changed = changed
        self._stop_event = threading.Event()
        self._newest: _Newest | None = None
        self._count = 0  # frames that came, the skipped ones too
        self._pictures = 0

    def stop(self) -> None:
        self._stop_event.set()

    def take(self) -> _Newest | None:
        """The newest frame if it was not taken yet. Call with the condition held."""
        newest, self._newest = self._newest, None
        return newest

    def run(self) -> None:
        pause, last = FIRST_PAUSE, time.monotonic()
        while not self._stop_event.is_set():
            before = self._pictures
            self._read_connection()
            if self._stop_event.is_set():
                break
            if self._pictures > before:
                pause, last = FIRST_PAUSE, time.monotonic()
            silent = time.monotonic() - last
            if self._give_up:
                if silent >= self._give_up:
                    LOGGER.warning(f"{self.label}: given up after {silent:.0f} s without a frame")
                    break
                pause = min(pause, self._give_up - silent)
            what = "connection lost" if self._count else "cannot connect"
            LOGGER.warning(f"{self.label}: {what}, trying again in {pause:.2g} s")
            self._stop_event.wait(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
        with self._changed:
            self.dead = True
            self._changed.notify_all()

    def _read_connection(self) -> None:
        """Read from one connection until it ends."""
        capture = self._opener(self._address)
        if capture is None:
            return
        try:
            if self._count:
                LOGGER.info(f"{self.label}: connected again")
            fps = finite_fps(capture.get(cv2.CAP_PROP_FPS))
            while not self._stop_event.is_set() and capture.grab():
                self._count += 1
                if (self._count - 1) % self._stride:
                    continue
                ok, image = capture.retrieve()
                if not ok:
                    return
                self._pictures += 1
                newest = _Newest(image, self._count, time.time(), fps)
                with self._changed:
                    self._newest = newest
                    self._changed.notify_all()
        except cv2.error as error:
            LOGGER.warning(f"{self.label}: decoder failed with code {error.code}")
        finally:
            capture.release()


class StreamSource:
    """Several live streams at once. Each round gives the newest frame of every stream that has one."""

    live = True

    def __init__(
        self, addresses: Sequence[str], *, stride: int = 1, give_up: float = 60.0, opener: Opener = open_capture
    ) -> None:
        self.items = len(addresses)
        self.tally = Tally()
        self.files: tuple[Path, ...] = ()
        self._names = [f"webcam {a}" if a.isdigit() else redact(a) for a in addresses]
        self._changed = threading.Condition()
        self._readers = [
            _Reader(address, f"stream {n}/{self.items} {name}", self._changed, opener, stride, give_up)
            for n, (address, name) in enumerate(zip(addresses, self._names, strict=True), 1)
        ]

    def batches(self, size: int = 0) -> Iterator[list[Frame]]:
        """Newest frames, at most one a stream, until every stream was given up; `size` has no meaning here."""
        for reader in self._readers:
            reader.start()
        try:
            while frames := self._wait():
                self.tally.frames += len(frames)
                yield frames
        finally:
            self.close()
        self.tally.failed = list(self._names)
        if not self.tally.frames:
            raise UserError(f"no frame came from {', '.join(self._names)}; check the address and that the camera is on")

    def _wait(self) -> list[Frame]:
        """Block until a stream has something new; empty when no reader is left."""
        with self._changed:
            while True:
                alive = any(not reader.dead for reader in self._readers)
                taken = [(item, newest) for item, r in enumerate(self._readers, 1) if (newest := r.take())]
                if taken or not alive:
                    break
                self._changed.wait(timeout=1.0)  # a bound, so that Ctrl-C is heard on every platform
        return [self._frame(item, newest) for item, newest in taken]

    def _frame(self, item: int, newest: _Newest) -> Frame:
        rgb = cv2.cvtColor(newest.image, cv2.COLOR_BGR2RGB)
        name = self._names[item - 1]
        return Frame(rgb, name, "stream", item, self.items, newest.index, 0, newest.timestamp, newest.fps)

    def close(self) -> None:
        """Stop all readers; one that is stuck in its driver is left behind as a daemon."""
        for reader in self._readers:
            reader.stop()
        for reader in self._readers:
            if reader.is_alive() and reader is not threading.current_thread():
                reader.join(timeout=2.0)
