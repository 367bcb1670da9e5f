"""Layers that stand in for strided ones: SPD beside a convolution of stride 1, for any input size.

They pad with zeros and crop, so that their output has the size of the layer replaced. `models.strides` puts them into
networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.space import space_to_depth

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Where a strided layer looks: kernel, stride, padding, dilation (vertical, horizontal), and ceil_mode."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil: bool = False

    def out_size(self, n: int, axis: int) -> int:
        """Outputs along an axis of `n` inputs, by torch's rule."""
        k, s, p, d = self.kernel[axis], self.stride[axis], self.padding[axis], self.dilation[axis]
        free = n + 2 * p - d * (k - 1) - 1
        out = (free + (s - 1 if self.ceil else 0)) // s + 1
        return out - 1 if self.ceil and (out - 1) * s >= n + p else out

    def taps(self, axis: int) -> list[tuple[int, int]]:
        """(cell, rest) of each kernel position: it reads input `stride * (output + cell) + rest`."""
        k, s, p, d = self.kernel[axis], self.stride[axis], self.padding[axis], self.dilation[axis]
        return [divmod(t * d - p, s) for t in range(k)]

    def cells(self, axis: int, odd: bool = False) -> tuple[int, int]:
        """(first cell, number of cells) that the kernel covers; `odd` widens to an odd number around cell 0."""
        cells = [cell for cell, _ in self.taps(axis)]
        low, high = min(cells), max(cells)
        if odd:
            low, high = -max(-low, high), max(-low, high)
        return low, high - low + 1


def lift_kernel(weight: Tensor, window: Window, odd: bool = False) -> Tensor:
    """The kernel over SPD blocks that computes what strided `weight` [O, I, kh, kw] computes: [O, sh*sw*I, Kh, Kw].

    A kernel position that reads input s*(i + q) + r becomes tap q of block r. Channels are ordered as in
    `space_to_depth`. With `odd` the kernel has an odd size around cell 0, so that padding K // 2 places it.
    """
    (top, kh), (left, kw) = window.cells(0, odd), window.cells(1, odd)
    (sh, sw), (o, i) = window.stride, weight.shape[:2]
    lifted = weight.new_zeros(o, sw, sh, i, kh, kw)
    for y, (cell_y, rest_y) in enumerate(window.taps(0)):
        for x, (cell_x, rest_x) in enumerate(window.taps(1)):
            lifted[:, rest_x, rest_y, :, cell_y - top, cell_x - left] = weight[:, :, y, x]
    return lifted.flatten(1, 3)


def fit(x: Tensor, before: Pair, size: Pair, value: float = 0.0) -> Tensor:
    """Pad `before` = (top, left), then pad or crop at the other end to `size`."""
    top, left = before
    bottom, right = size[0] - top - x.shape[-2], size[1] - left - x.shape[-1]
    return F.pad(x, (left, right, top, bottom), value=value)


def _spd(x: Tensor, scale: Pair) -> Tensor:
    """`space_to_depth` of a map whose sides `scale` divides, for torch.export as slices: of open sides a reshape would
    demand that they be multiples, where here the padding sees to it."""
    if not torch.compiler.is_exporting():
        return space_to_depth(x, scale)
    rows, columns = scale
    return torch.cat([x[:, :, row::rows, column::columns] for column in range(columns) for row in range(rows)], 1)


