"""3x3 convolutions with a quarter of the multiplications: Winograd's minimal filtering F(4x4, 3x3).

From Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (2016). The image is cut into tiles of 6x6 that
overlap by two; input tiles and kernels are transformed, multiplied point by point (over all channels that is 36 matrix
products) and transformed back to tiles of 4x4. The rounding errors in float32 are some three times those of a direct
convolution, 1e-5 where values are about 1; 16 bits would be too coarse.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

STEP, TILE = 4, 6
CHANNELS = 128  # with fewer on either side the transforms cost more than the products save
TILES = 256  # transformed at a time: 14 MB of memory for 128 channels in and 256 out

KERNEL = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # over 24
INPUT = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
INPUT += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
ONES = TILE + 1  # a value at this point of a transformed tile becomes that value everywhere in the tile of the output


def _squared(matrix: list[list[int]]) -> Tensor:
    """The transform of rows and columns at once, for flattened tiles, in float64."""
    one = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(one, one)


class WinogradConv2d(nn.Module):
    """The same function as a 3x3 convolution of stride 1 and padding 1, for inference."""

    kernel: Tensor  # (36, C, out)
    input: Tensor  # (36, 36)
    output: Tensor  # (16, 36)

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        out, channels = conv.weight.shape[:2]
        kernel = _squared(KERNEL) / 24**2 @ conv.weight.detach().double().permute(2, 3, 1, 0).reshape(9, -1)
        buffers = {"kernel": kernel.view(TILE**2, channels, out), "input": _squared(INPUT), "output": _squared(OUTPUT)}
        for name, value in buffers.items():
            self.register_buffer(name, value.to(conv.weight), persistent=False)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out, H, W) in channels-last memory."""
        height, width = x.shape[2:]
        rows, columns = -(-height // STEP), -(-width // STEP)
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
        transformed = (self.input @ tiles.reshape(TILE**2, -1)).view(TILE**2, -1, channels)
        products = torch.bmm(transformed, self.kernel)
        if self.bias is not None:
            products[ONES] += self.bias
        y = self.output @ products.flatten(1)
        return y.view(STEP, STEP, rows, columns, -1).permute(2, 0, 3, 1, 4)


def use_winograd(network: nn.Module) -> None:
    """Replace, in place, every convolution that is faster so on a CPU."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d) and _gains(module):
            network.set_submodule(name, WinogradConv2d(module))


def _gains(conv: nn.Conv2d) -> bool:
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    fits = geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    return fits and min(conv.in_channels, conv.out_channels) >= CHANNELS
