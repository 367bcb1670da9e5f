"""Space-to-depth and the SPD-Conv building block (Sunkara and Luo 2022, section 3).

SPD halves the resolution and keeps every value; a convolution of stride 1 behind it takes the place of a strided one.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from models.blocks import Conv, Size
from models.registry import LayerSpec, layer, register
from models.space import Scale, depth_to_space, scale_pair, space_to_depth
from models.strides import replace_strides

__all__ = ["SPD", "Focus", "SPDConv", "depth_to_space", "replace_strides", "scale_pair", "space_to_depth"]


def _spd_channels(c_in: int, scale: Scale = 2) -> int:
    return c_in * math.prod(scale_pair(scale))


@layer(out_channels=_spd_channels)
class SPD(nn.Module):
    """Space-to-depth, (B, C, H, W) -> (B, 4C, H/2, W/2): halves the resolution and keeps every value (section 3.1)."""

    def __init__(self, scale: Scale = 2) -> None:
        super().__init__()
        scale_pair(scale)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return space_to_depth(x, self.scale)

    def inverse(self, x: Tensor) -> Tensor:
        """The map of which `x` is the SPD."""
        return depth_to_space(x, self.scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def _authors_spd(dimension: int = 1) -> SPD:
    """SPD as the authors' YAML files call it; their argument has no effect."""
    return SPD(2)


register(LayerSpec("space_to_depth", _authors_spd, out_channels=lambda c_in, dimension=1: 4 * c_in))


@layer()
class SPDConv(nn.Module):
    """The building block of section 3: SPD, then a convolution of stride 1 from scale^2 * c_in to c_out channels."""

    spds = (("spd", "conv.conv"),)

    def __init__(
        self,
        c_in: int,
        c_out: int,
        k: Size = 3,
        s: Size = 1,
        p: Size | None = None,
        g: int = 1,
        act: bool | nn.Module = True,
        scale: Scale = 2,
    ) -> None:
        super().__init__()
        self.spd = SPD(scale)
        self.conv = Conv(_spd_channels(c_in, scale), c_out, k, s, p, g, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.spd(x))


@layer()
class Focus(SPDConv):
    """YOLOv5's stem before release 6.0: an SPD-Conv block, by default with a 1x1 convolution."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        k: Size = 1,
        s: Size = 1,
        p: Size | None = None,
        g: int = 1,
        act: bool | nn.Module = True,
    ) -> None:
        super().__init__(c_in, c_out, k, s, p, g, act)