def grouped_spd(x: Tensor, scale: Pair, groups: int) -> Tensor:
    """SPD in each of `groups` channel groups, so that a grouped convolution finds all blocks of a group together."""
    if x.ndim == 3:  # torch's layers take one image without a batch, too
        return grouped_spd(x[None], scale, groups)[0]
    if groups == 1:
        return _spd(x, scale)
    b, c, h, w = x.shape
    blocks = _spd(x.reshape(b * groups, c // groups, h, w), scale)
    return blocks.reshape(b, c * scale[0] * scale[1], *blocks.shape[-2:])


class BlockConv(nn.Module):
    """SPD, then a convolution of stride 1 over the blocks: "spd-conv", in the place of a strided convolution.

    With `odd` the kernel is widened to an odd size. `pad_mode` is that of the layer replaced; modes other than zeros
    pad before SPD.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        window: Window,
        groups: int = 1,
        bias: bool = True,
        odd: bool = False,
        pad_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self.outer = None if pad_mode == "zeros" else window.padding
        self.window = window if self.outer is None else replace(window, padding=(0, 0))
        self.groups, self.pad_mode = groups, pad_mode
        (top, kh), (left, kw) = self.window.cells(0, odd), self.window.cells(1, odd)
        self.first = (top, left)
        self.conv = nn.Conv2d(c_in * math.prod(window.stride), c_out, (kh, kw), groups=groups, bias=bias)

    def blocks(self, x: Tensor) -> Tensor:
        """The SPD blocks of `x`, padded or cropped to what the kernel needs."""
        (sh, sw), (kh, kw) = self.window.stride, self.conv.kernel_size
        if self.outer is not None:
            x = F.pad(x, (self.outer[1], self.outer[1], self.outer[0], self.outer[0]), mode=self.pad_mode)
        cells = (self.window.out_size(x.shape[-2], 0) + kh - 1, self.window.out_size(x.shape[-1], 1) + kw - 1)
        x = fit(x, (-self.first[0] * sh, -self.first[1] * sw), (cells[0] * sh, cells[1] * sw))
        return grouped_spd(x, (sh, sw), self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.blocks(x))


class BlockMean(BlockConv):
    """`BlockConv` in the place of average pooling whose divisor shrinks at the borders."""

    def __init__(self, channels: int, window: Window, count_padding: bool) -> None:
        super().__init__(channels, channels, window, bias=False)
        self.count_padding = count_padding

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self._gain(x.shape[axis - 2], axis, x) for axis in (0, 1))
        return self.conv(self.blocks(x)) * (rows[:, None] * columns)

    def _gain(self, n: int, axis: int, like: Tensor) -> Tensor:
        """Kernel size over the number of inputs that each output averages, along one axis."""
        k, s, p = self.window.kernel[axis], self.window.stride[axis], self.window.padding[axis]
        start = torch.arange(self.window.out_size(n, axis), device=like.device) * s - p
        end = (start + k).clamp(max=n + p)
        if not self.count_padding:
            start, end = start.clamp(min=0), end.clamp(max=n)
        return k / (end - start).to(like.dtype)


class Squeezed(nn.Module):
    """A layer at stride 1, SPD, then a 1x1 convolution over the blocks: "conv-spd"."""

    def __init__(self, layer: nn.Module, channels: int, window: Window, groups: int = 1) -> None:
        super().__init__()
        self.layer, self.window, self.groups = layer, window, groups
        self.squeeze = nn.Conv2d(channels * math.prod(window.stride), channels, 1, groups=groups, bias=False)

    def start_on_first_block(self) -> None:
        """Let the 1x1 convolution take block (0, 0) as it is and nothing of the others."""
        own = self.squeeze.out_channels // self.groups
        with torch.no_grad():
            self.squeeze.weight.zero_()
            eye = torch.eye(own, dtype=self.squeeze.weight.dtype, device=self.squeeze.weight.device)
            self.squeeze.weight[:, :own, 0, 0] = eye.repeat(self.groups, 1)

    def forward(self, x: Tensor) -> Tensor:
        (sh, sw), window = self.window.stride, self.window
        size = (window.out_size(x.shape[-2], 0) * sh, window.out_size(x.shape[-1], 1) * sw)
        return self.squeeze(grouped_spd(fit(self.layer(x), (0, 0), size), (sh, sw), self.groups))


class DenseMax(nn.Module):
    """Max pooling at stride 1, over every window that its strided form can reach (ceil_mode included)."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        window, size = self.window, []
        for axis in (0, 1):
            outputs = window.stride[axis] * (window.out_size(x.shape[axis - 2], axis) - 1) + 1
            size.append(outputs + window.dilation[axis] * (window.kernel[axis] - 1))
        lowest = torch.finfo(x.dtype).min  # not -inf, of which the zeros of the 1x1 convolution would make NaN
        x = fit(x, window.padding, (size[0], size[1]), lowest)
        return F.max_pool2d(x, window.kernel, 1, dilation=window.dilation)
