"""3x3 convolutions with a quarter of the multiplications: Winograd's minimal filtering F(4x4, 3x3).

From Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (2016). The image is cut into tiles of 6x6 that
overlap by two; input tiles and kernels are transformed, multiplied point by point (over all channels that is 36 matrix
products) and transformed back to tiles of 4x4.

The transforms evaluate polynomials at POINTS and at infinity. These, unlike the usual 0, 1, -1, 2, -2, keep rounding
errors low: in float32 twice those of a direct convolution, in bfloat16 three times on the maps of a trained network.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor, nn
from torch.nn import functional

STEP, TILE = 4, 6
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
CHANNELS = 128  # with fewer on either side the transforms cost more than the products save
MIN_TILES = 16  # of an image; with fewer the kernels, four times as large, cost more to read than the products save
TILES = 256  # transformed at a time: 14 MB of memory for 128 channels in and 256 out


def _matrices(points: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The transforms along one axis: kernel (6, 3), input (6, 6), output (4, 6).

    Toom-Cook, transposed: the product of the polynomials whose coefficients are kernel and output is evaluated at the
    points, multiplied there, and interpolated.
    """
    kernel, output, inputs = np.zeros((TILE, 3)), np.zeros((STEP, TILE)), np.zeros((TILE, TILE))
    for i, point in enumerate(points):
        others = [p for p in points if p != point]
        kernel[i] = point ** np.arange(3) / math.prod(point - p for p in others)
        output[:, i] = point ** np.arange(STEP)
        inputs[i, : TILE - 1] = Polynomial.fromroots(others).coef
    kernel[-1, -1] = output[-1, -1] = 1  # infinity: the highest coefficients alone
    inputs[-1] = Polynomial.fromroots(points).coef
    return kernel, inputs, output


KERNEL, INPUT, OUTPUT = _matrices(POINTS)


def transformed(weight: np.ndarray) -> np.ndarray:
    """A kernel (out, C, 3, 3) at the points: (36, C, out) in float64."""
    out, channels = weight.shape[:2]
    taps = weight.astype(np.float64).transpose(2, 3, 1, 0).reshape(9, -1)
    return (np.kron(KERNEL, KERNEL) @ taps).reshape(TILE**2, channels, out)


def _along_both(matrix: Tensor, tiles: Tensor) -> Tensor:
    """A transform (r, k) of the rows and columns of flattened tiles (k * k, n): (r * r, n).

    One axis after the other takes fewer multiplications; both at once round once, which matters in 16 bits.
    """
    r, k = matrix.shape
    if tiles.element_size() < 4:
        return torch.kron(matrix, matrix) @ tiles
    return torch.matmul(matrix, (matrix @ tiles.reshape(k, -1)).view(r, k, -1)).view(r * r, -1)


class WinogradConv2d(nn.Module):
    """The same function as a 3x3 convolution of stride 1 and padding 1, for inference.

    Images of fewer than MIN_TILES tiles go to the convolution itself.
    """

    kernel: Tensor  # (36, C, out)
    input: Tensor  # (6, 6)
    output: Tensor  # (4, 6)

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        kernel = transformed(conv.weight.detach().double().cpu().numpy())
        for name, value in (("kernel", kernel), ("input", INPUT), ("output", OUTPUT)):
            self.register_buffer(name, torch.from_numpy(value).to(conv.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out, H, W) in channels-last memory."""
        height, width = x.shape[2:]
        rows, columns = -(-height // STEP), -(-width // STEP)
        if rows * columns < MIN_TILES:
            return self.conv(x)
        padding = (1, STEP * columns + 1 - width, 1, STEP * rows + 1 - height)
        padded = functional.pad(x, padding).permute(0, 2, 3, 1)
        tiles = padded.unfold(1, TILE, STEP).unfold(2, TILE, STEP).permute(0, 4, 5, 1, 2, 3)
        y = x.new_empty(len(x), rows, STEP, columns, STEP, self.kernel.shape[2])
        step = max(1, TILES // columns)
        for image, result in zip(tiles, y, strict=True):
            for first in range(0, rows, step):
                result[first : first + step] = self._convolve(image[:, :, first : first + step])
        return y.flatten(3, 4).flatten(1, 2)[:, :height, :width].permute(0, 3, 1, 2)

    def _convolve(self, tiles: Tensor) -> Tensor:
        """(6, 6, rows, columns, C) to (rows, 4, columns, 4, out)."""
        rows, columns, channels = tiles.shape[2:]
        at_points = _along_both(self.input, tiles.reshape(TILE**2, -1)).view(TILE**2, -1, channels)
        y = _along_both(self.output, torch.bmm(at_points, self.kernel).flatten(1))
        y = y.view(STEP, STEP, rows, columns, -1)
        if self.conv.bias is not None:
            y += self.conv.bias
        return y.permute(2, 0, 3, 1, 4)


def use_winograd(network: nn.Module) -> None:
    """Replace, in place, every convolution that is faster so on a CPU."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d) and _gains(module):
            network.set_submodule(name, WinogradConv2d(module))


def _gains(conv: nn.Conv2d) -> bool:
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    fits = geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    return fits and min(conv.in_channels, conv.out_channels) >= CHANNELS
