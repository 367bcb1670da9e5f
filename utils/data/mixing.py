"""Mixing of two drawn scenes (mixup, cutmix), and copy-paste within one. Values first, pixels second."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from utils.core.hyp import Hyp
from utils.data.objects import Objects, survivors
from utils.ops.boxes import box_ioa, intersections

MAX_COVER = 0.3  # largest share of an object that a pasted one may cover
MIN_REST = 0.3  # smallest share of an object that must stay visible beside a cutmix patch


@dataclass(frozen=True)
class Mixup:
    """A weighted sum: `weight` of the first scene, the rest of the second (Zhang et al. 2018; drawn as in YOLOv5)."""

    weight: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Mixup":
        return cls(float(rng.beta(32.0, 32.0)))

    def objects(self, first: Objects, second: Objects, hyp: Hyp) -> Objects:
        return Objects.join([first, second])

    def apply(self, first: np.ndarray, second: np.ndarray) -> None:
        """Into `first`."""
        cv2.addWeighted(first, self.weight, second, 1 - self.weight, 0, dst=first)


@dataclass(frozen=True)
class Cutmix:
    """A rectangle (xyxy, whole pixels) of the second scene replaces the first (Yun et al. 2019, with Beta(1, 1))."""

    rect: tuple[int, int, int, int]

    @classmethod
    def draw(cls, rng: np.random.Generator, hw: tuple[int, int]) -> "Cutmix":
        side = math.sqrt(rng.beta(1.0, 1.0))
        x, y = rng.random(2) * (hw[1], hw[0])
        w, h = side * hw[1] / 2, side * hw[0] / 2
        low = max(int(x - w), 0), max(int(y - h), 0)
        return cls((*low, max(min(int(x + w), hw[1]), low[0]), max(min(int(y + h), hw[0]), low[1])))

    def objects(self, first: Objects, second: Objects, hyp: Hyp) -> Objects:
        """Objects of the first scene that stay visible beside the patch, shrunk where a whole side is hidden; objects
        of the second cut to the patch."""
        patch = np.array(self.rect, np.float64)
        covered = box_ioa(patch[None], first.xyxy)[0] if len(first) else np.zeros(0)
        rest = _beside(first, patch).take(covered < 1 - MIN_REST)
        full, known = second.areas, second.counts > 0
        inside = second.cut(np.tile(patch, (len(second), 1)))
        inside = inside.take(survivors(inside, full, known, hyp.min_box_px, hyp.min_area_ratio, hyp.max_aspect))
        return Objects.join([rest, inside])

    def apply(self, first: np.ndarray, second: np.ndarray) -> None:
        """Into `first`."""
        x1, y1, x2, y2 = self.rect
        first[y1:y2, x1:x2] = second[y1:y2, x1:x2]


def _beside(objects: Objects, patch: np.ndarray) -> Objects:
    """Boxes without the side that `patch` hides over its full length."""
    xyxy = objects.xyxy.copy()
    for axis in (0, 1):
        other = 1 - axis
        spans = (patch[other] <= xyxy[:, other]) & (patch[other + 2] >= xyxy[:, other + 2])
        low = spans & (patch[axis] <= xyxy[:, axis]) & (patch[axis + 2] > xyxy[:, axis])
        high = spans & (patch[axis + 2] >= xyxy[:, axis + 2]) & (patch[axis] < xyxy[:, axis + 2])
        xyxy[low, axis] = np.minimum(patch[axis + 2], xyxy[low, axis + 2])
        xyxy[high, axis + 2] = np.maximum(patch[axis], xyxy[high, axis])
    left = np.all(xyxy[:, :2] < xyxy[:, 2:], axis=1, keepdims=True)
    regions = np.where(left, xyxy, objects.xyxy)
    return objects.cut(regions)


@dataclass(frozen=True)
class CopyPaste:
    """Some objects of a scene pasted again, mirrored left-right (Ghiasi et al. 2021, the form of YOLOv5).

    An object with a polygon is cut out along it, another by its box. `chosen` are object numbers of the scene.
    """

    chosen: tuple[int, ...]

    @classmethod
    def draw(cls, rng: np.random.Generator, objects: Objects, width: int, share: float) -> "CopyPaste":
        """Pick `share` of the objects; those whose mirrored box would cover 30 % of an object or of an earlier paste
        are left out."""
        order = rng.permutation(len(objects))[: round(share * len(objects))]
        taken = objects.xyxy
        chosen = []
        for number in order.tolist():
            box = objects.xyxy[number : number + 1][:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (width, 0, width, 0)
            if len(taken) and (box_ioa(box, taken)[0] < MAX_COVER).all() and _free(box, taken):
                chosen.append(number)
                taken = np.concatenate([taken, box])
        return cls(tuple(chosen))

    def objects(self, objects: Objects, hw: tuple[int, int]) -> Objects:
        if not self.chosen:
            return objects
        picked = np.zeros(len(objects), bool)
        picked[list(self.chosen)] = True
        return Objects.join([objects, objects.take(picked).flipped(hw, lr=True, ud=False)])

    def apply(self, image: np.ndarray, objects: Objects) -> None:
        """Paste into `image`; `objects` are those of the scene before pasting."""
        if not self.chosen:
            return
        mask = np.zeros(image.shape[:2], np.uint8)
        ends = np.cumsum(objects.counts)
        for number in self.chosen:
            points = objects.points[ends[number] - objects.counts[number] : ends[number]]
            if len(points):
                cv2.fillPoly(mask, [np.rint((points - 0.5) * 16).astype(np.int32)], 255, shift=4)
            else:
                x1, y1, x2, y2 = np.rint(objects.xyxy[number]).astype(int)
                mask[y1:y2, x1:x2] = 255
        cv2.copyTo(cv2.flip(image, 1), cv2.flip(mask, 1), image)


def _free(box: np.ndarray, taken: np.ndarray) -> bool:
    """Whether less than 30 % of `box` itself is covered by any of `taken`."""
    area = float((box[0, 2] - box[0, 0]) * (box[0, 3] - box[0, 1]))
    return bool((intersections(box, taken)[0] < MAX_COVER * max(area, 1e-12)).all())
