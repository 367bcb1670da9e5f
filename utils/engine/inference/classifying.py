"""Pictures in, likeliest classes out: what `detect.py` and the Python API do with an image classifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from utils.core.errors import UserError
from utils.data.folder import center_crop
from utils.engine.speed import Clock, Speed

TOP = 5


@dataclass(frozen=True, eq=False)
class Classification:
    """The likeliest classes of one picture, best first: cls int64 [k], conf float32 [k] (probabilities), all names."""

    cls: np.ndarray
    conf: np.ndarray
    names: tuple[str, ...]

    def name(self, i: int) -> str:
        """Class name of place `i`."""
        return self.names[int(self.cls[i])]

    def labels(self, with_conf: bool = True) -> list[str]:
        """`cat 0.91`, or only `cat`, for each place."""
        return [f"{self.name(i)} {self.conf[i]:.2f}" if with_conf else self.name(i) for i in range(len(self.cls))]

    def summary(self) -> str:
        """`cat 0.91, dog 0.05, ...`."""
        return ", ".join(self.labels())


def classifier_side(predictor: Any, imgsz: Sequence[int] = ()) -> int:
    """The side of a classifier's squares: a fixed file's own, else the one of `imgsz`, else that of its training."""
    size = tuple(predictor.imgsz or imgsz or predictor.metadata.imgsz)
    stride = max(int(predictor.max_stride), 1)
    if len(set(size)) != 1 or size[0] < 1 or size[0] % stride:
        text = " ".join(map(str, size))
        raise UserError(f"--imgsz {text}; expected one side for a classifier, a multiple of {stride}")
    return size[0]


class PictureClassifier:
    """Pictures of any size -> one `Classification` each. They are prepared as in training: short side, center crop."""

    def __init__(self, predictor: Any, imgsz: Sequence[int] = (), batch_size: int = 1) -> None:
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size}; expected 1 or more")
        self.predictor, self.size, self.batch_size = predictor, classifier_side(predictor, imgsz), batch_size
        self.names = tuple(predictor.names)
        self.speed = Speed()

    def __call__(self, images: Sequence[np.ndarray]) -> list[Classification]:
        """uint8 [H, W, 3] RGB pictures -> their likeliest classes."""
        found = []
        for start in range(0, len(images), self.batch_size):
            found += self._run(images[start : start + self.batch_size])
        self.speed.images += len(images)
        return found

    def warm_up(self) -> None:
        """One run that does not count."""
        self._run([np.zeros((self.size, self.size, 3), np.uint8)])
        self.speed = Speed()

    def _run(self, images: Sequence[np.ndarray]) -> list[Classification]:
        device = self.predictor.device
        clock = Clock(self.speed, device)
        stack = np.stack([center_crop(image, self.size) for image in images])
        batch = torch.from_numpy(stack).to(device).permute(0, 3, 1, 2)
        batch = batch.to(torch.float16 if self.predictor.half else torch.float32) / 255
        clock.lap("pre-process")
        with torch.inference_mode():
            probabilities = self.predictor(batch).float().softmax(1)
            conf, cls = probabilities.topk(min(TOP, probabilities.shape[1]), 1)
        rows = list(zip(cls.cpu().numpy(), conf.cpu().numpy(), strict=True))
        clock.lap("inference")
        self.speed.shape = tuple(batch.shape)
        return [Classification(c, p, self.names) for c, p in rows]
