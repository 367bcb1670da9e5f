"""Box arithmetic on tensors and arrays: conversions, IoU, intersection over area, CIoU, clipping."""

import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Array = TypeVar("Array", Tensor, np.ndarray)


def _stack(columns: list, like: Array) -> Array:
    if isinstance(like, Tensor):
        return torch.stack(columns, -1)
    return np.stack(columns, -1)


def xyxy_to_cxcywh(boxes: Array) -> Array:
    """Corners to center and size, [..., 4] -> [..., 4]."""
    x1, y1, x2, y2 = (boxes[..., i] for i in range(4))
    return _stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], boxes)


def cxcywh_to_xyxy(boxes: Array) -> Array:
    """Center and size to corners, [..., 4] -> [..., 4]."""
    cx, cy, w, h = (boxes[..., i] for i in range(4))
    return _stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], boxes)


def clip_boxes(xyxy: Array, hw: tuple[int, int]) -> Array:
    """A copy of corner boxes clipped to an image of height and width `hw`."""
    h, w = hw
    if isinstance(xyxy, Tensor):
        return torch.stack([xyxy[..., i].clamp(0, w if i % 2 == 0 else h) for i in range(4)], -1)
    return np.stack([xyxy[..., i].clip(0, w if i % 2 == 0 else h) for i in range(4)], -1)


def _areas(boxes: Array) -> Array:
    return (boxes[..., 2] - boxes[..., 0]).clip(min=0) * (boxes[..., 3] - boxes[..., 1]).clip(min=0)  # type: ignore


def intersections(a: Array, b: Array) -> Array:
    """Pairwise intersection areas of xyxy boxes, [N, 4] and [M, 4] -> [N, M]."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    else:
        low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = (high - low).clip(min=0)
    return sides[..., 0] * sides[..., 1]


def box_iou(a: Array, b: Array) -> Array:
    """Pairwise IoU of xyxy boxes, [N, 4] and [M, 4] -> [N, M]. Degenerate boxes give 0, never NaN."""
    inter = intersections(a, b)
    union = _areas(a)[:, None] + _areas(b)[None, :] - inter
    return inter / union.clip(min=1e-12)


def box_ioa(a: Array, b: Array) -> Array:
    """Pairwise intersection over the area of `b`, xyxy [N, 4] and [M, 4] -> [N, M]. Degenerate boxes give 0."""
    return intersections(a, b) / _areas(b)[None, :].clip(min=1e-12)


def ciou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU of aligned center-size boxes, [N, 4] and [N, 4] -> [N] (Zheng et al. 2020, equations 7 to 11).

    The trade-off weight of the aspect term is a constant for the gradient, as in that paper.
    """
    ax1, ay1, ax2, ay2 = cxcywh_to_xyxy(a).unbind(-1)
    bx1, by1, bx2, by2 = cxcywh_to_xyxy(b).unbind(-1)
    aw, ah, bw, bh = a[..., 2], a[..., 3], b[..., 2], b[..., 3]
    inter = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0) * (
        torch.minimum(ay2, by2) - torch.maximum(ay1, by1)
    ).clamp(min=0)
    iou = inter / (aw * ah + bw * bh - inter + eps)
    width = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    height = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    center = (a[..., 0] - b[..., 0]) ** 2 + (a[..., 1] - b[..., 1]) ** 2
    distance = center / (width**2 + height**2 + eps)
    aspect = (4 / math.pi**2) * (torch.atan(bw / (bh + eps)) - torch.atan(aw / (ah + eps))) ** 2
    with torch.no_grad():
        weight = aspect / (1 - iou + aspect + eps)
    return iou - distance - weight * aspect
