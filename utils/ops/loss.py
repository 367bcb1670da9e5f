"""Detection loss of YOLOv5: CIoU for boxes, binary cross-entropy for objectness and classes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.core.hyp import Hyp
from utils.ops.assign import LayerTargets, assign_layer
from utils.ops.boxes import ciou

LOSS_NAMES = ("box", "obj", "cls")


def layer_balance(layers: int) -> list[float]:
    """Weight of each layer's objectness, finest first."""
    return [4.0, 1.0, 0.4] if layers == 3 else [4.0, 1.0, 0.25, 0.06, 0.02][:layers]


def bce(logits: Tensor, target: Tensor, pos_weight: float, gamma: float) -> Tensor:
    """Element-wise binary cross-entropy; with gamma > 0 the focal form (Lin et al. 2017) with alpha 0.25."""
    weight = None if pos_weight == 1.0 else logits.new_tensor(pos_weight)
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
    if gamma <= 0:
        return loss
    p = logits.sigmoid()
    hit = target * p + (1 - target) * (1 - p)
    return loss * (target * 0.25 + (1 - target) * 0.75) * (1 - hit) ** gamma


class DetectionLoss:
    """Raw maps and targets -> named loss parts. Knows anchors, strides and class count as data, never the model."""

    def __init__(self, anchors: Tensor, strides: Sequence[int], nc: int, hyp: Hyp, imgsz: int) -> None:
        """anchors: [nl, na, 2] in pixels. The gains of `hyp` are scaled to layers, classes and image size."""
        layers = len(strides)
        self.nc, self.hyp, self.strides = nc, hyp, list(strides)
        self.anchors = [a.detach().float().cpu() / s for a, s in zip(anchors, strides, strict=True)]
        self.balance = layer_balance(layers)
        self.gains = {
            "box": hyp.box * 3 / layers,
            "obj": hyp.obj * (imgsz / 640) ** 2 * 3 / layers,
            "cls": hyp.cls * nc / 80 * 3 / layers,
        }
        self.positive, self.negative = 1 - hyp.label_smoothing / 2, hyp.label_smoothing / 2

    def assign(self, targets: Tensor, maps: Sequence[Tensor]) -> list[LayerTargets]:
        """Positives of each layer for CPU targets [M, 6] (image, class, cx, cy, w, h in 0..1)."""
        return [
            assign_layer(targets, anchors, (m.shape[2], m.shape[3]), self.hyp.anchor_t)
            for anchors, m in zip(self.anchors, maps, strict=True)
        ]

    def __call__(
        self,
        maps: Sequence[Tensor],
        targets: Tensor | list[LayerTargets],
        *,
        positives: Tensor | None = None,
        images: int | None = None,
    ) -> dict[str, Tensor]:
        """Loss parts for maps [B, na, H, W, 5 + nc] of each layer; their sum is the loss per image.

        `targets` is what `assign` takes or what it returned. With the batch spread over processes, `positives` [nl] and
        `images` are the counts of the whole batch; summed over the processes the parts then equal those of one process.
        """
        layers = self.assign(targets.cpu(), maps) if isinstance(targets, Tensor) else targets
        images = images if images is not None else maps[0].shape[0]
        device = maps[0].device
        parts = {name: torch.zeros((), device=device) for name in LOSS_NAMES}
        for i, (raw, layer) in enumerate(zip(maps, layers, strict=True)):
            layer = layer.to(device)
            count = positives[i] if positives is not None else torch.tensor(float(len(layer)), device=device)
            count = count.clamp(min=1)
            objectness = torch.zeros(raw.shape[:4], device=device)
            if len(layer):
                rows = raw[layer.image, layer.anchor, layer.y, layer.x].float()
                xy = rows[:, :2].sigmoid() * 2 - 0.5
                wh = (rows[:, 2:4].sigmoid() * 2) ** 2 * layer.anchor_wh
                iou = ciou(torch.cat((xy, wh), 1), layer.box)
                parts["box"] = parts["box"] + (1 - iou).sum() / count
                objectness = self._objectness(objectness, layer, iou.detach().clamp(0).to(objectness.dtype))
                if self.nc > 1:
                    parts["cls"] = parts["cls"] + self._classes(rows[:, 5:], layer.cls) / count
            weights = (self.hyp.obj_pw, self.hyp.fl_gamma)
            if len(raw):
                cells = bce(raw[..., 4].float(), objectness, *weights).sum() / objectness[0].numel()
                parts["obj"] = parts["obj"] + cells * (self.balance[i] / images)
        return {name: part * self.gains[name] for name, part in parts.items()}

    def _objectness(self, zeros: Tensor, layer: LayerTargets, iou: Tensor) -> Tensor:
        """Objectness target: the IoU of the cell's prediction; of several boxes in a cell the best, in any order."""
        _, na, h, w = zeros.shape
        flat = ((layer.image * na + layer.anchor) * h + layer.y) * w + layer.x
        return zeros.view(-1).scatter_reduce(0, flat, iou, "amax").view(zeros.shape)

    def _classes(self, logits: Tensor, cls: Tensor) -> Tensor:
        """Class loss summed over positives, averaged over classes."""
        target = torch.full_like(logits, self.negative)
        target.scatter_(1, cls[:, None], self.positive)
        return bce(logits, target, self.hyp.cls_pw, self.hyp.fl_gamma).sum() / self.nc
