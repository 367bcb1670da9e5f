"""The one evaluator: COCO's numbers for every data set and every backend, in source pixels, by faster-coco-eval.

Ground truth is built in memory from packed arrays (no annotation file is needed, none is written). A number without
objects to measure it on is NaN here (COCO's own tools print -1), `-` in tables and null in JSON.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from utils.core.errors import UserError
from utils.core.log import LOGGER
from utils.engine.options import MetricOptions
from utils.ops.metrics import Curves, Found, Objects, pr_curves

COCO_IOU_THRS = tuple(np.linspace(0.5, 0.95, 10).tolist())
COCO_BINS = (32.0, 96.0)
MAX_AREA = 1e10
MAX_SIDE = MAX_AREA**0.5
TABLE = ("P", "R", "AP50", "AP", "AP75", "AP_S", "AP_M", "AP_L")
TWELVE = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L")


class Labels(Protocol):
    """The part of a label index that evaluation reads (packed arrays, boxes xyxy in source pixels)."""

    @property
    def shapes(self) -> np.ndarray: ...
    @property
    def offsets(self) -> np.ndarray: ...
    @property
    def cls(self) -> np.ndarray: ...
    @property
    def boxes(self) -> np.ndarray: ...
    @property
    def areas(self) -> np.ndarray: ...
    @property
    def crowd(self) -> np.ndarray: ...
    @property
    def image_ids(self) -> np.ndarray: ...
    @property
    def category_ids(self) -> np.ndarray: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class MetricSettings:
    """How the numbers are computed; stands beside them in metrics.json."""

    iou_thrs: tuple[float, ...] = COCO_IOU_THRS  # AP is the mean over these
    max_dets: tuple[int, ...] = (1, 10, 100)  # detections per image and class
    area_bins: tuple[float, ...] = COCO_BINS  # side lengths in pixels that part small | medium | large
    area_from: str = "annotation"  # or "box": w * h
    area_pixels: str = "source"  # or "network": sizes as the network sees them

    def __post_init__(self) -> None:
        for name, kind in (("iou_thrs", float), ("max_dets", int)):
            object.__setattr__(self, name, tuple(sorted({kind(v) for v in getattr(self, name)})))
        bins = tuple(map(float, self.area_bins))
        object.__setattr__(self, "area_bins", bins)
        if not self.iou_thrs or not all(0 < t < 1 for t in self.iou_thrs):
            raise UserError(
                f"IoU thresholds {list(self.iou_thrs)}; expected numbers between 0 and 1, e.g. --iou-thrs 0.33"
            )
        if not self.max_dets or self.max_dets[0] < 1:
            raise UserError(f"--max-dets {list(self.max_dets)}; expected whole numbers of at least 1, e.g. 1 10 100")
        if not bins or not all(0 < b < MAX_SIDE for b in bins) or any(a >= b for a, b in pairwise(bins)):
            raise UserError(
                f"--area-bins {' '.join(f'{b:g}' for b in bins)}; expected side lengths above 0 and under "
                f"{MAX_SIDE:g} px, each larger than the one before, e.g. 32 96"
            )
        if self.area_from not in ("annotation", "box") or self.area_pixels not in ("source", "network"):
            raise UserError(
                f"--area-from {self.area_from} --area-pixels {self.area_pixels}; "
                "expected annotation or box, and source or network"
            )

    @classmethod
    def from_options(cls, options: MetricOptions) -> "MetricSettings":
        """The settings that a verb's options ask for."""
        thresholds = tuple(options.iou_thrs) or COCO_IOU_THRS
        bins = tuple(options.area_bins)
        return cls(thresholds, tuple(options.max_dets), bins, options.area_from, options.area_pixels)

    @property
    def pr_iou(self) -> float:
        """The IoU at which P, R, F1 and the curves are read: 0.5 if it is among the thresholds, else the lowest."""
        close = np.isclose(self.iou_thrs, 0.5)
        return 0.5 if close.any() else self.iou_thrs[0]

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Suffix of a metric -> range of areas. Two bins are S, M, L; other bins are added as `8-16`, `16+`."""
        bins = self.area_bins if len(self.area_bins) == 2 else COCO_BINS
        edges = [0.0, *(b * b for b in bins), MAX_AREA]
        named = dict(zip("SML", zip(edges, edges[1:], strict=False), strict=True))
        if len(self.area_bins) != 2:
            sides = [0.0, *self.area_bins]
            for low, high in zip(sides, sides[1:], strict=False):
                named[f"{low:g}-{high:g}"] = (low * low, high * high)
            named[f"{sides[-1]:g}+"] = (sides[-1] ** 2, MAX_AREA)
        return named

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json: the settings and what follows from them."""
        return {
            "iou_thrs": [round(t, 6) for t in self.iou_thrs],
            "max_dets": list(self.max_dets),
            "area_bins": list(self.area_bins),
            "area_ranges": {key: list(value) for key, value in self.ranges.items()},
            "area_from": self.area_from,
            "area_pixels": self.area_pixels,
            "pr_iou": self.pr_iou,
        }


