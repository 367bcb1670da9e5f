"""Validation: run any predictor over a data set, on one or many processes, and evaluate once.

Whole batches are dealt out to the ranks as one process would form them; detections are gathered in image order and
measured on the main rank, so that the numbers do not depend on the number of processes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from models.yolo import DetectionModel
from utils.core.dist import Dist
from utils.core.errors import UserError
from utils.core.log import LOGGER
from utils.engine.evaluation.coco_eval import (
    Labels,
    MetricSettings,
    Truth,
    coco_metrics,
    found_from_rows,
    truth_from_index,
)
from utils.engine.inference.predict import DETECTION_BOUNDS, check_bounds
from utils.engine.speed import Clock, Speed
from utils.ops.letterbox import Letterbox
from utils.ops.metrics import Curves, confusion_matrix, fitness
from utils.ops.nms import non_max_suppression


class EvalBatch(Protocol):
    """The part of a data loader's batch that validation reads."""

    @property
    def images(self) -> Tensor: ...  # uint8 [B, 3, H, W]
    @property
    def targets(self) -> Tensor: ...  # float32 [M, 6]: image in the batch, class, cx, cy, w, h normalized
    @property
    def indices(self) -> Any: ...  # int [B], image numbers
    @property
    def geometries(self) -> Sequence[Letterbox | None]: ...


Loss = Callable[[list[Tensor], Tensor], Mapping[str, Tensor]]
OnBatch = Callable[[int, EvalBatch, list[Tensor]], None]


@dataclass(frozen=True)
class ValSettings:
    """What counts as a detection, and how detections are measured."""

    conf_thres: float = 0.001
    iou_thres: float = 0.6
    max_det: int = 300
    agnostic: bool = False
    multi_label: bool = True
    classes: tuple[int, ...] | None = None
    single_cls: bool = False  # whatever class is predicted, it is the one class
    metrics: MetricSettings = field(default_factory=MetricSettings)
    confusion_conf: float = 0.25
    confusion_iou: float = 0.45

    def __post_init__(self) -> None:
        check_bounds(self, **DETECTION_BOUNDS)

    def for_file(self, predictor: Any) -> "ValSettings":
        """What of these settings holds for a predictor: where its file has the NMS inside, that of the file."""
        inside = predictor.metadata.nms if predictor.end2end else None
        if inside is None:
            return self
        if inside["conf_thres"] > self.conf_thres:
            LOGGER.warning(
                f"the NMS inside the file drops confidences below {inside['conf_thres']:g}, which AP misses; "
                f"export it with --conf-thres {self.conf_thres:g} to measure AP"
            )
        return self.inside(inside)

    def inside(self, nms: Mapping[str, Any]) -> "ValSettings":
        """These settings behind an NMS that has happened already."""
        limits = {"conf_thres": max(self.conf_thres, nms["conf_thres"]), "max_det": min(self.max_det, nms["max_det"])}
        return replace(self, **limits, iou_thres=nms["iou_thres"], agnostic=nms["agnostic"], multi_label=False)

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        nms = {"conf_thres": self.conf_thres, "iou_thres": self.iou_thres, "max_det": self.max_det}
        nms |= {"agnostic": self.agnostic, "multi_label": self.multi_label, "single_cls": self.single_cls}
        confusion = {"confusion_conf": self.confusion_conf, "confusion_iou": self.confusion_iou}
        return {**nms, **confusion, **self.metrics.as_dict()}


def detection_limit(max_det: int | None, metrics: MetricSettings) -> int:
    """Most detections per image: --max-det where given, else 300, or what --max-dets counts where that is more."""
    counted = metrics.max_dets[-1]
    if max_det is None:
        return max(ValSettings.max_det, counted)
    if 0 < max_det < counted:
        LOGGER.warning(f"--max-det {max_det} keeps fewer detections of an image than --max-dets {counted} would count")
    return max_det


@dataclass(frozen=True)
class EvalResult:
    """The outcome of one validation. Numbers are on every rank; arrays beyond them on the main rank only."""

    metrics: dict[str, Any]  # as coco_eval.coco_metrics gives them; empty where there are no labels to measure by
    speed_ms: dict[str, float]  # milliseconds per image of each stage, see utils/engine/speed.py
    loss: dict[str, float]  # mean of each loss part over the images, empty without a loss
    shape: tuple[int, ...]  # of the first batch as the network saw it
    detections: np.ndarray  # float32 [k, 7]: image number, x1, y1, x2, y2 in source pixels, confidence, class
    curves: Curves | None = None
    confusion: np.ndarray | None = None
    truth: Truth | None = None

    @property
    def fitness(self) -> float:
        """What `best.pt` is chosen by; 0 where nothing could be measured."""
        nothing = float("nan")
        return float(np.nan_to_num(fitness(self.metrics.get("AP50", nothing), self.metrics.get("AP", nothing))))


