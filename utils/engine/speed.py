"""How long each stage of an image takes: one clock and one wording for every verb."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from utils.core.device import synchronize

STAGES = ("pre-process", "inference", "NMS")


@dataclass
class Speed:
    """Seconds spent in each stage, and the images that they were spent on. `shape` is that of the last batch."""

    seconds: dict[str, float] = field(default_factory=dict)
    images: int = 0
    shape: tuple[int, ...] = ()

    def ms(self) -> dict[str, float]:
        """Milliseconds per image of each stage that was timed."""
        count = max(self.images, 1)
        return {stage: 1000 * self.seconds[stage] / count for stage in STAGES if stage in self.seconds}

    @classmethod
    def total(cls, parts: Iterable["Speed"]) -> "Speed":
        """The parts of several processes together; the shape is that of the first that has one."""
        result = cls()
        for part in parts:
            for stage, seconds in part.seconds.items():
                result.seconds[stage] = result.seconds.get(stage, 0.0) + seconds
            result.images += part.images
            result.shape = result.shape or part.shape
        return result


class Clock:
    """Books the time between laps on the stages of a `Speed`; waits for the device where its work is asynchronous."""

    def __init__(self, speed: Speed, device: torch.device | str):
        self.speed, self.device = speed, torch.device(device)
        self.start()

    def start(self) -> None:
        """What came before is nobody's time."""
        self.last = self._now()

    def lap(self, stage: str) -> None:
        """Book the time since `start` or the last lap on `stage`."""
        now = self._now()
        self.speed.seconds[stage] = self.speed.seconds.get(stage, 0.0) + now - self.last
        self.last = now

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def speed_line(speed_ms: Mapping[str, float], shape: Sequence[int] = ()) -> str:
    """`Speed: 0.5ms pre-process, 20.1ms inference, 1.2ms NMS per image at shape (32, 3, 640, 640)`."""
    parts = ", ".join(f"{value:.1f}ms {stage}" for stage, value in speed_ms.items())
    return f"Speed: {parts} per image" + (f" at shape {tuple(shape)}" if shape else "")
