"""Is the difference between two models more than luck? A paired bootstrap over the images of one data set.

The images are drawn with replacement, the same draw for both models, and AP is measured anew. Detections are matched
once: a match does not depend on which other images are drawn, so that a replicate is a weighted pass over sorted
detections.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.core.errors import UserError
from utils.engine.evaluation.coco_eval import MetricSettings, Truth
from utils.ops.metrics import ANY_AREA, Found, average_precision, match

CELLS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class _Class:
    """What one class contributes to one metric of one model."""

    image: np.ndarray  # int64[k], image of each detection, in the order of falling score
    hits: np.ndarray  # bool[T, k]
    counted: np.ndarray  # bool[T, k], not ignored
    objects: np.ndarray  # int64[j], images of the objects to be found


@dataclass(frozen=True)
class Interval:
    """A difference B - A with its bootstrap interval."""

    metric: str
    a: float
    b: float
    low: float
    high: float
    level: float
    share_above: float  # share of the replicates in which B is better
    replicates: int
    a_range: tuple[float, float]  # percentile interval of A by itself
    b_range: tuple[float, float]

    @property
    def difference(self) -> float:
        return self.b - self.a

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "difference": self.difference, "clear": self.clear}


class Resampler:
    """Average precision of one model for any weights of the images."""

    def __init__(self, truth: Truth, found: Found, settings: MetricSettings, area: tuple[float, float]):
        thrs = np.array(settings.iou_thrs)
        matches = match(truth.objects, found, truth.nc, thrs, area=area, max_det=settings.max_dets[-1])
        hits = matches.hit
        self.classes: list[_Class] = []
        for c in range(truth.nc):
            objects = truth.objects.image[matches.counted & (truth.objects.cls == c)]
            if len(objects):
                part = slice(matches.class_start[c], matches.class_start[c + 1])
                self.classes.append(_Class(matches.image[part], hits[:, part], ~matches.ignored[:, part], objects))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """AP float64[R] when image i counts weights[r, i] times; NaN where no object is left."""
        total, classes = np.zeros(len(weights)), np.zeros(len(weights))
        for c in self.classes:
            objects = weights[:, c.objects].sum(1)
            present = np.flatnonzero(objects > 0)
            step = max(1, CELLS_AT_ONCE // max(len(c.image), 1))
            for start in range(0, len(present), step):
                rows = present[start : start + step]
                each = weights[np.ix_(rows, c.image)]
                parts = [average_precision(h, each * n, objects[rows]) for h, n in zip(c.hits, c.counted, strict=True)]
                total[rows] += np.mean(parts, axis=0)
            classes[present] += 1
        return np.divide(total, classes, out=np.full(len(weights), np.nan), where=classes > 0)


def paired_bootstrap(
    truth: Truth,
    a: Found,
    b: Found,
    *,
    metrics: Sequence[str] = ("AP", "AP_S"),
    settings: MetricSettings | None = None,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Bootstrap intervals of the differences B - A. Metrics: `AP`, or `AP_` and a size range of the settings."""
    settings = settings or MetricSettings()
    check_bootstrap(replicates, level)
    draws = image_weights(len(truth), replicates, seed)
    out = {}
    for metric in metrics:
        area = ANY_AREA if metric == "AP" else settings.ranges.get(metric.removeprefix("AP_"))
        if area is None:
            choices = ", ".join(f"AP_{key}" for key in settings.ranges)
            raise UserError(f"metric {metric} cannot be resampled; expected AP, {choices}")
        models = [Resampler(truth, found, settings, area) for found in (a, b)]
        whole = [float(model(np.ones((1, len(truth))))[0]) for model in models]
        drawn = [model(draws) for model in models]
        usable = np.isfinite(drawn[0]) & np.isfinite(drawn[1])
        a_drawn, b_drawn = drawn[0][usable], drawn[1][usable]
        difference = _centered(b_drawn - a_drawn, whole[1] - whole[0])
        above = float(np.mean(difference > 0) + np.mean(difference == 0) / 2) if usable.any() else float("nan")
        low, high = _range(difference, level)
        ranges = (_range(_centered(a_drawn, whole[0]), level), _range(_centered(b_drawn, whole[1]), level))
        out[metric] = Interval(metric, whole[0], whole[1], low, high, level, above, len(difference), *ranges)
    return out


def check_bootstrap(replicates: int, level: float) -> None:
    """UserError where no interval can come of it."""
    if replicates < 2 or not 0 < level < 1:
        raise UserError(f"{replicates} replicates at level {level}; expected at least 2 and a level between 0 and 1")


def _centered(values: np.ndarray, measured: float) -> np.ndarray:
    """Replicates moved so that their mean is the measured value.

    AP of a resample is biased (upward, as a rule): rare classes that the model misses are not drawn at all in some.
    """
    return values - values.mean() + measured if len(values) else values


def _range(values: np.ndarray, level: float) -> tuple[float, float]:
    """The central `level` of the values; NaN without any."""
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def image_weights(images: int, replicates: int, seed: int) -> np.ndarray:
    """How often each image is drawn in each replicate, float64[replicates, images]; every row sums to `images`."""
    rng = np.random.default_rng(seed)
    share = np.full(images, 1 / images)
    return rng.multinomial(images, share, size=replicates).astype(np.float64)
