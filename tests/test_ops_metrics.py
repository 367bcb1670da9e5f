"""Matching, average precision, curves and the confusion matrix against slow loops and the engine."""

import numpy as np
import pytest

from tests.test_engine_coco_eval import empty, random_case
from utils.engine.evaluation.coco_eval import COCO_IOU_THRS, coco_metrics
from utils.ops import metrics as ops
from utils.ops.metrics import Found, Objects, average_precision, confusion_matrix, match, pr_curves


def objects(*rows: tuple) -> Objects:
    """Rows (image, class, x, y, w, h[, crowd])."""
    table = np.array([(*row, 0)[:7] for row in rows], np.float64).reshape(-1, 7)
    xywh = table[:, 2:6]
    return Objects(table[:, 0].astype(int), table[:, 1].astype(int), xywh, xywh[:, 2:].prod(1), table[:, 6] > 0)


def found(*rows: tuple) -> Found:
    """Rows (image, class, x, y, w, h, score)."""
    table = np.array(rows, np.float64).reshape(-1, 7)
    xywh = table[:, 2:6]
    return Found(table[:, 0].astype(int), table[:, 1].astype(int), xywh, table[:, 6], xywh[:, 2:].prod(1))


@pytest.mark.parametrize("area,key", [((0.0, 1e10), "AP"), ((0.0, 1024.0), "AP_S"), ((1024.0, 9216.0), "AP_M")])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_average_precision_from_matches_equals_the_engine(area: tuple, key: str, seed: int):
    truth, dets = random_case(seed, ties=seed == 2)
    expected, _ = coco_metrics(truth, dets)
    matches = match(truth.objects, dets, truth.nc, np.array(COCO_IOU_THRS), area=area)
    present = np.bincount(truth.objects.cls[matches.counted], minlength=truth.nc)
    values = []
    for c in np.flatnonzero(present):
        part = slice(matches.class_start[c], matches.class_start[c + 1])
        for t in range(len(COCO_IOU_THRS)):
            weight = (~matches.ignored[t, part]).astype(float)[None]
            values.append(average_precision(matches.hit[t, part], weight, present[c : c + 1])[0])
    assert np.mean(values) == pytest.approx(expected[key], abs=1e-12)


def test_small_chunks_of_pairs_change_nothing(monkeypatch):
    truth, dets = random_case(3)
    whole = match(truth.objects, dets, truth.nc, np.array([0.5]))
    monkeypatch.setattr(ops, "PAIRS_AT_ONCE", 3)
    chunked = match(truth.objects, dets, truth.nc, np.array([0.5]))
    assert (whole.gt == chunked.gt).all()


def test_weights_equal_repeated_detections():
    rng = np.random.default_rng(0)
    hits = rng.random(60) < 0.5
    weights = rng.integers(0, 3, (20, 60)).astype(float)
    weights[:3, :9] = 0
    together = average_precision(hits, weights, np.full(20, 80.0))
    for row, value in zip(weights.astype(int), together, strict=True):
        repeated = np.repeat(hits, row)
        assert value == pytest.approx(slow_average_precision(repeated, 80), abs=1e-12)


def slow_average_precision(hits: np.ndarray, objects: int) -> float:
    """The definition: mean over 101 recall levels of the best precision at that recall or beyond."""
    tp = np.cumsum(hits)
    precision, recall = tp / np.arange(1, len(hits) + 1), tp / objects
    return float(np.mean([max(precision[recall >= r], default=0.0) for r in ops.RECALLS]))


def test_no_hits_give_zero():
    assert average_precision(np.zeros(3, bool), np.ones((2, 3)), np.array([2.0, 1])).tolist() == [0, 0]
    assert average_precision(np.zeros(0, bool), np.ones((1, 0)), np.array([2.0])).tolist() == [0]


def test_curves_equal_counting_at_every_confidence():
    truth, dets = random_case(4, ties=True)
    curves = pr_curves(truth.objects, dets, truth.nc, grid=50)
    for c in range(truth.nc):
        of_class = Found(*(getattr(dets, k)[dets.cls == c] for k in ("image", "cls", "xywh", "score", "area")))
        total = int(((truth.objects.cls == c) & ~truth.objects.crowd).sum())
        for g in (0, 10, 25, 40, 50):
            keep = of_class.score >= curves.confidence[g]
            part = Found(*(getattr(of_class, k)[keep] for k in ("image", "cls", "xywh", "score", "area")))
            m = match(truth.objects, part, truth.nc, np.array([0.5]))
            tp, n = int(m.hit.sum()), int((~m.ignored).sum())
            assert curves.recall[c, g] == pytest.approx(tp / total)
            assert curves.precision[c, g] == pytest.approx(tp / n) if n else np.isnan(curves.precision[c, g])
            assert curves.f1[c, g] == pytest.approx(2 * tp / (n + total))


def test_best_confidence_has_the_highest_mean_f1():
    truth, dets = random_case(5)
    curves = pr_curves(truth.objects, dets, truth.nc)
    p, r, f1 = curves.at_best()
    assert f1.mean() == np.nanmean(curves.f1, 0).max()
    assert f1 == pytest.approx(2 * p * r / (p + r))


def test_curves_of_nothing_are_nan():
    truth, none = empty()
    curves = pr_curves(truth.objects, none, 2)
    assert np.isnan(curves.recall).all() and curves.best_confidence == 0.0


def test_confusion_counts_all_false_positives_and_misses():
    truth = objects((0, 0, 0, 0, 10, 10), (0, 1, 50, 50, 10, 10), (1, 0, 0, 0, 10, 10), (2, 1, 0, 0, 50, 50, 1))
    dets = found(
        (0, 0, 0, 0, 10, 10, 0.9),  # right
        (0, 0, 50, 50, 10, 10, 0.8),  # class 1 taken for class 0
        (0, 1, 80, 80, 10, 10, 0.7),  # on nothing, image with matches
        (3, 0, 0, 0, 10, 10, 0.7),  # on nothing, image without objects
        (1, 1, 40, 40, 10, 10, 0.6),  # on nothing, image in which nothing matched
        (2, 1, 5, 5, 10, 10, 0.6),  # on a crowd: left out
        (0, 1, 50, 50, 10, 10, 0.1),  # below the confidence
    )
    matrix = confusion_matrix(truth, dets, 2)
    assert matrix.tolist() == [[1, 1, 1], [0, 0, 2], [1, 0, 0]]


def test_confusion_matrix_keeps_every_detection_and_object():
    truth, dets = random_case(6)
    plain = Objects(**{**vars(truth.objects), "crowd": np.zeros(len(truth.objects), bool)})
    matrix = confusion_matrix(plain, dets, truth.nc, confidence=0.3)
    assert matrix[:-1].sum() == (dets.score >= 0.3).sum()
    assert matrix[:, :-1].sum(0).tolist() == np.bincount(plain.cls, minlength=truth.nc).tolist()


def test_confusion_matrix_of_nothing():
    truth, none = empty()
    assert confusion_matrix(truth.objects, none, 2).sum() == 0