@dataclass(frozen=True)
class Truth:
    """Ground truth of a data set: packed objects, and the ids of images and classes in the annotation file."""

    objects: Objects
    shapes: np.ndarray  # int[n, 2], height and width
    names: tuple[str, ...]
    image_ids: tuple[Any, ...]
    category_ids: tuple[int, ...]
    area_scale: np.ndarray = field(repr=False)  # float64[n], area in evaluated pixels per area in source pixels
    file_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def nc(self) -> int:
        return len(self.category_ids)


def truth_from_index(
    index: Labels, names: Sequence[str], *, area_from: str = "annotation", area_scale: np.ndarray | None = None
) -> Truth:
    """Ground truth from a label index; `area_scale` float[n] turns source areas into network areas."""
    n = len(index)
    boxes = np.asarray(index.boxes, np.float64).reshape(-1, 4)
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    image = np.repeat(np.arange(n), np.diff(index.offsets))
    scale = np.ones(n) if area_scale is None else np.asarray(area_scale, np.float64)
    area = xywh[:, 2] * xywh[:, 3] if area_from == "box" else np.asarray(index.areas, np.float64)
    objects = Objects(image, np.asarray(index.cls, np.int64), xywh, area * scale[image], np.asarray(index.crowd, bool))
    categories = tuple(int(c) for c in index.category_ids)
    if len(categories) != len(names):  # one class for all, or classes that the annotation file does not list
        categories = tuple(range(len(names)))
    return Truth(objects, index.shapes, tuple(names), tuple(int(i) for i in index.image_ids), categories, scale)


def found_from_rows(rows: np.ndarray, truth: Truth) -> Found:
    """Detections [k, 7] (image number, x1, y1, x2, y2 in source pixels, confidence, class) as Found."""
    rows = np.asarray(rows, np.float64).reshape(-1, 7)
    image, xywh = rows[:, 0].astype(np.int64), rows[:, 1:5].copy()
    xywh[:, 2:] -= xywh[:, :2]
    area = xywh[:, 2] * xywh[:, 3] * truth.area_scale[image]
    return Found(image, rows[:, 6].astype(np.int64), xywh, rows[:, 5].copy(), area)


def coco_metrics(truth: Truth, found: Found, settings: MetricSettings | None = None) -> tuple[dict[str, Any], Curves]:
    """All numbers of one evaluation, and the curves behind P, R and F1.

    Keys: TWELVE (AR follows `max_dets`), AP and AR of further area ranges, P, R, F1 and `confidence` (where the mean F1
    over the classes is best, at `pr_iou`), images, instances, and per_class: a list with the same keys for every class.
    """
    settings = settings or MetricSettings()
    assert not len(found) or int(found.cls.max()) < truth.nc, "a detection has a class that the data set lacks"
    _warn_limit(truth, settings)
    precision, recall, thrs = _engine(truth, found, settings)
    curves = pr_curves(truth.objects, found, truth.nc, iou=settings.pr_iou, max_det=settings.max_dets[-1])
    p, r, f1 = curves.at_best()
    everywhere = slice(None)
    metrics: dict[str, Any] = {**_numbers(precision, recall, thrs, everywhere, settings)}
    metrics |= {"P": _mean(p), "R": _mean(r), "F1": _mean(f1), "confidence": curves.best_confidence}
    counted = ~truth.objects.crowd
    classes, images = truth.objects.cls[counted], truth.objects.image[counted]
    metrics |= {"images": len(truth), "instances": int(counted.sum())}
    instances = np.bincount(classes, minlength=truth.nc)
    pairs = np.unique(np.stack([classes, images]), axis=1)[0]
    with_class = np.bincount(pairs, minlength=truth.nc)
    metrics["per_class"] = [
        {
            "id": c,
            "name": truth.names[c],
            "images": int(with_class[c]),
            "instances": int(instances[c]),
            "P": float(p[c]),
            "R": float(r[c]),
            "F1": float(f1[c]),
            **_numbers(precision, recall, thrs, slice(c, c + 1), settings),
        }
        for c in range(truth.nc)
    ]
    return metrics, curves


