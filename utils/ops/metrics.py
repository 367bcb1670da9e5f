"""Detection metrics as pure array functions: matching after COCO's rule, precision-recall curves, confusion matrix.

The headline numbers come from the COCO engine (utils/engine/evaluation/coco_eval.py). What an engine does not hand out
lives here: which detection met which object, precision, recall and F1 over the confidence, who is taken for whom, and
average precision from matches, which the bootstrap needs a thousand times over. The matching is COCO's, so that both
give the same numbers.
"""

from dataclasses import dataclass

import numpy as np

ANY_AREA = (0.0, 1e10)
RECALLS = np.linspace(0.0, 1.0, 101)
PAIRS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Objects:
    """Ground truth of a whole data set, packed. Boxes are x, y, w, h in source pixels, as COCO stores them."""

    image: np.ndarray  # int64[m], image number 0..n-1, ascending
    cls: np.ndarray  # int64[m]
    xywh: np.ndarray  # float64[m, 4]
    area: np.ndarray  # float64[m], what decides small, medium and large
    crowd: np.ndarray  # bool[m], regions in which nothing counts

    def __len__(self) -> int:
        return len(self.cls)


def fitness(ap50: float, ap: float) -> float:
    """0.1 AP50 + 0.9 AP, what `best.pt` is chosen by."""
    return 0.1 * ap50 + 0.9 * ap


@dataclass(frozen=True)
class Found:
    """Detections of a whole data set, packed like Objects."""

    image: np.ndarray  # int64[k]
    cls: np.ndarray  # int64[k]
    xywh: np.ndarray  # float64[k, 4]
    score: np.ndarray  # float64[k]
    area: np.ndarray  # float64[k]

    def __len__(self) -> int:
        return len(self.cls)

    def as_rows(self) -> np.ndarray:
        """float32 [k, 7]: image number, x1, y1, x2, y2, confidence, class."""
        corners = np.concatenate([self.xywh[:, :2], self.xywh[:, :2] + self.xywh[:, 2:]], 1)
        columns = [self.image[:, None], corners, self.score[:, None], self.cls[:, None]]
        return np.concatenate(columns, 1).astype(np.float32)

    def take(self, keep: np.ndarray) -> "Found":
        """The detections that a mask or an index array selects."""
        return Found(self.image[keep], self.cls[keep], self.xywh[keep], self.score[keep], self.area[keep])


@dataclass(frozen=True)
class Matches:
    """Who met whom at T IoU thresholds, for the K detections within the per-image limit.

    Detections are ordered by class, then by falling score (equal scores in image order), the order in which precision
    and recall are read off.
    """

    det: np.ndarray  # int64[K], number of the detection in Found
    image: np.ndarray  # int64[K]
    score: np.ndarray  # float64[K]
    class_start: np.ndarray  # int64[nc + 1], detections of class c are class_start[c]:class_start[c + 1]
    gt: np.ndarray  # int64[T, K], number of the object in Objects, -1: none
    ignored: np.ndarray  # bool[T, K], counts neither as right nor as wrong
    counted: np.ndarray  # bool[m], objects that have to be found

    @property
    def hit(self) -> np.ndarray:
        """bool[T, K]: true positives."""
        return (self.gt >= 0) & ~self.ignored


