"""A detector and files of it, small enough that exporting it takes a second."""

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import build_model
from models.backends.base import Metadata
from models.backends.graph import ExportJob, NmsSettings, nms_dict
from models.fusion import fuse

HW = (64, 96)
NAMES = ("a", 'quote " and <tag> & more', "größe")
SPREAD = 1.5  # deviation of the logits of the random head, so that scores and boxes vary from cell to cell

CFG: dict[str, Any] = {
    "nc": 3,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[6, 7, 12, 9], [20, 24, 40, 30]],
    "backbone": [
        [-1, 1, "Focus", [8, 3]],
        [-1, 1, "Conv", [16, 3, 1]],
        [-1, 1, "SPD", []],
        [-1, 1, "C3", [16]],
        [-1, 1, "Conv", [16, 3, 1]],
        [-1, 1, "SPD", []],
        [-1, 1, "C3", [32]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 3], 1, "Concat", [1]],
        [-1, 1, "C3", [16, False]],
        [[-1, 6], 1, "Detect", ["nc", "anchors"]],
    ],
}


def tiny_detector() -> nn.Module:
    """A copy of the one test model."""
    return copy.deepcopy(_detector())


@functools.cache
def _detector() -> nn.Module:
    """Two levels of stride 4 and 8, whose normalization has the statistics of `pictures()` and whose outputs vary."""
    torch.manual_seed(3)
    model = build_model(CFG).train()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
        norm.weight.data.uniform_(0.8, 1.6)
    with torch.no_grad():
        model(pictures())
        model.eval()
        for conv, raw in zip(model.head.m, model(pictures()), strict=True):
            values = raw.permute(1, 4, 0, 2, 3).flatten(2).flatten(0, 1) - conv.bias[:, None]
            scale = SPREAD / values.std(1)
            conv.weight.mul_(scale.view(-1, 1, 1, 1))
            conv.bias.copy_(-values.mean(1) * scale)
            conv.bias[4 :: model.head.outputs] -= 1.5
    return model


def job_of(model: nn.Module, path: Path, nms: NmsSettings | None = None, fused: bool = True, **facts: Any) -> ExportJob:
    """An export of the model to `path`."""
    calibration = facts.pop("calibration", None)
    metadata = Metadata(
        names=NAMES, imgsz=HW, strides=tuple(model.strides), max_stride=model.max_stride, nms=nms_dict(nms), **facts
    )
    return ExportJob(fuse(model) if fused else model, metadata, path, nms, calibration=calibration)


def pictures(count: int = 3, hw: tuple[int, int] = HW) -> torch.Tensor:
    """Smooth random images, float [count, 3, H, W] in 0..1."""
    coarse = torch.rand(count, 3, hw[0] // 8, hw[1] // 8, generator=torch.Generator().manual_seed(5))
    return nn.functional.interpolate(coarse, size=hw, mode="bilinear")
