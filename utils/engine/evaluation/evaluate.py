"""From a data set and a predictor to an evaluation: picks loader or slices, shows progress, keeps ranks together."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from utils.core.device import loader_workers
from utils.core.dist import Dist
from utils.core.errors import UserError
from utils.core.hyp import Hyp
from utils.core.log import LOGGER
from utils.data.dataset import DetectionDataset
from utils.data.images import read_indexed_image
from utils.data.index import LabelIndex
from utils.data.loader import EvalLoader
from utils.engine.evaluation.validate import EvalResult, OnBatch, ValSettings, evaluate_rows, validate
from utils.engine.inference.pipeline import ahead
from utils.engine.inference.predict import Detector, PredictSettings, check_bounds, network_size, size_step
from utils.engine.speed import Speed
from utils.ops.boxes import xyxy_to_cxcywh
from utils.ops.letterbox import Letterbox, letterbox_geometry, letterbox_image

PER_PICTURE = 4  # whole images on one picture when slices are evaluated


@dataclass(frozen=True)
class EvalPlan:
    """How the images are put before the network."""

    imgsz: tuple[int, int] = (640, 640)
    batch_size: int = 32
    workers: int = 8
    rect: bool = True
    slice_size: int = 0
    overlap: float = 0.2

    def __post_init__(self) -> None:
        check_bounds(self, batch_size=(1, math.inf), workers=(0, math.inf), slice_size=(0, math.inf))


@dataclass(frozen=True)
class _Shown:
    """Whole images in the form of a loader's batch."""

    images: torch.Tensor
    targets: torch.Tensor
    indices: list[int]
    geometries: list[Letterbox]


def evaluate(
    predictor: Any,
    index: LabelIndex,
    names: Sequence[str],
    plan: EvalPlan,
    settings: ValSettings,
    dist: Dist,
    *,
    on_batch: OnBatch | None = None,
    labeled: bool = True,
    title: str = "validating",
) -> EvalResult:
    """Evaluate `predictor` on the images of `index`; every rank calls it."""
    height, width = network_size(predictor, plan.imgsz)
    if plan.slice_size or height != width:
        plan = replace(plan, imgsz=(height, width))
        return _evaluate_pictures(predictor, index, names, plan, settings, dist, on_batch, labeled, title)
    rect = plan.rect and predictor.imgsz is None
    stride = size_step(predictor)
    dataset = DetectionDataset(index, height, Hyp(), augment=False, rect=rect, stride=stride, pad=0.5 if rect else 0.0)
    workers = loader_workers(plan.workers, plan.batch_size)
    loader = EvalLoader(dataset, plan.batch_size, workers=workers, rank=dist.rank, world_size=dist.world_size)
    try:
        batches = _progress(loader, len(loader), title, dist)
        return validate(predictor, batches, index, names, settings, dist, on_batch=on_batch, labeled=labeled)
    finally:
        loader.close()


def _progress(items: Any, total: int, title: str, dist: Dist) -> Any:
    """A live line on the main rank, where there is a terminal."""
    return tqdm(items, total=total, desc=title, leave=False, disable=not dist.is_main or None, dynamic_ncols=True)


