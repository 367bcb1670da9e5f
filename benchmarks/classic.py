"""The classic mosaic on a canvas, kept as the reference for geometry and speed.

Resize each image, paste it on a canvas of twice the output's size, warp the canvas, recolor, mirror. It draws the
scenes of a plan (see `utils.data.dataset`).
"""

from collections.abc import Callable

import cv2
import numpy as np

from utils.core.hyp import Hyp
from utils.data.augment import Flip, Hsv
from utils.data.dataset import Plan
from utils.data.mosaic import Scene
from utils.data.objects import Objects
from utils.ops.letterbox import FILL

Read = Callable[[int], np.ndarray]


def resized(image: np.ndarray, long: int) -> np.ndarray:
    """Bilinear, to a long side of `long`."""
    gain = long / max(image.shape[:2])
    if gain == 1:
        return image
    size = max(round(image.shape[1] * gain), 1), max(round(image.shape[0] * gain), 1)
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def canvas_of(scene: Scene, read: Read) -> np.ndarray:
    """Paste the scene's images, already resized by `read`, on its canvas."""
    images = [read(tile.index) for tile in scene.tiles]
    canvas = np.full((*scene.canvas_hw, 3), FILL, images[0].dtype)
    for tile, image in zip(scene.tiles, images, strict=True):
        x1, y1, x2, y2 = (int(v) for v in tile.rect)
        left, top = int(tile.offset[0]), int(tile.offset[1])
        if x2 > x1 and y2 > y1:
            canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
    return canvas


def warped(scene: Scene, canvas: np.ndarray) -> np.ndarray:
    """The canvas through the scene's warp, pixel centers lying at halves."""
    to_index = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    from_index = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    matrix = to_index @ scene.matrix @ from_index
    size = scene.out_hw[1], scene.out_hw[0]
    if scene.warp.perspective_x or scene.warp.perspective_y:
        return cv2.warpPerspective(canvas, matrix, size, borderValue=(FILL,) * 3)
    return cv2.warpAffine(canvas, matrix[:2], size, borderValue=(FILL,) * 3)


def boxes_of(scene: Scene, objects: Callable[[int], Objects], hyp: Hyp) -> tuple[np.ndarray, np.ndarray]:
    """Classes [k] and boxes xyxy [k, 4] in the output; boxes only, each step as the canvas takes it."""
    classes, boxes, areas = [], [], []
    for tile in scene.tiles:
        part = objects(tile.index)
        placed = part.xyxy * (tile.scale * 2) + tile.offset * 2
        areas.append((placed[:, 2] - placed[:, 0]) * (placed[:, 3] - placed[:, 1]) * scene.warp.scale**2)
        x1, y1, x2, y2 = tile.rect
        boxes.append(np.clip(placed, [x1, y1, x1, y1], [x2, y2, x2, y2]))
        classes.append(part.cls)
    cls, xyxy, area = np.concatenate(classes), np.concatenate(boxes), np.concatenate(areas)
    corners = np.ones((len(xyxy) * 4, 3))
    corners[:, :2] = xyxy[:, [0, 1, 2, 3, 0, 3, 2, 1]].reshape(-1, 2)
    corners = corners @ scene.matrix.T
    corners = (corners[:, :2] / corners[:, 2:]).reshape(-1, 4, 2)
    moved = np.concatenate([corners.min(1), corners.max(1)], 1)
    moved[:, [0, 2]] = moved[:, [0, 2]].clip(0, scene.out_hw[1])
    moved[:, [1, 3]] = moved[:, [1, 3]].clip(0, scene.out_hw[0])
    w, h = moved[:, 2] - moved[:, 0], moved[:, 3] - moved[:, 1]
    aspect = np.maximum(w / (h + 1e-16), h / (w + 1e-16))
    keep = (w > hyp.min_box_px) & (h > hyp.min_box_px)
    keep &= (w * h / (area + 1e-16) > hyp.min_area_ratio) & (aspect < hyp.max_aspect)
    return cls[keep], moved[keep]


def recolored(image: np.ndarray, gains: Hsv) -> np.ndarray:
    """Hue, saturation and value by tables, the whole image at once."""
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    tables = gains.tables()
    merged = cv2.merge((cv2.LUT(hue, tables[0]), cv2.LUT(saturation, tables[1]), cv2.LUT(value, tables[2])))
    return cv2.cvtColor(merged, cv2.COLOR_HSV2RGB)


def mirrored(image: np.ndarray, flip: Flip) -> np.ndarray:
    if flip.ud:
        image = np.flipud(image)
    return np.fliplr(image) if flip.lr else image


def classic_sample(
    plan: Plan, read: Read, objects: Callable[[int], Objects], hyp: Hyp
) -> tuple[np.ndarray, np.ndarray]:
    """One mosaic sample: image uint8 [3, H, W] contiguous, and labels float32 [k, 5]."""
    scene = plan.scenes[0]
    image = warped(scene, canvas_of(scene, read))
    cls, xyxy = boxes_of(scene, objects, hyp)
    image = mirrored(recolored(image, plan.hsv), plan.flip)
    h, w = scene.out_hw
    if plan.flip.ud:
        xyxy[:, [1, 3]] = h - xyxy[:, [3, 1]]
    if plan.flip.lr:
        xyxy[:, [0, 2]] = w - xyxy[:, [2, 0]]
    labels = np.zeros((len(cls), 5), np.float32)
    labels[:, 0] = cls
    labels[:, 1:3] = (xyxy[:, :2] + xyxy[:, 2:]) / 2 / (w, h)
    labels[:, 3:5] = (xyxy[:, 2:] - xyxy[:, :2]) / (w, h)
    return np.ascontiguousarray(image.transpose(2, 0, 1)), labels