@dataclass(frozen=True)
class Curves:
    """Per class over a grid of confidences, and precision over recall, at one IoU threshold.

    Classes without objects hold NaN; `best` is the confidence with the highest mean F1.
    """

    iou: float
    confidence: np.ndarray  # float64[G]
    precision: np.ndarray  # float64[nc, G], NaN where nothing is detected at that confidence
    recall: np.ndarray  # float64[nc, G]
    f1: np.ndarray  # float64[nc, G]
    pr: np.ndarray  # float64[nc, 101], interpolated precision at RECALLS
    best: int  # column of the grid

    @property
    def best_confidence(self) -> float:
        return float(self.confidence[self.best])

    def at_best(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision, recall and F1 per class at the best confidence; P is 0 for a class without detections."""
        recall = self.recall[:, self.best]
        precision = np.where(np.isnan(recall), np.nan, np.nan_to_num(self.precision[:, self.best]))
        return precision, recall, self.f1[:, self.best]


def overlaps(a: np.ndarray, b: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """COCO's overlap of paired x, y, w, h boxes [n, 4], [n, 4] -> [n]: IoU; for crowds the part of `a` inside."""
    width = np.minimum(a[:, 0] + a[:, 2], b[:, 0] + b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 1] + a[:, 3], b[:, 1] + b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    inter = np.where((width > 0) & (height > 0), width * height, 0.0)
    area = a[:, 2] * a[:, 3]
    union = np.where(crowd, area, area + b[:, 2] * b[:, 3] - inter)
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def candidates(
    found_group: np.ndarray, found_xywh: np.ndarray, objects_group: np.ndarray, objects: Objects, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs (detection, object) of one group that overlap by at least `threshold` -> detection, object, overlap."""
    order = np.argsort(objects_group, kind="stable")
    groups = objects_group[order]
    first = np.searchsorted(groups, found_group, side="left")
    count = np.searchsorted(groups, found_group, side="right") - first
    total = np.cumsum(count)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    start = 0
    while start < len(found_group):  # a bounded number of pairs at once keeps memory flat on crowded images
        done = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, done + PAIRS_AT_ONCE, side="right")))
        repeat = count[start:stop]
        det = np.repeat(np.arange(start, stop), repeat)
        within = np.arange(len(det)) - np.repeat(np.cumsum(repeat) - repeat, repeat)
        obj = order[first[det] + within]
        overlap = overlaps(found_xywh[det], objects.xywh[obj], objects.crowd[obj])
        keep = overlap >= threshold
        parts.append((det[keep], obj[keep], overlap[keep]))
        start = stop
    if not parts:
        empty = np.zeros(0, np.int64)
        return empty, empty, np.zeros(0)
    det, obj, overlap = (np.concatenate(column) for column in zip(*parts, strict=True))
    return det, obj, overlap


def match(
    objects: Objects,
    found: Found,
    nc: int,
    iou_thrs: np.ndarray,
    *,
    area: tuple[float, float] = ANY_AREA,
    max_det: int = 100,
) -> Matches:
    """Match detections to objects of their image and class after COCO's rule, for every IoU threshold.

    In the order of falling score each detection takes the free object it overlaps most; objects outside `area` and
    crowds are taken only where no other is left, and such detections are ignored, as are unmatched ones outside `area`.
    Crowds can be taken many times. Only the `max_det` best detections of an image and class take part.
    """
    key = found.image * nc + found.cls
    order = np.lexsort((-found.score, key))
    key = key[order]
    rank = np.arange(len(key)) - np.searchsorted(key, key, side="left")
    order, key = order[rank < max_det], key[rank < max_det]
    lo, hi = area
    set_aside = objects.crowd | (objects.area < lo) | (objects.area > hi)
    low = min(float(np.min(iou_thrs)), 1 - 1e-10)
    det, obj, overlap = candidates(key, found.xywh[order], objects.image * nc + objects.cls, objects, low)
    preference = np.lexsort((-obj, -overlap, set_aside[obj], det))
    det, obj, overlap = det[preference], obj[preference], overlap[preference]
    taken = np.stack([_greedy(det, obj, overlap >= min(t, 1 - 1e-10), objects.crowd, len(order)) for t in iou_thrs])
    outside = (found.area[order] < lo) | (found.area[order] > hi)
    ignored = np.where(taken >= 0, set_aside[taken] if len(objects) else False, outside[None])
    by_class = np.lexsort((np.arange(len(order)), -found.score[order], found.cls[order]))
    order = order[by_class]
    return Matches(
        det=order,
        image=found.image[order],
        score=found.score[order],
        class_start=np.searchsorted(found.cls[order], np.arange(nc + 1)),
        gt=taken[:, by_class],
        ignored=ignored[:, by_class],
        counted=~set_aside,
    )


def _greedy(det: np.ndarray, obj: np.ndarray, valid: np.ndarray, crowd: np.ndarray, n: int) -> np.ndarray:
    """First come, first served over pairs in order of preference -> object per detection, int64[n], -1 for none."""
    result = np.full(n, -1, np.int64)
    free = [True] * len(crowd)
    last = -1
    for d, o, shared in zip(det[valid].tolist(), obj[valid].tolist(), crowd[obj[valid]].tolist(), strict=True):
        if d != last and free[o]:
            result[d] = o
            free[o] = shared
            last = d
    return result


def average_precision(hits: np.ndarray, weight: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """COCO's 101-point average precision of one class under R weightings of its detections -> float64[R].

    hits: bool[k], in the order of falling score; weight: float64[R, k], how often each detection counts (0: ignored);
    objects: float64[R], the (weighted) number of objects, above 0.
    """
    at = np.flatnonzero(hits)
    if not len(at):
        return np.zeros(len(weight))
    counted = np.cumsum(weight, axis=1)[:, at]
    true = np.cumsum(weight[:, at], axis=1)
    precision = true / (counted + np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(RECALLS, true / objects[:, None], side="right")  # recall levels up to each hit
    steps = np.diff(reached, axis=1, prepend=0)
    return (envelope * steps).sum(1) / len(RECALLS)


def pr_curves(
    objects: Objects, found: Found, nc: int, *, iou: float = 0.5, max_det: int = 100, grid: int = 1000
) -> Curves:
    """Precision, recall and F1 of every class, counted exactly at `grid` + 1 confidences from 0 to 1."""
    matches = match(objects, found, nc, np.array([iou]), max_det=max_det)
    hit, ignored = matches.hit[0], matches.ignored[0]
    confidence = np.linspace(0.0, 1.0, grid + 1)
    shape = (nc, grid + 1)
    precision, recall, f1 = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
    pr = np.full((nc, len(RECALLS)), np.nan)
    present = np.bincount(objects.cls[matches.counted], minlength=nc)
    for c in np.flatnonzero(present):
        part = slice(matches.class_start[c], matches.class_start[c + 1])
        keep = ~ignored[part]
        tp, score = hit[part][keep], matches.score[part][keep]
        true = np.concatenate([[0], np.cumsum(tp)])
        n = np.searchsorted(-score, -confidence, side="right")  # detections at or above each confidence
        recall[c] = true[n] / present[c]
        precision[c] = np.divide(true[n], n, out=np.full(grid + 1, np.nan), where=n > 0)
        f1[c] = 2 * true[n] / (n + present[c])
        pr[c] = _interpolated(true[1:], present[c])
    has = present > 0
    best = int(np.argmax(f1[has].mean(axis=0))) if has.any() else 0
    return Curves(iou=iou, confidence=confidence, precision=precision, recall=recall, f1=f1, pr=pr, best=best)


def _interpolated(true: np.ndarray, objects: int) -> np.ndarray:
    """Highest precision at or beyond each of RECALLS, from cumulated true positives int64[k] -> float64[101]."""
    envelope = np.maximum.accumulate((true / np.arange(1, len(true) + 1))[::-1])[::-1]
    position = np.searchsorted(true / objects, RECALLS, side="left")
    return np.concatenate([envelope, [0.0]])[np.minimum(position, len(true))]


def confusion_matrix(
    objects: Objects, found: Found, nc: int, *, confidence: float = 0.25, iou: float = 0.45
) -> np.ndarray:
    """Counts int64[nc + 1, nc + 1]: row = predicted class, column = true class, the last of each = background.

    Detections at or above `confidence` and objects pair off by falling IoU whatever their class. Every detection
    without an object counts in the column `background`, on images without objects too; every object without a detection
    counts in the row `background`. Detections that lie on a crowd region, and the crowds themselves, are left out.
    """
    use = np.flatnonzero(found.score >= confidence)
    det, obj, overlap = candidates(found.image[use], found.xywh[use], objects.image, objects, iou)
    crowd = objects.crowd[obj]
    order = np.lexsort((det, -found.score[use][det], -overlap))
    order = order[~crowd[order]]
    partner = np.full(len(use), -1, np.int64)
    met = np.zeros(len(objects), bool)
    for d, o in zip(det[order].tolist(), obj[order].tolist(), strict=True):
        if partner[d] < 0 and not met[o]:
            partner[d] = o
            met[o] = True
    on_crowd = np.zeros(len(use), bool)
    on_crowd[det[crowd]] = True
    count = (partner >= 0) | ~on_crowd
    predicted = found.cls[use][count]
    true = np.where(partner[count] >= 0, objects.cls[partner[count]] if len(objects) else nc, nc)
    matrix = np.zeros((nc + 1, nc + 1), np.int64)
    np.add.at(matrix, (predicted, true), 1)
    matrix[nc, :nc] += np.bincount(objects.cls[~met & ~objects.crowd], minlength=nc)
    return matrix
