"""Polygons packed in one array: extents, and clipping to rectangles, for many polygons at once."""

import numpy as np


def owners(counts: np.ndarray) -> np.ndarray:
    """The polygon number of each point, from the number of points of each polygon: [K] -> [P]."""
    return np.repeat(np.arange(len(counts)), counts)


def polygon_extents(points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Bounding boxes of packed polygons: points [P, 2], points a polygon [K] -> xyxy [K, 4]; zeros for an empty one."""
    boxes = np.zeros((len(counts), 4), points.dtype)
    filled = counts > 0
    if filled.any():
        starts = (np.cumsum(counts) - counts)[filled]
        boxes[filled, :2] = np.minimum.reduceat(points, starts)
        boxes[filled, 2:] = np.maximum.reduceat(points, starts)
    return boxes


def clip_polygons(points: np.ndarray, counts: np.ndarray, regions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clip each packed polygon to its own rectangle (Sutherland and Hodgman 1974, all polygons side by side).

    points [P, 2], counts [K], regions xyxy [K, 4] -> clipped points [Q, 2] and counts [K]; an invisible polygon gets 0.
    """
    counts = np.asarray(counts, np.int64)
    for column in range(4):
        axis, sign = column % 2, 1.0 if column < 2 else -1.0
        owner = owners(counts)
        inward = (points[:, axis] - regions[owner, column]) * sign
        inside = inward >= 0
        if inside.all():
            continue
        follower = np.arange(1, len(points) + 1)
        ends = np.cumsum(counts)
        filled = counts > 0
        follower[ends[filled] - 1] = (ends - counts)[filled]
        crossing = np.flatnonzero(inside != inside[follower])
        emitted = inside.astype(np.int64)
        emitted[crossing] += 1
        first = np.cumsum(emitted) - emitted
        clipped = np.empty((int(emitted.sum()), 2), points.dtype)
        clipped[first[inside]] = points[inside]
        there = follower[crossing]
        part = inward[crossing] / (inward[crossing] - inward[there])
        met = points[crossing] + part[:, None] * (points[there] - points[crossing])
        met[:, axis] = regions[owner[crossing], column]
        clipped[first[crossing] + inside[crossing]] = met
        points, counts = clipped, np.bincount(owner, emitted, len(counts)).astype(np.int64)
    return points, counts
