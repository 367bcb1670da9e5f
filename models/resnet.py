"""ResNet-18 and ResNet-50 classifiers, with and without SPD-Conv (Sunkara and Luo 2022, section 4.2 and Table 3).

The rows of the YAML decide what down-samples: plain networks have a strided stem, max pooling and strided stages; the
SPD networks have SPD and a convolution of stride 1 in front of stages without strides; the released code's variant has
SPD inside its bottlenecks.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from models.graph import Network, read_channels, run_rows, smallest_fit
from models.registry import layer
from models.spd import SPD, scale_pair
from utils.core.errors import UserError, printable
from utils.core.log import LOGGER

KNOWN_KEYS = ("task", "nc", "ch", "imgsz", "width_multiple", "depth_multiple", "mean", "std", "backbone", "head")


@layer()
class ConvBNReLU(nn.Module):
    """Convolution without bias, BatchNorm, ReLU, with the constants of ResNet; padding keeps the size at stride 1."""

    folds = (("conv", "bn"),)
    entries = ("conv",)

    def __init__(self, c_in: int, c_out: int, k: int = 3, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


def _shortcut(c_in: int, c_out: int, stride: int) -> nn.Module | None:
    """The 1x1 projection of a block whose input and output differ, else None."""
    if c_in == c_out and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, [B, c_in, H, W] -> [B, c_out, H/stride, W/stride]."""

    folds = (("conv1", "bn1"), ("conv2", "bn2"))
    spds = (("spd", "conv2"),)

    def __init__(self, c_in: int, c_out: int, stride: int = 1, spd: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, 1 if spd else stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.spd = SPD(stride) if spd and stride > 1 else None
        blocks = 1 if self.spd is None else stride * stride
        self.conv2 = nn.Conv2d(c_out * blocks, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = _shortcut(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        if self.spd is not None:
            y = self.spd(y)
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions at a quarter of the width beside a shortcut; the 3x3 strides.

    With `spd` the 3x3 has stride 1 and SPD follows it, while the shortcut keeps its stride: the released code's block.
    """

    folds = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
    spds = (("spd", "conv3"),)

    def __init__(self, c_in: int, c_out: int, stride: int = 1, spd: bool = False) -> None:
        super().__init__()
        hidden = c_out // 4
        self.conv1 = nn.Conv2d(c_in, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, 1 if spd else stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.spd = SPD(stride) if spd and stride > 1 else None
        blocks = 1 if self.spd is None else stride * stride
        self.conv3 = nn.Conv2d(hidden * blocks, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        if self.spd is not None:
            y = self.spd(y)
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class _Stage(nn.Module):
    """`n` residual blocks; the first one may stride (with `spd`, by SPD inside it)."""

    block: type[nn.Module]

    def __init__(self, c_in: int, c_out: int, n: int = 1, stride: int = 1, spd: bool = False) -> None:
        super().__init__()
        first = self.block(c_in, c_out, stride, spd)
        self.m = nn.Sequential(first, *(self.block(c_out, c_out) for _ in range(n - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


@layer(repeats=True)
class BasicStage(_Stage):
    """Stage of basic blocks (ResNet-18)."""

    block = BasicBlock


@layer(repeats=True)
class BottleneckStage(_Stage):
    """Stage of bottleneck blocks (ResNet-50); its width is four times that of its 3x3 convolutions."""

    block = BottleneckBlock


@layer(head=True)
class Classify(nn.Module):
    """Global average pooling and a fully connected layer, [B, C, H, W] -> logits [B, nc]."""

    def __init__(self, nc: int, channels: list[int]) -> None:
        super().__init__()
        self.fc = nn.Linear(channels[0], nc)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Classifier(Network):
    """An image classifier of YAML rows that end in `Classify`.

    Images are normalized inside by `mean` and `std` of the configuration (for values in 0..1; default: not at all), so
    that deployed files take plain images. `max_stride` is the product of the SPD scales.
    """

    task = "classify"
    mean: Tensor
    std: Tensor

    def __init__(self, cfg: dict[str, Any], nc: int | None = None, ch: int = 3) -> None:
        super().__init__(resolve(cfg, nc, ch))
        if not isinstance(self.model[-1], Classify):
            raise UserError(f"the model YAML ends in {self.rows[-1].name}; expected Classify as the last row")
        smallest_fit(self.rows, self.model, self.cfg["ch"])
        self.max_stride = math.prod(max(scale_pair(m.scale)) for m in self.model.modules() if isinstance(m, SPD))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(self.cfg[name]).view(-1, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def set_normalization(self, mean: list[float], std: list[float]) -> None:
        """Mean and standard deviation of each channel of images in 0..1; the configuration follows."""
        self.cfg = resolve({**self.cfg, "mean": mean, "std": std}, None, 3)
        for name, values in (("mean", mean), ("std", std)):
            getattr(self, name).copy_(torch.tensor(values).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, ch, H, W] in 0..1 -> logits [B, nc]."""
        return run_rows(self.rows, self.model, (images - self.mean) / self.std)


def resolve(cfg: dict[str, Any], nc: int | None, ch: int) -> dict[str, Any]:
    """A copy of the configuration with every value in its place."""
    missing = [key for key in ("backbone", "head") if not cfg.get(key)]
    if missing:
        raise UserError(f"the model YAML has no {' and no '.join(missing)}; expected lists of layer rows")
    unknown = [str(key) for key in cfg if key not in KNOWN_KEYS]
    if unknown:
        LOGGER.warning(f"model YAML: unknown keys are not used: {printable(', '.join(unknown))}")
    out = {key: copy.deepcopy(cfg[key]) for key in KNOWN_KEYS if key in cfg}
    out["task"], out["ch"] = "classify", read_channels(cfg.get("ch", ch))
    out["nc"] = cfg.get("nc") if nc is None else nc
    if not isinstance(out["nc"], int) or out["nc"] < 1:
        raise UserError(f"number of classes nc is {printable(out['nc'])}; expected an integer of at least 1")
    for name, default in (("mean", 0.0), ("std", 1.0)):
        values = cfg.get(name, [default] * out["ch"])
        numbers = isinstance(values, list) and all(isinstance(v, (int, float)) for v in values)
        if not numbers or len(values) != out["ch"] or (name == "std" and min(values) <= 0):
            raise UserError(f"{name} is {printable(values)}; expected {out['ch']} numbers, one a channel, std above 0")
        out[name] = [float(v) for v in values]
    return out