class ModelPredictor:
    """A detection network, as it is, as predictor; `maps` apart from `decode`, so that a loss can be taken."""

    end2end = False
    imgsz = None
    batch = None
    half = False

    def __init__(
        self, model: DetectionModel, names: Sequence[str], *, device: torch.device | str, amp: torch.dtype | None = None
    ):
        self.model = model.eval()
        self.names = list(names)
        self.strides, self.max_stride = list(model.strides), model.max_stride
        self.device = torch.device(device)
        self.amp = amp

    @torch.no_grad()
    def maps(self, images: Tensor) -> list[Tensor]:
        """Raw maps in float32; the network runs under autocast where `amp` is given."""
        with torch.autocast(self.device.type, dtype=self.amp or torch.bfloat16, enabled=self.amp is not None):
            maps = self.model(images)
        return [m.float() for m in maps]

    @torch.no_grad()
    def decode(self, maps: list[Tensor]) -> Tensor:
        """Maps -> [B, N, 5 + nc]."""
        return self.model.decode(maps)

    def __call__(self, images: Tensor) -> Tensor:
        return self.decode(self.maps(images))


@dataclass
class _Shard:
    """What one rank found in its batches."""

    rows: list[np.ndarray]
    scales: list[tuple[int, float]]
    losses: list[tuple[int, int, dict[str, float]]]
    speed: Speed = field(default_factory=Speed)
    broken: int = 0


def validate(
    predictor: Any,
    loader: Iterable[EvalBatch],
    index: Labels,
    names: Sequence[str],
    settings: ValSettings | None = None,
    dist: Dist | None = None,
    *,
    loss: Loss | None = None,
    on_batch: OnBatch | None = None,
    labeled: bool = True,
) -> EvalResult:
    """Run `predictor` over `loader` and measure; every rank calls it, every rank gets the numbers.

    `loader` yields this rank's whole batches (batch b of one process goes to rank b modulo the number of ranks). `loss`
    needs a predictor with `maps` and `decode`. `on_batch` sees (number of the batch, batch, detections per image in
    network pixels). Without `labeled` nothing is measured, only detected.
    """
    settings = settings or ValSettings()
    dist = dist or Dist.single(predictor.device)
    if not len(index):
        raise UserError("there are no images to validate on; check the split's path in the data YAML")
    shard = _run(predictor, loader, settings, dist, loss, on_batch)
    shards = dist.gather(shard)
    result = _merge(shards, index, names, settings, labeled) if shards is not None else None
    shared = (result.metrics, result.speed_ms, result.loss, result.shape) if result is not None else None
    metrics, speed, parts, shape = dist.broadcast(shared)  # type: ignore[misc]
    return result or EvalResult(metrics, speed, parts, shape, np.zeros((0, 7), np.float32))


