"""The screen as a live source, through the optional package `mss`."""

from collections.abc import Iterator
from pathlib import Path
from time import time

import numpy as np

from utils.core.errors import UserError
from utils.data.frames import Frame, Tally

USAGE = "expected 'screen', 'screen N', or 'screen N LEFT TOP WIDTH HEIGHT' in pixels"


def parse_screen(spec: str) -> tuple[int, tuple[int, int, int, int] | None]:
    """`screen [n] [left top width height]` -> monitor number (0: all) and region in its pixels, None for all."""
    words = spec.split()[1:]
    if len(words) not in (0, 1, 4, 5) or not all(word.isdigit() for word in words):
        raise UserError(f"source '{spec}'; {USAGE}")
    numbers = [int(word) for word in words]
    monitor = numbers.pop(0) if len(numbers) in (1, 5) else 0
    if not numbers:
        return monitor, None
    left, top, width, height = numbers
    if not width or not height:
        raise UserError(f"source '{spec}' has no area; {USAGE}")
    return monitor, (left, top, width, height)


class ScreenSource:
    """Pictures of one monitor, or of a region of it, as fast as they are asked for."""

    live = True
    items = 1

    def __init__(self, spec: str, *, stride: int = 1) -> None:
        try:
            import mss
        except ModuleNotFoundError:
            raise UserError("source 'screen' needs the package mss, which is not installed; pip install mss") from None
        self._mss = mss
        self._monitor, self._region = parse_screen(spec)
        self._stride = stride
        self._open = True
        self.name = "_".join(spec.split())
        self.tally = Tally()
        self.files: tuple[Path, ...] = ()

    def batches(self, size: int = 1) -> Iterator[list[Frame]]:
        """One frame at a time until closed; `size` has no meaning here."""
        try:
            with self._mss.mss() as grabber:
                box = self._box(grabber.monitors)
                index = 0
                while self._open:
                    index += 1
                    pixels = grabber.grab(box)
                    if (index - 1) % self._stride:
                        continue
                    image = np.ascontiguousarray(np.asarray(pixels)[:, :, 2::-1])
                    self.tally.frames += 1
                    yield [Frame(image, self.name, "stream", index=index, timestamp=time())]
        except self._mss.exception.ScreenShotError as error:
            raise UserError(f"the screen cannot be read ({error}); is there a display?") from None

    def _box(self, monitors: list[dict[str, int]]) -> dict[str, int]:
        if self._monitor >= len(monitors):
            raise UserError(f"source 'screen {self._monitor}', but the monitors are 1 to {len(monitors) - 1} (0: all)")
        monitor = monitors[self._monitor]
        if self._region is None:
            return monitor
        left, top, width, height = self._region
        return {"left": monitor["left"] + left, "top": monitor["top"] + top, "width": width, "height": height}

    def close(self) -> None:
        """End after the current frame."""
        self._open = False
