"""Target assignment of YOLOv5: every box goes to anchors of similar shape, in its own cell and up to two neighbors.

Runs on the CPU on the few hundred boxes of a batch, so that the training step never waits for the accelerator.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerTargets:
    """Positives of one output layer, P of them: index tensors int64 [P] and their boxes in grid units."""

    image: Tensor
    anchor: Tensor
    y: Tensor
    x: Tensor
    cls: Tensor
    box: Tensor  # float32 [P, 4]: center relative to the cell's corner, then width and height, in grid units
    anchor_wh: Tensor  # float32 [P, 2], grid units

    def __len__(self) -> int:
        return len(self.image)

    def to(self, device: torch.device) -> "LayerTargets":
        """The same on another device, without waiting for the copy."""
        return LayerTargets(*(getattr(self, name).to(device, non_blocking=True) for name in self.__annotations__))


def assign_layer(targets: Tensor, anchors: Tensor, grid_hw: tuple[int, int], anchor_t: float) -> LayerTargets:
    """Positives of one layer.

    targets: float32 [M, 6] (image, class, cx, cy, w, h normalized to 0..1); anchors: [na, 2] in grid units.
    An anchor matches when no side ratio exceeds `anchor_t`. A box is also given to the horizontal and the vertical
    neighbor cell that its center is nearest to, unless that lies outside the grid.
    """
    h, w = grid_hw
    na = len(anchors)
    size = targets.new_tensor([w, h, w, h])
    boxes = targets[:, 2:6] * size
    ratio = boxes[None, :, 2:] / anchors[:, None, :]
    match = torch.maximum(ratio, 1 / ratio).amax(2) < anchor_t  # [na, M]; a zero side gives inf and never matches
    anchor, row = match.nonzero(as_tuple=True)
    center = boxes[row, :2]
    offset = center % 1.0
    mirrored = (targets.new_tensor([w, h]) - center) % 1.0
    inside_low, inside_high = center > 1.0, (targets.new_tensor([w, h]) - center) > 1.0
    left, top = ((offset < 0.5) & inside_low).unbind(1)
    right, bottom = ((mirrored < 0.5) & inside_high).unbind(1)
    picks = [torch.ones_like(left), left, top, right, bottom]
    steps = targets.new_tensor([[0, 0], [0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]])
    which = torch.stack(picks).nonzero(as_tuple=True)
    shift, item = steps[which[0]], which[1]
    row, anchor, center = row[item], anchor[item], center[item]
    cell = (center - shift).long()
    x, y = cell[:, 0].clamp(0, w - 1), cell[:, 1].clamp(0, h - 1)
    corner = torch.stack((x, y), 1).to(center.dtype)
    box = torch.cat((center - corner, boxes[row, 2:]), 1)
    assert na == match.shape[0]
    image, cls = targets[row, 0].long(), targets[row, 1].long()
    return LayerTargets(image, anchor, y, x, cls, box, anchors[anchor])