def _run(
    predictor: Any,
    loader: Iterable[EvalBatch],
    settings: ValSettings,
    dist: Dist,
    loss: Loss | None,
    on_batch: OnBatch | None,
) -> _Shard:
    """This rank's batches through the predictor."""
    shard = _Shard([], [], [])
    clock = Clock(shard.speed, predictor.device)
    for step, batch in enumerate(loader):
        number = step * dist.world_size + dist.rank
        clock.start()
        images = to_float(batch.images, predictor.device)
        clock.lap("pre-process")
        if loss is None:
            predictions = predictor(images)
            clock.lap("inference")
        else:
            maps = predictor.maps(images)
            predictions = predictor.decode(maps)
            clock.lap("inference")
            with torch.no_grad():
                parts = loss(maps, batch.targets)
            shard.losses.append((number, len(images), {k: float(v) for k, v in parts.items()}))
            clock.start()
        detections, broken = suppress_batch(predictor, predictions, settings)
        clock.lap("NMS")
        shard.broken += broken
        shard.speed.images += len(images)
        shard.speed.shape = shard.speed.shape or tuple(images.shape)
        if on_batch is not None:
            on_batch(number, batch, detections)
        for image, geometry, found in zip(batch.indices, batch.geometries, detections, strict=True):
            shard.rows.append(source_rows(int(image), found, geometry))
            if geometry is not None:
                shard.scales.append((int(image), geometry.ratio[0] * geometry.ratio[1]))
    return shard


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 0..1 on `device`; the bytes travel, not the floats."""
    return images.to(device, non_blocking=True).float().div_(255)


def suppress_batch(predictor: Any, predictions: Any, settings: ValSettings) -> tuple[list[Tensor], int]:
    """Predictor output -> list of [n, 6] in network pixels, and how many predictions were not finite (and dropped)."""
    if predictor.end2end:
        kept = [rows[rows[:, 4] > settings.conf_thres][: settings.max_det] for rows in predictions]
        finite = [torch.isfinite(rows).all(1) for rows in kept]
        broken = sum(int((~f).sum()) for f in finite)
        kept = [rows[f] for rows, f in zip(kept, finite, strict=True)]
        if settings.single_cls:
            kept = [torch.cat((rows[:, :5], torch.zeros_like(rows[:, 5:])), 1) for rows in kept]
        return kept, broken
    broken = 0
    if not torch.isfinite(predictions.sum(dtype=torch.float64)):
        bad = ~torch.isfinite(predictions).all(-1)
        broken = int(bad.sum())
        predictions = predictions.masked_fill(bad[..., None], 0.0)
    detections = non_max_suppression(
        predictions,
        conf_thres=settings.conf_thres,
        iou_thres=settings.iou_thres,
        classes=settings.classes,
        agnostic=settings.agnostic or settings.single_cls,
        multi_label=settings.multi_label and not settings.single_cls,
        max_det=settings.max_det,
    )
    if settings.single_cls:
        for rows in detections:
            rows[:, 5] = 0
    return detections, broken


def source_rows(image: int, found: Tensor, geometry: Letterbox | None) -> np.ndarray:
    """Detections [n, 6] of one image in network pixels -> rows [n, 7] in source pixels, led by the image number."""
    rows = np.empty((len(found), 7), np.float32)
    values = found.cpu().numpy()
    rows[:, 0] = image
    rows[:, 1:5] = values[:, :4] if geometry is None else geometry.to_source(values[:, :4])
    rows[:, 5:] = values[:, 4:]
    return rows


def _merge(
    shards: list[_Shard], index: Labels, names: Sequence[str], settings: ValSettings, labeled: bool
) -> EvalResult:
    """All ranks' findings, in image order, measured once."""
    rows = [part for shard in shards for part in shard.rows if len(part)]
    table = np.concatenate(rows) if rows else np.zeros((0, 7), np.float32)
    table = table[np.argsort(table[:, 0], kind="stable")]
    speed = Speed.total(shard.speed for shard in shards)
    losses = sorted((entry for shard in shards for entry in shard.losses), key=lambda entry: entry[0])
    broken = sum(shard.broken for shard in shards)
    if broken:
        LOGGER.warning(f"{broken} predictions were NaN or infinite and were dropped")
    scale = np.ones(len(index))
    for image, value in (entry for shard in shards for entry in shard.scales):
        scale[image] = value
    return evaluate_rows(
        table,
        index,
        names,
        settings,
        scale=scale,
        speed_ms=speed.ms(),
        loss=_mean_loss(losses),
        shape=speed.shape,
        labeled=labeled,
    )


def evaluate_rows(
    rows: np.ndarray,
    index: Labels,
    names: Sequence[str],
    settings: ValSettings,
    *,
    scale: np.ndarray | None = None,
    speed_ms: dict[str, float] | None = None,
    loss: dict[str, float] | None = None,
    shape: tuple[int, ...] = (),
    labeled: bool = True,
) -> EvalResult:
    """Measure detections [k, 7] in image order. `scale` float[n]: area in network pixels per area in source pixels."""
    network = settings.metrics.area_pixels == "network"
    truth = truth_from_index(index, names, area_from=settings.metrics.area_from, area_scale=scale if network else None)
    shared: dict[str, Any] = {"speed_ms": speed_ms or {}, "loss": loss or {}, "shape": shape, "detections": rows}
    if not labeled:
        return EvalResult(metrics={}, truth=truth, **shared)
    found = found_from_rows(rows, truth)
    metrics, curves = coco_metrics(truth, found, settings.metrics)
    confusion = confusion_matrix(
        truth.objects, found, truth.nc, confidence=settings.confusion_conf, iou=settings.confusion_iou
    )
    return EvalResult(metrics=metrics, curves=curves, confusion=confusion, truth=truth, **shared)


def _mean_loss(losses: list[tuple[int, int, dict[str, float]]]) -> dict[str, float]:
    """Mean of every part over the images, summed in the order of the batches."""
    images = sum(n for _, n, _ in losses)
    total: dict[str, float] = {}
    for _, n, parts in losses:
        for name, value in parts.items():
            total[name] = total.get(name, 0.0) + n * value
    return {name: value / images for name, value in total.items()}
