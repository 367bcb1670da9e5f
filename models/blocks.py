"""Convolutional layers of the YOLOv5 zoo, with the sub-module names that YOLOv5's checkpoints use.

Every layer takes (c_in, c_out, ...) and maps [B, c_in, H, W] to [B, c_out, H', W']; the channel rule stands in its
decorator. Batch normalization is that of the YOLO family (eps 1e-3, momentum 0.03), the activation SiLU unless the
model YAML says otherwise (`Conv.uses_default_act`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.registry import layer

BN_EPS = 1e-3
BN_MOMENTUM = 0.03
Size = int | tuple[int, int]


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Batch normalization with the constants of the YOLO family."""
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)


def same_padding(k: Size, d: int = 1) -> Size:
    """Padding with which an odd kernel at stride 1 keeps the size (even kernels: floor(k / 2))."""
    if isinstance(k, int):
        return (d * (k - 1) + 1) // 2
    return ((d * (k[0] - 1) + 1) // 2, (d * (k[1] - 1) + 1) // 2)


@layer()
class Conv(nn.Module):
    """Convolution without bias, batch normalization, activation.

    `act` is True for the model's activation, False for none, or a module. A bool in the place of the dilation is read
    as `act`, where release 6.0 had it.
    """

    folds = (("conv", "bn"),)
    entries = ("conv",)

    def __init__(
        self,
        c_in: int,
        c_out: int,
        k: Size = 1,
        s: Size = 1,
        p: Size | None = None,
        g: int = 1,
        d: int | bool = 1,
        act: bool | nn.Module = True,
    ) -> None:
        super().__init__()
        if isinstance(d, bool):
            d, act = 1, d
        k, s = _size(k), _size(s)
        padding = same_padding(k, d) if p is None else _size(p)
        self.conv = nn.Conv2d(c_in, c_out, k, s, padding, groups=g, dilation=d, bias=False)
        self.bn = batch_norm(c_out)
        self.uses_default_act = act is True
        self.act = nn.SiLU() if act is True else act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def _size(value: Size | Sequence[int]) -> Size:
    return value if isinstance(value, int) else (int(value[0]), int(value[1]))


@layer()
class DWConv(Conv):
    """Depth-wise convolution: as many groups as both widths allow."""

    def __init__(
        self, c_in: int, c_out: int, k: int = 1, s: int = 1, d: int | bool = 1, act: bool | nn.Module = True
    ) -> None:
        super().__init__(c_in, c_out, k, s, g=math.gcd(c_in, c_out), d=d, act=act)


@layer()
class DWConvTranspose2d(nn.ConvTranspose2d):
    """Depth-wise transposed convolution."""

    def __init__(self, c_in: int, c_out: int, k: int = 1, s: int = 1, p: int = 0, output_padding: int = 0) -> None:
        super().__init__(c_in, c_out, k, s, p, output_padding, groups=math.gcd(c_in, c_out))


@layer()
class Bottleneck(nn.Module):
    """1x1 then 3x3 convolution, added to the input where `shortcut` and the widths allow."""

    entries = ("cv1.conv",)

    def __init__(self, c_in: int, c_out: int, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c_out * e)
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = Conv(hidden, c_out, 3, g=g)
        self.add = shortcut and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


@layer()
class CrossConv(nn.Module):
    """A k x k convolution as 1 x k and k x 1."""

    entries = ("cv1.conv",)

    def __init__(
        self, c_in: int, c_out: int, k: int = 3, s: int = 1, g: int = 1, e: float = 1.0, shortcut: bool = False
    ) -> None:
        super().__init__()
        hidden = int(c_out * e)
        self.cv1 = Conv(c_in, hidden, (1, k), (1, s))
        self.cv2 = Conv(hidden, c_out, (k, 1), (s, 1), g=g)
        self.add = shortcut and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


@layer(repeats=True)
class BottleneckCSP(nn.Module):
    """Cross-stage-partial bottlenecks with the normalization after the concatenation (releases before 4.0)."""

    entries = ("cv1.conv", "cv2")

    def __init__(self, c_in: int, c_out: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c_out * e)
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = nn.Conv2d(c_in, hidden, 1, bias=False)
        self.cv3 = nn.Conv2d(hidden, hidden, 1, bias=False)
        self.cv4 = Conv(2 * hidden, c_out, 1)
        self.bn = batch_norm(2 * hidden)
        self.act = nn.SiLU()
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, g, e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        deep, shallow = self.cv3(self.m(self.cv1(x))), self.cv2(x)
        return self.cv4(self.act(self.bn(torch.cat((deep, shallow), 1))))


@layer(repeats=True)
class C3(nn.Module):
    """Cross-stage-partial block with three convolutions: cv3(concat(m(cv1(x)), cv2(x)))."""

    entries = ("cv1.conv", "cv2.conv")

    def __init__(self, c_in: int, c_out: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c_out * e)
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = Conv(c_in, hidden, 1)
        self.cv3 = Conv(2 * hidden, c_out, 1)
        self.m = self.inner(hidden, n, shortcut, g)

    def inner(self, hidden: int, n: int, shortcut: bool, g: int) -> nn.Module:
        """The deep branch, [B, hidden, H, W] to the same shape; what the variants of C3 replace."""
        return nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, g, e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


@layer(repeats=True)
class C3x(C3):
    """C3 with cross convolutions."""

    def inner(self, hidden: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return nn.Sequential(*(CrossConv(hidden, hidden, 3, 1, g, 1.0, shortcut) for _ in range(n)))


@layer(repeats=True)
class C3Ghost(C3):
    """C3 with ghost bottlenecks."""

    def inner(self, hidden: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return nn.Sequential(*(GhostBottleneck(hidden, hidden) for _ in range(n)))


@layer()
class SPP(nn.Module):
    """Spatial pyramid pooling: the input beside its maxima over windows of several sizes."""

    entries = ("cv1.conv",)

    def __init__(self, c_in: int, c_out: int, k: Sequence[int] = (5, 9, 13)) -> None:
        super().__init__()
        hidden = c_in // 2
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = Conv(hidden * (len(k) + 1), c_out, 1)
        self.m = nn.ModuleList(nn.MaxPool2d(size, 1, size // 2) for size in k)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))


@layer()
class SPPF(nn.Module):
    """SPP of windows k, 2k - 1, 3k - 2 by pooling three times in a row."""

    entries = ("cv1.conv",)

    def __init__(self, c_in: int, c_out: int, k: int = 5) -> None:
        super().__init__()
        hidden = c_in // 2
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = Conv(hidden * 4, c_out, 1)
        self.m = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.m(maps[-1]))
        return self.cv2(torch.cat(maps, 1))


@layer()
class C3SPP(nn.Module):
    """C3 whose deep branch is an SPP; `n`, `shortcut` and `g` only keep the places of C3's arguments."""

    entries = ("cv1.conv", "cv2.conv")

    def __init__(
        self,
        c_in: int,
        c_out: int,
        k: Sequence[int] = (5, 9, 13),
        n: int = 1,
        shortcut: bool = True,
        g: int = 1,
        e: float = 0.5,
    ) -> None:
        super().__init__()
        hidden = int(c_out * e)
        self.cv1 = Conv(c_in, hidden, 1)
        self.cv2 = Conv(c_in, hidden, 1)
        self.cv3 = Conv(2 * hidden, c_out, 1)
        self.m = SPP(hidden, hidden, k)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


@layer()
class GhostConv(nn.Module):
    """Half of the channels by a convolution, the other half from those by a cheap depth-wise 5x5 (GhostNet)."""

    entries = ("cv1.conv",)

    def __init__(self, c_in: int, c_out: int, k: int = 1, s: int = 1, g: int = 1, act: bool | nn.Module = True) -> None:
        super().__init__()
        hidden = c_out // 2
        self.cv1 = Conv(c_in, hidden, k, s, g=g, act=act)
        self.cv2 = Conv(hidden, hidden, 5, 1, g=hidden, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return torch.cat((y, self.cv2(y)), 1)


@layer()
class GhostBottleneck(nn.Module):
    """Bottleneck of two ghost convolutions, with a depth-wise convolution between them where it strides (GhostNet)."""

    def __init__(self, c_in: int, c_out: int, k: int = 3, s: int = 1) -> None:
        super().__init__()
        hidden = c_out // 2
        strides = s == 2
        self.conv = nn.Sequential(
            GhostConv(c_in, hidden, 1),
            DWConv(hidden, hidden, k, s, act=False) if strides else nn.Identity(),
            GhostConv(hidden, c_out, 1, act=False),
        )
        self.shortcut = (
            nn.Sequential(DWConv(c_in, c_in, k, s, act=False), Conv(c_in, c_out, 1, act=False))
            if strides
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


@layer(out_channels=lambda c_in, gain=2: c_in * gain * gain)
class Contract(nn.Module):
    """Space to channels in row-major blocks, (B, C, H, W) -> (B, g*g*C, H/g, W/g)."""

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        g = self.gain
        blocks = x.reshape(b, c, h // g, g, w // g, g).permute(0, 3, 5, 1, 2, 4)
        return blocks.reshape(b, c * g * g, h // g, w // g)


@layer(out_channels=lambda c_in, gain=2: c_in // (gain * gain))
class Expand(nn.Module):
    """Channels to space, the inverse of `Contract`."""

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        g = self.gain
        blocks = x.reshape(b, g, g, c // (g * g), h, w).permute(0, 3, 4, 1, 5, 2)
        return blocks.reshape(b, c // (g * g), h * g, w * g)


@layer(out_channels=lambda c_in, dim=1: sum(c_in), many=True)
class Concat(nn.Module):
    """Concatenation of several maps, along channels by default."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.d = dim

    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.cat(maps, self.d)