def _numbers(
    precision: np.ndarray, recall: np.ndarray, thrs: np.ndarray, classes: slice, settings: MetricSettings
) -> dict[str, float]:
    """COCO's summary from precision [T, R, K, A, M] and recall [T, K, A, M] over a slice of the classes."""
    asked = np.isin(thrs, settings.iou_thrs)
    ap = precision[:, :, classes, :, -1]
    numbers = {"AP": _mean(ap[asked][..., 0])}
    for name, value in (("AP50", 0.5), ("AP75", 0.75)):
        numbers[name] = _mean(ap[np.isclose(thrs, value)][..., 0])
    if len(settings.iou_thrs) <= 3:
        for t in settings.iou_thrs:
            numbers.setdefault(f"AP{100 * t:g}", _mean(ap[thrs == t][..., 0]))
    suffixes = list(settings.ranges)
    for a, suffix in enumerate(suffixes, 1):
        numbers[f"AP_{suffix}"] = _mean(ap[asked][..., a])
    for m, count in enumerate(settings.max_dets):
        numbers[f"AR{count}"] = _mean(recall[asked][:, classes, 0, m])
    for a, suffix in enumerate(suffixes, 1):
        numbers[f"AR_{suffix}"] = _mean(recall[asked][:, classes, a, -1])
    return numbers


def _mean(values: np.ndarray) -> float:
    """Mean of the defined values; the engine marks undefined ones with -1, the curves with NaN."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else float("nan")


def _warn_limit(truth: Truth, settings: MetricSettings) -> None:
    """COCO counts the best `max_dets` detections per image and class: say so where more objects are there."""
    counted = ~truth.objects.crowd
    if not counted.any():
        return
    key = truth.objects.image[counted] * truth.nc + truth.objects.cls[counted]
    _, counts = np.unique(key, return_counts=True)
    limit, most = settings.max_dets[-1], int(counts.max())
    if most > limit:
        flag = " ".join(map(str, (*settings.max_dets[:-1], most)))
        LOGGER.warning(
            f"{int((counts > limit).sum())} image(s) hold more than {limit} objects of one class (up to {most}); "
            f"AP and AR count the best {limit} detections of a class only, as COCO does: raise with --max-dets {flag}"
        )


def _engine(truth: Truth, found: Found, settings: MetricSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run faster-coco-eval -> precision [T, R, K, A, M], recall [T, K, A, M] with -1 for undefined, thresholds [T]."""
    from faster_coco_eval.core.coco import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    asked = np.array(settings.iou_thrs)
    extra = [t for t in (0.5, 0.75) if not np.isclose(asked, t).any()]
    thrs = np.sort(np.concatenate([asked, extra]))
    ids = _engine_ids(truth)
    base = {
        "images": [
            {"id": int(i), "height": int(h), "width": int(w)} for i, (h, w) in zip(ids, truth.shapes, strict=True)
        ],
        "categories": [{"id": c + 1, "name": str(c)} for c in range(truth.nc)],
    }
    gt = COCO({**base, "annotations": _annotations(truth.objects, ids, crowd=truth.objects.crowd)})
    dt = COCO({**base, "annotations": _annotations(found, ids, score=found.score)})
    run = COCOeval_faster(gt, dt, iouType="bbox", print_function=_silent)
    run.params.iouThrs = thrs
    run.params.maxDets = list(settings.max_dets)
    run.params.areaRng = [[0.0, MAX_AREA], *(list(r) for r in settings.ranges.values())]
    run.params.areaRngLbl = ["all", *settings.ranges]
    run.evaluate()
    run.accumulate()
    return np.asarray(run.eval["precision"]), np.asarray(run.eval["recall"]), thrs


def _silent(*_: Any) -> None:
    """The engine's progress prints go nowhere."""


def _engine_ids(truth: Truth) -> np.ndarray:
    """Image numbers for the engine from 1, in the order of the file's own ids, which decides between equal scores."""
    if all(isinstance(i, int) for i in truth.image_ids):
        rank = np.empty(len(truth), np.int64)
        rank[np.argsort(np.array(truth.image_ids, np.int64), kind="stable")] = np.arange(len(truth))
        return rank + 1
    return np.arange(len(truth)) + 1


def _annotations(
    boxes: Objects | Found, ids: np.ndarray, *, crowd: np.ndarray | None = None, score: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Packed boxes as the engine's dictionaries; ids start at 1, since it takes 0 for "unmatched"."""
    extra_name, extra = ("iscrowd", crowd.astype(int)) if crowd is not None else ("score", score)
    assert extra is not None
    columns = (
        ids[boxes.image].tolist(),
        (boxes.cls + 1).tolist(),
        boxes.xywh.tolist(),
        boxes.area.tolist(),
        extra.tolist(),
    )
    return [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": area, extra_name: value}
        for i, (image, category, box, area, value) in enumerate(zip(*columns, strict=True), 1)
    ]
