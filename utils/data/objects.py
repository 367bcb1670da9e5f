"""The objects of a sample: boxes, and polygons where known, carried through every change of geometry together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from utils.ops.polygons import clip_polygons, owners, polygon_extents

POLYGON_AREA_RATIO = 0.01  # the extents of a cut polygon are exact, so that a far smaller rest still is a true label


class Labels(Protocol):
    """What is read of a label index (utils/data/index.py): packed arrays over all images."""

    @property
    def offsets(self) -> np.ndarray: ...

    @property
    def cls(self) -> np.ndarray: ...

    @property
    def boxes(self) -> np.ndarray: ...

    @property
    def crowd(self) -> np.ndarray: ...

    @property
    def poly_offsets(self) -> np.ndarray: ...

    @property
    def poly_xy(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Objects:
    """Classes [K], boxes xyxy [K, 4], and packed polygons: points [P, 2], `counts` [K] of them an object (0: none)."""

    cls: np.ndarray
    xyxy: np.ndarray
    points: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.cls)

    @classmethod
    def empty(cls) -> "Objects":
        return cls(np.zeros(0, np.float32), np.zeros((0, 4)), np.zeros((0, 2)), np.zeros(0, np.int64))

    @classmethod
    def of(cls, labels: Labels, image: int) -> "Objects":
        """The objects of one image, crowd regions left out."""
        first, last = int(labels.offsets[image]), int(labels.offsets[image + 1])
        bounds = labels.poly_offsets[first : last + 1]
        objects = cls(
            labels.cls[first:last].astype(np.float32),
            labels.boxes[first:last].astype(np.float64),
            labels.poly_xy[bounds[0] : bounds[-1]].astype(np.float64),
            np.diff(bounds),
        )
        crowd = labels.crowd[first:last]
        return objects.take(~crowd) if crowd.any() else objects

    @classmethod
    def join(cls, parts: Sequence["Objects"]) -> "Objects":
        return cls(
            np.concatenate([p.cls for p in parts]),
            np.concatenate([p.xyxy for p in parts]),
            np.concatenate([p.points for p in parts]),
            np.concatenate([p.counts for p in parts]),
        )

    @property
    def areas(self) -> np.ndarray:
        """Areas of the boxes, [K]."""
        return (self.xyxy[:, 2] - self.xyxy[:, 0]) * (self.xyxy[:, 3] - self.xyxy[:, 1])

    def take(self, keep: np.ndarray) -> "Objects":
        """The objects where the mask [K] is true."""
        return Objects(self.cls[keep], self.xyxy[keep], self.points[np.repeat(keep, self.counts)], self.counts[keep])

    def scaled(self, scale: np.ndarray, offset: np.ndarray) -> "Objects":
        """Each object times its own scale (x, y) plus its own offset (x, y), both [K, 2]."""
        xyxy = self.xyxy * np.tile(scale, 2) + np.tile(offset, 2)
        if not len(self.points):
            return replace(self, xyxy=xyxy)
        owner = owners(self.counts)
        return replace(self, xyxy=xyxy, points=self.points * scale[owner] + offset[owner])

    def warped(self, matrix: np.ndarray) -> "Objects":
        """Through a 3x3 homography; the new box is the extents of the polygon, else of the box's corners."""
        corners = self.xyxy[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)
        four = np.full(len(self), 4)
        xyxy = polygon_extents(project(corners, matrix), four)
        points = project(self.points, matrix)
        known = self.counts > 0
        xyxy[known] = polygon_extents(points, self.counts)[known]
        return replace(self, xyxy=xyxy, points=points)

    def cut(self, regions: np.ndarray) -> "Objects":
        """Each object clipped to its own rectangle, [K, 4]; a cut polygon's box becomes the extents of what is left."""
        low, high = np.tile(regions[:, :2], 2), np.tile(regions[:, 2:], 2)
        xyxy = np.clip(self.xyxy, low, high)
        sliced = (self.counts > 0) & (xyxy != self.xyxy).any(1)
        if not sliced.any():
            return replace(self, xyxy=xyxy)
        of_sliced = np.repeat(sliced, self.counts)
        points, counts = clip_polygons(self.points[of_sliced], self.counts[sliced], regions[sliced])
        xyxy[sliced] = polygon_extents(points, counts)
        return _with_polygons(replace(self, xyxy=xyxy), sliced, points, counts)

    def flipped(self, hw: tuple[int, int], lr: bool, ud: bool) -> "Objects":
        """Mirrored in an image of height and width `hw`."""
        xyxy, points = self.xyxy, self.points
        for axis, mirrored, size in ((0, lr, hw[1]), (1, ud, hw[0])):
            if mirrored:
                xyxy, points = xyxy.copy(), points.copy()
                xyxy[:, [axis, axis + 2]] = size - xyxy[:, [axis + 2, axis]]
                points[:, axis] = size - points[:, axis]
        return replace(self, xyxy=xyxy, points=points)


def _with_polygons(objects: Objects, which: np.ndarray, points: np.ndarray, counts: np.ndarray) -> Objects:
    """`objects` with the polygons of the objects in the mask `which` exchanged; no points left means no polygon."""
    rank = np.concatenate([np.flatnonzero(~which), np.flatnonzero(which)])
    packed = np.concatenate([objects.points[np.repeat(~which, objects.counts)], points])
    sizes = np.concatenate([objects.counts[~which], counts])
    order = np.argsort(rank[owners(sizes)], kind="stable")
    new_counts = np.zeros_like(objects.counts)
    new_counts[rank] = sizes
    return replace(objects, points=packed[order], counts=new_counts)


def project(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points [P, 2] through a 3x3 homography."""
    moved = points @ matrix[:2, :2].T + matrix[:2, 2]
    if matrix[2, 0] == 0 and matrix[2, 1] == 0:
        return moved / matrix[2, 2]
    return moved / (points @ matrix[2, :2] + matrix[2, 2])[:, None]


def survivors(
    seen: Objects, full_areas: np.ndarray, known: np.ndarray, min_px: float, min_ratio: float, max_aspect: float
) -> np.ndarray:
    """Which objects are still labels after a warp, [K] bool.

    `seen` are the clipped objects, `full_areas` their areas had nothing been cut, `known` says whose shape came from a
    polygon. Width and height above `min_px` (output pixels), visible share above `min_ratio`, aspect below
    `max_aspect`.
    """
    w, h = seen.xyxy[:, 2] - seen.xyxy[:, 0], seen.xyxy[:, 3] - seen.xyxy[:, 1]
    share = w * h / np.maximum(full_areas, 1e-12)
    floor = np.where(known, min(min_ratio, POLYGON_AREA_RATIO), min_ratio)
    slender = np.maximum(w, h) < max_aspect * np.minimum(w, h)
    return (w > min_px) & (h > min_px) & (share > floor) & slender
