"""The detection head: raw maps in `forward`, boxes in `decode`, never mixed by a mode."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from models.registry import layer

OBJECTS_PER_IMAGE = 8  # the prior of the objectness bias, for a 640-pixel image
CLASS_PRIOR = 0.6


@layer(head=True, many=True)
class Detect(nn.Module):
    """Anchor-based head of YOLOv3 and YOLOv5: one 1x1 convolution per level.

    The channels of a level are ordered (anchor, 5 + nc) as (x, y, w, h, objectness, classes). `anchors` is a buffer of
    [levels, anchors, 2] in grid units (pixels divided by the level's stride), as YOLOv5 stores it.
    """

    anchors: Tensor

    def __init__(self, nc: int, anchors: Sequence[Sequence[float]], channels: Sequence[int]) -> None:
        super().__init__()
        self.nc = nc
        self.outputs = nc + 5
        self.strides: list[int] = []
        pixels = torch.tensor(anchors, dtype=torch.float32).view(len(channels), -1, 2)
        self.per_cell = pixels.shape[1]
        self.register_buffer("anchors", pixels)
        self.m = nn.ModuleList(nn.Conv2d(c, self.per_cell * self.outputs, 1) for c in channels)

    def set_strides(self, strides: Sequence[int]) -> None:
        """Fix the strides once: anchors go from pixels to grid units and the biases take their priors."""
        assert not self.strides, "strides are set once"
        self.strides = [int(s) for s in strides]
        self.anchors /= torch.tensor(self.strides, dtype=self.anchors.dtype).view(-1, 1, 1)
        self.reset_biases()

    def reset_biases(self) -> None:
        """Objectness starts at 8 objects a 640-pixel image, each class at 0.6 / (nc - 1)."""
        for conv, stride in zip(self.m, self.strides, strict=True):
            bias = torch.zeros(self.per_cell, self.outputs)
            bias[:, 4] = math.log(OBJECTS_PER_IMAGE / (640 / stride) ** 2)
            bias[:, 5:] = math.log(CLASS_PRIOR / max(self.nc - 1, 0.01))
            with torch.no_grad():
                conv.get_parameter("bias").copy_(bias.view(-1))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Feature maps of the levels -> raw maps, each [B, anchors, H, W, 5 + nc]."""
        maps = []
        for conv, x in zip(self.m, features, strict=True):
            y = conv(x).permute(0, 2, 3, 1)
            b, h, w, _ = y.shape
            maps.append(y.reshape(b, h, w, self.per_cell, self.outputs).permute(0, 3, 1, 2, 4))
        return maps

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Raw maps -> [B, N, 5 + nc]: cx, cy, w, h in network pixels, objectness and class probabilities.

        N runs over (level, row, column, anchor), as a channels-last map lies in memory. Half-precision maps are decoded
        in float32, since a 16-bit coordinate beyond 512 pixels is worth half a pixel.
        """
        parts = []
        for raw, anchors, stride in zip(maps, self.anchors, self.strides, strict=True):
            cells = raw.permute(0, 2, 3, 1, 4)
            probability = (cells if cells.dtype == torch.float64 else cells.float()).sigmoid()
            parts.append(_decode_level(probability, anchors.to(probability.dtype) * stride, stride))
        return torch.cat(parts, 1)


def _decode_level(p: Tensor, anchors: Tensor, stride: int) -> Tensor:
    """Probabilities [B, H, W, anchors, 5 + nc] and anchors [anchors, 2] in pixels -> [B, H * W * anchors, 5 + nc].

    Centers are (2p - 0.5 + cell) * stride, sizes (2p)^2 * anchor, the rest stays p. Written as one polynomial with a
    coefficient for every output, since slices of the large tensor would be copies in all runtimes.
    """
    b, h, w, na, outputs = p.shape
    square = pad(4 * anchors, (2, outputs - 4))
    linear = pad(p.new_tensor((2 * stride, 2 * stride, 0, 0)), (0, outputs - 4), value=1.0)
    columns, rows = ((torch.arange(n, device=p.device, dtype=p.dtype) - 0.5) * stride for n in (w, h))
    # Products, not padding: OpenVINO's int8 passes move a subtraction past a pad, which shifts the boxes.
    first, second = (pad(p.new_ones(1), (i, outputs - 1 - i)) for i in (0, 1))
    x, y = columns.view(w, 1, 1) * first, rows.view(h, 1, 1, 1) * second
    return torch.addcmul(linear, p, square).mul_(p).add_(x).add_(y).reshape(b, h * w * na, outputs)