def _evaluate_pictures(
    predictor: Any,
    index: LabelIndex,
    names: Sequence[str],
    plan: EvalPlan,
    settings: ValSettings,
    dist: Dist,
    on_batch: OnBatch | None,
    labeled: bool,
    title: str,
) -> EvalResult:
    """Through the detector of detect.py, which slices and takes any shape; each rank takes every n-th image."""
    if not len(index):
        raise UserError("there are no images to validate on; check the split's path in the data YAML")
    detector = Detector(predictor, predict_settings(plan, settings))
    mine = range(dist.rank, len(index), dist.world_size)
    together = 1 if plan.slice_size else plan.batch_size  # the slices of an image are a batch already
    rows: list[tuple[int, np.ndarray]] = []
    examples: list[tuple[int, np.ndarray, np.ndarray]] = []
    limit = getattr(on_batch, "limit", 3) * PER_PICTURE
    batches = ahead(_read(index, mine, together))
    for numbers, images in _progress(batches, -(-len(mine) // together), title, dist):
        for i, image, detections in zip(numbers, images, detector(images), strict=True):
            found = detections.to_rows()
            if settings.single_cls:
                found[:, 5] = 0
            rows.append((i, found))
            if on_batch is not None and len(examples) < limit:
                examples.append((i, image, found))
    if on_batch is not None:
        _show(examples, index, on_batch, dist)
    shards = dist.gather((rows, detector.speed))
    result = None
    if shards is not None:
        table = _joined([entry for part, _ in shards for entry in part])
        speed = Speed.total(part for _, part in shards)
        result = evaluate_rows(
            table,
            index,
            names,
            settings,
            scale=_slice_scale(index.shapes, plan),
            speed_ms=speed.ms(),
            shape=speed.shape,
            labeled=labeled,
        )
    shared = dist.broadcast((result.metrics, result.speed_ms, result.shape) if result else None)
    assert shared is not None
    return result or EvalResult(shared[0], shared[1], {}, shared[2], np.zeros((0, 7), np.float32))


def _read(index: LabelIndex, numbers: Sequence[int], together: int) -> Iterator[tuple[Sequence[int], list[np.ndarray]]]:
    """The images of these numbers, `together` at a time."""
    for start in range(0, len(numbers), together):
        part = numbers[start : start + together]
        yield part, [read_indexed_image(index.file(i)) for i in part]


def predict_settings(plan: EvalPlan, settings: ValSettings) -> PredictSettings:
    """The detector's settings for an evaluation."""
    return PredictSettings(
        imgsz=plan.imgsz,
        conf_thres=settings.conf_thres,
        iou_thres=settings.iou_thres,
        max_det=settings.max_det,
        classes=settings.classes,
        agnostic=settings.agnostic or settings.single_cls,
        multi_label=settings.multi_label and not settings.single_cls,
        batch_size=plan.batch_size,
        rect=plan.rect,
        slice_size=plan.slice_size,
        overlap=plan.overlap,
    )


def _joined(parts: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """Detections of images as one table [k, 7] in image order."""
    parts = sorted(parts, key=lambda part: part[0])
    tables = [np.concatenate([np.full((len(f), 1), i, np.float32), f], 1) for i, f in parts if len(f)]
    return np.concatenate(tables) if tables else np.zeros((0, 7), np.float32)


def _slice_scale(shapes: np.ndarray, plan: EvalPlan) -> np.ndarray:
    """Area in network pixels per area in source pixels, where images larger than a slice are seen slice by slice."""
    seen = np.asarray(shapes, np.float64)
    if plan.slice_size:
        seen = np.minimum(seen, plan.slice_size)
    return (np.array(plan.imgsz) / seen).min(1) ** 2


def _show(
    examples: list[tuple[int, np.ndarray, np.ndarray]],
    index: LabelIndex,
    on_batch: OnBatch,
    dist: Dist,
    side: int = 960,
) -> None:
    """Whole images as batches for `on_batch`, which draws them."""
    for number, start in enumerate(range(0, len(examples), PER_PICTURE)):
        tiles, targets, found, geometries, numbers = [], [], [], [], []
        for b, (i, image, rows) in enumerate(examples[start : start + PER_PICTURE]):
            geometry = letterbox_geometry(image.shape[:2], side)
            cls, boxes, _ = index.labels(i)
            inside = xyxy_to_cxcywh(geometry.to_network(np.asarray(boxes, np.float32))) / side
            targets.append(np.concatenate([np.full((len(cls), 1), b), cls[:, None], inside], 1))
            found.append(torch.from_numpy(np.concatenate([geometry.to_network(rows[:, :4]), rows[:, 4:]], 1)))
            tiles.append(letterbox_image(image, geometry))
            geometries.append(geometry)
            numbers.append(i)
        batch = _Shown(
            images=torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2),
            targets=torch.from_numpy(np.concatenate(targets)).float(),
            indices=numbers,
            geometries=geometries,
        )
        on_batch(number * dist.world_size + dist.rank, batch, found)


def check_classes(predictor: Any, names: Sequence[str], source: str, single_cls: bool = False) -> None:
    """Refuse a model whose number of classes is not the data set's; say so where only the names differ."""
    own = list(predictor.names)
    if single_cls:
        return
    if len(own) != len(names):
        raise UserError(
            f"the model has {len(own)} classes ({_some(own)}) and {source} has {len(names)} ({_some(names)}); "
            "give the data YAML that the model was trained for"
        )
    differ = [(a, b) for a, b in zip(own, names, strict=True) if a != b]
    if differ:
        LOGGER.warning(
            f"{len(differ)} class names differ between model and {source}, e.g. {differ[0][0]} / {differ[0][1]}"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")


def iterate_images(index: LabelIndex, limit: int) -> Iterator[np.ndarray]:
    """Up to `limit` images of an index, evenly spread, as RGB arrays."""
    step = max(len(index) // limit, 1)
    for i in range(0, min(len(index), step * limit), step):
        yield read_indexed_image(index.file(i))
