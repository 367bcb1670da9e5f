"""The one non-maximum suppression: deterministic, per class or across classes, without a time limit."""

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor

from utils.ops.boxes import cxcywh_to_xyxy


def non_max_suppression(
    predictions: Tensor,
    *,
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    multi_label: bool = False,
    max_det: int = 300,
    max_candidates: int = 30000,
) -> list[Tensor]:
    """Decoded predictions [B, N, 5 + nc] (cx, cy, w, h in px, objectness, class probabilities) -> B tensors [n, 6].

    A row of the result is x1, y1, x2, y2, confidence, class, best first, float32. Confidence is objectness times class
    probability; with `multi_label` a box yields one candidate for each class above `conf_thres`, else its best class.
    Boxes that are not finite and candidates beyond the `max_candidates` best are dropped; equal scores keep order,
    so the result does not depend on the batch or the clock.
    """
    wanted = None if classes is None else torch.tensor(sorted(set(classes)), device=predictions.device)
    return [
        _one_image(p.float(), conf_thres, iou_thres, wanted, agnostic, multi_label, max_det, max_candidates)
        for p in predictions
    ]


def _one_image(
    p: Tensor,
    conf_thres: float,
    iou_thres: float,
    wanted: Tensor | None,
    agnostic: bool,
    multi_label: bool,
    max_det: int,
    max_candidates: int,
) -> Tensor:
    p = p[(p[:, 4] > conf_thres) & p[:, :4].isfinite().all(1)]  # one box without end would keep all others apart
    scores = p[:, 5:] * p[:, 4:5]
    if multi_label and scores.shape[1] > 1:
        row, cls = (scores > conf_thres).nonzero(as_tuple=True)
        conf = scores[row, cls]
    else:
        conf, cls = scores.max(1) if scores.shape[1] else (p[:, 4], torch.zeros(len(p), dtype=torch.long))
        row = (conf > conf_thres).nonzero(as_tuple=True)[0]
        conf, cls = conf[row], cls[row]
    if wanted is not None:
        keep = torch.isin(cls, wanted)
        row, conf, cls = row[keep], conf[keep], cls[keep]
    order = conf.argsort(descending=True, stable=True)[:max_candidates]
    row, conf, cls = row[order], conf[order], cls[order]
    boxes = cxcywh_to_xyxy(p[row, :4])
    keep = suppress(boxes, conf, torch.zeros_like(cls) if agnostic else cls, iou_thres, max_det)
    return torch.cat((boxes[keep], conf[keep, None], cls[keep, None].to(boxes.dtype)), 1)


def suppress(boxes: Tensor, scores: Tensor, groups: Tensor, iou_thres: float, limit: int | None = None) -> Tensor:
    """Greedy NMS within each group, for xyxy [N, 4], scores [N], groups [N] -> kept indices, best first.

    Groups are separated by shifting them apart in float64, so images of any size keep exact IoUs. With `limit` only
    that many are looked for: what is kept of the best n candidates does not depend on the rest, so n grows until it
    suffices.
    """
    if not len(boxes):
        return torch.zeros(0, dtype=torch.long, device=boxes.device)
    wide = boxes.double()
    span = wide.max() - wide.min() + 1
    order = scores.argsort(descending=True, stable=True)
    wide = (wide + (groups.double() * span)[:, None])[order]
    scores = scores.double()[order]
    n = len(boxes) if limit is None else min(4 * limit, len(boxes))
    while True:
        keep = torchvision.ops.nms(wide[:n], scores[:n], iou_thres)
        if n == len(boxes) or (limit is not None and len(keep) >= limit):
            return order[keep[:limit]]
        n = min(4 * n, len(boxes))
