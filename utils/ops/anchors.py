"""Anchors: how well a set fits the boxes of a data set, and k-means anchors where it does not."""

from dataclasses import dataclass

import numpy as np


def anchor_fit(wh: np.ndarray, anchors: np.ndarray, thr: float) -> tuple[float, float]:
    """Best possible recall and mean number of anchors above threshold, for box sizes [n, 2] and anchors [k, 2] (px).

    A box can be learned by an anchor when neither side differs by more than a factor `thr`.
    """
    ratio = wh[:, None, :] / anchors[None, :, :]
    worst = np.minimum(ratio, 1 / ratio).min(2)
    return float((worst.max(1) > 1 / thr).mean()), float((worst > 1 / thr).sum(1).mean())


def _fitness(wh: np.ndarray, anchors: np.ndarray, thr: float) -> float:
    """Mean closeness of each box to its best anchor, counting only boxes that it can learn."""
    ratio = wh[:, None, :] / anchors[None, :, :]
    best = np.minimum(ratio, 1 / ratio).min(2).max(1)
    return float((best * (best > 1 / thr)).mean())


def _kmeans(wh: np.ndarray, n: int, rng: np.random.Generator, rounds: int = 30) -> np.ndarray:
    """Lloyd's algorithm on sizes divided by their spread; empty clusters restart at the farthest box."""
    spread = wh.std(0).clip(min=1e-6)
    points = wh / spread
    centers = points[rng.choice(len(points), n, replace=False)].copy()
    for _ in range(rounds):
        distance = ((points[:, None] - centers[None]) ** 2).sum(2)
        owner = distance.argmin(1)
        for k in range(n):
            mine = points[owner == k]
            centers[k] = mine.mean(0) if len(mine) else points[distance.min(1).argmax()]
    return centers * spread


def kmeans_anchors(wh: np.ndarray, n: int, thr: float, seed: int = 0, generations: int = 1000) -> np.ndarray | None:
    """`n` anchors for box sizes [m, 2] in network pixels, smallest area first; None when there are too few boxes.

    k-means finds the start, then `generations` random mutations keep what fits better. A function of its arguments.
    """
    wh = wh[(wh >= 2.0).any(1)].astype(np.float64).clip(min=1e-3)
    if len(np.unique(wh.round(3), axis=0)) < n:
        return None
    rng = np.random.default_rng(seed)
    sample = wh if len(wh) <= 20000 else wh[rng.choice(len(wh), 20000, replace=False)]
    best = _kmeans(sample, n, rng)
    score = _fitness(sample, best, thr)
    for _ in range(generations):
        mutation = np.where(rng.random(best.shape) < 0.9, 1 + 0.1 * rng.random() * rng.standard_normal(best.shape), 1.0)
        trial = (best * mutation.clip(0.3, 3.0)).clip(min=2.0)
        trial_score = _fitness(sample, trial, thr)
        if trial_score > score:
            best, score = trial, trial_score
    return best[np.argsort(best.prod(1))].astype(np.float32)


@dataclass(frozen=True)
class AnchorCheck:
    """Outcome of `check_anchors`: the anchors to use [nl, na, 2] px, recall before and after, whether they changed."""

    anchors: np.ndarray
    recall: float
    new_recall: float
    changed: bool


def check_anchors(wh: np.ndarray, anchors: np.ndarray, thr: float, seed: int = 0, force: bool = False) -> AnchorCheck:
    """Keep `anchors` [nl, na, 2] (px) when they can learn at least 98 % of the boxes [n, 2] (px), else fit new ones.

    `force` fits new ones whatever the recall.
    """
    flat = anchors.reshape(-1, 2).astype(np.float64)
    wh = wh.clip(min=1e-3)
    recall = anchor_fit(wh, flat, thr)[0] if len(wh) else 1.0
    if recall >= 0.98 and not force:
        return AnchorCheck(anchors, recall, recall, False)
    fitted = kmeans_anchors(wh, len(flat), thr, seed)
    new_recall = 0.0 if fitted is None else anchor_fit(wh, fitted, thr)[0]
    if fitted is None or (new_recall <= recall and not force):
        return AnchorCheck(anchors, recall, recall, False)
    return AnchorCheck(fitted.reshape(anchors.shape), recall, new_recall, True)
