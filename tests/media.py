"""Pictures, videos and predictors that the inference tests make for themselves."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small lose more time to the hand-over between threads than they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_picture(path: Path, hw: tuple[int, int] = (48, 64), color: tuple[int, int, int] = (10, 120, 200)) -> Path:
    """A picture of one RGB color."""
    image = np.full((*hw, 3), color, np.uint8)
    assert cv2.imwrite(str(path), image[:, :, ::-1])
    return path


def write_video(path: Path, frames: int = 20, fps: float = 12.5, hw: tuple[int, int] = (48, 64)) -> Path:
    """A motion-JPEG video whose frame k (from 1) is gray of value 10 k, so that a frame tells its own number."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, (hw[1], hw[0]))
    assert writer.isOpened()
    for k in range(1, frames + 1):
        writer.write(np.full((*hw, 3), 10 * k % 250, np.uint8))
    writer.release()
    return path


def with_squares(hw: tuple[int, int], boxes: list[tuple[int, int, int, int]]) -> np.ndarray:
    """A black picture with red xyxy rectangles."""
    image = np.zeros((*hw, 3), np.uint8)
    for x1, y1, x2, y2 in boxes:
        image[y1:y2, x1:x2] = (255, 0, 0)
    return image


class RedFinder:
    """A predictor that needs no training: one prediction for each connected red region, class by its width.

    It sees what the network would see, so a wrong letterbox, tile offset or channel order shows in its boxes. Rows are
    cx, cy, w, h, objectness and two class probabilities; regions at least four times as wide as high are of class 1.
    """

    end2end = False

    def __init__(self, *, imgsz: tuple[int, int] | None = None, batch: int | None = None, rows: int = 64):
        self.names, self.strides, self.device = ["tall", "wide"], [8, 16, 32], torch.device("cpu")
        self.imgsz, self.batch, self.half, self.task = imgsz, batch, False, "detect"
        self._rows = rows
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        assert images.dtype == torch.float32 and 0 <= float(images.min()) <= float(images.max()) <= 1
        out = torch.zeros(len(images), self._rows, 7)
        for picture, rows in zip(images, out, strict=True):
            red = ((picture[0] > 0.5) & (picture[1] < 0.2)).to(torch.uint8).numpy()
            _, _, stats, _ = cv2.connectedComponentsWithStats(red, connectivity=4)
            for row, (x, y, w, h, _) in zip(rows, stats[1:], strict=False):
                wide = w >= 4 * h
                conf = 0.9 - 0.3 / (w * h) ** 0.5  # as in life, what appears larger is surer
                row[:] = torch.tensor([x + w / 2, y + h / 2, w, h, conf, 0.0 if wide else 1.0, 1.0 if wide else 0.0])
        return out


class Endless:
    """An end-to-end predictor: NMS is inside, it gives rows [n, 6]."""

    end2end = True

    def __init__(self) -> None:
        self.names, self.strides, self.device = ["a", "b", "c"], [32], torch.device("cpu")
        self.imgsz, self.batch, self.half = (64, 64), 1, False

    def __call__(self, images: Tensor) -> list[Tensor]:
        rows = torch.tensor([[8.0, 8, 16, 16, 0.9, 0], [8, 8, 40, 40, 0.5, 1], [0, 0, 9, 9, 0.1, 2]])
        return [rows.clone() for _ in images]
