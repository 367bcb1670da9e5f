"""Evaluation of image classifiers: top-1, top-5, per class, confusion."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.core.device import loader_workers
from utils.core.dist import Dist
from utils.core.errors import UserError
from utils.core.hyp import Hyp
from utils.data.folder import ClassDataset, ClassIndex, build_class_index
from utils.data.loader import Batch, EvalLoader
from utils.data.spec import DataSpec
from utils.engine.evaluation.evaluate import EvalPlan, check_classes
from utils.engine.evaluation.validate import to_float
from utils.engine.inference.classifying import TOP, classifier_side
from utils.engine.speed import Clock, Speed


@dataclass(frozen=True)
class ClassResult:
    """What a classifier says about a split, image by image in the order of the index.

    `top` int64 [n, k] are the k likeliest classes (k = 5, or all where there are fewer), `confidence` float32 [n, k]
    their probabilities, `labels` int64 [n]. `loss` is the mean cross-entropy without label smoothing.
    """

    labels: np.ndarray
    top: np.ndarray
    confidence: np.ndarray
    names: tuple[str, ...]
    loss: float
    speed_ms: dict[str, float]

    @property
    def right(self) -> np.ndarray:
        """Whether the likeliest class is the label, bool [n]."""
        return self.top[:, 0] == self.labels

    @property
    def metrics(self) -> dict[str, Any]:
        """top1, top5, loss, and per class its images, top1 and top5 (NaN for a class without images)."""
        hits = self.top == self.labels[:, None]
        per_class = []
        for number, name in enumerate(self.names):
            own = hits[self.labels == number]
            one, five = (
                (float(own[:, :1].any(1).mean()), float(own.any(1).mean())) if len(own) else (math.nan, math.nan)
            )
            per_class.append({"id": number, "name": name, "images": len(own), "top1": one, "top5": five})
        return {
            "top1": float(hits[:, 0].mean()),
            "top5": float(hits.any(1).mean()),
            "loss": self.loss,
            "images": len(hits),
            "per_class": per_class,
        }

    @property
    def confusion(self) -> np.ndarray:
        """Counts int64 [nc, nc], row predicted, column true."""
        matrix = np.zeros((len(self.names),) * 2, np.int64)
        np.add.at(matrix, (self.top[:, 0], self.labels), 1)
        return matrix


def measure(network: Callable[[Tensor], Tensor], loader: Iterable[Batch], index: ClassIndex, dist: Dist) -> ClassResult:
    """Run `network` (images 0..1 -> logits) over this rank's batches; every rank gets the whole result."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    speed = Speed()
    clock = Clock(speed, dist.device)
    for batch in loader:
        clock.start()
        x = to_float(batch.images, dist.device)
        clock.lap("pre-process")
        with torch.no_grad():
            logits = network(x).float()
        probabilities = logits.softmax(1)
        confidence, top = probabilities.topk(min(TOP, probabilities.shape[1]), 1)
        labels = batch.targets[:, 1].long().to(logits.device)
        losses = F.cross_entropy(logits, labels, reduction="none")
        parts.append((batch.indices.numpy(), top.cpu().numpy(), confidence.cpu().numpy(), losses.cpu().numpy()))
        clock.lap("inference")
        speed.images += len(x)
    gathered = dist.gather(parts)
    together = None
    if gathered is not None:
        flat = [part for rank in gathered for part in rank]
        if not flat:
            raise UserError("the validation set has no images")
        columns = [np.concatenate(column) for column in zip(*flat, strict=True)]
        order = columns[0].argsort(kind="stable")
        together = [column[order] for column in columns]
    shared = dist.broadcast(together)
    assert shared is not None  # the main rank has them
    _, top, confidence, losses = shared
    return ClassResult(index.labels, top, confidence, index.names, float(losses.mean(dtype=np.float64)), speed.ms())


def validate_classifier(
    predictor: Any,
    spec: DataSpec,
    dist: Dist,
    *,
    split: str = "val",
    imgsz: Sequence[int] = (),
    batch_size: int = 32,
    workers: int = 0,
) -> tuple[ClassResult, ClassIndex]:
    """Measure any classifying predictor (a model file of any format) on a split of a data set."""
    index = dist.main_first(lambda: build_class_index(spec, split))
    check_classes(predictor, index.names, str(spec.yaml))
    EvalPlan(batch_size=batch_size, workers=workers)  # checks them
    dataset = ClassDataset(index, classifier_side(predictor, imgsz), Hyp(), augment=False)
    workers = loader_workers(workers, batch_size)
    loader = EvalLoader(dataset, batch_size, workers=workers, rank=dist.rank, world_size=dist.world_size)  # type: ignore[arg-type]
    try:
        return measure(predictor, loader, index, dist), index
    finally:
        loader.close()
