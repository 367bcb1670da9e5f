"""Space-to-depth as pure functions of tensors, in the channel order of SPD-Conv's authors."""

from __future__ import annotations

import torch
from torch import Tensor

Scale = int | tuple[int, int]  # both directions alike, or (vertical, horizontal)


def scale_pair(scale: Scale) -> tuple[int, int]:
    """A scale as (vertical, horizontal); at least one direction must shrink."""
    rows, columns = (scale, scale) if isinstance(scale, int) else tuple(scale)
    if min(rows, columns) < 1 or max(rows, columns) < 2:
        raise ValueError(f"SPD scale is {scale!r}; expected an integer of at least 2, or two of which one is")
    return rows, columns


def space_to_depth(x: Tensor, scale: Scale = 2) -> Tensor:
    """(B, C, H, W) -> (B, scale^2 * C, H/scale, W/scale), blocks in the authors' order (r0,c0), (r1,c0), (r0,c1), ...

    Block number col * rows + row holds x[:, :, row::rows, col::columns]. A channels_last map stays channels_last, its
    gradient too, so that no convolution around it has to convert.
    """
    rows, columns = scale_pair(scale)
    b, c, h, w = x.shape
    if h % rows or w % columns:
        raise ValueError(
            f"SPD got a map of {h}x{w}, which scale {rows}x{columns} does not divide; use an image size that is a"
            " multiple of the model's largest stride"
        )
    shape = (b, rows * columns * c, h // rows, w // columns)
    if is_channels_last(x):
        pixels = x.permute(0, 2, 3, 1).reshape(b, shape[2], rows, shape[3], columns, c)
        return pixels.permute(0, 1, 3, 4, 2, 5).reshape(b, shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
    cells = x.reshape(b, c, shape[2], rows, shape[3], columns)
    return cells.permute(0, 5, 3, 1, 2, 4).reshape(shape)


def is_channels_last(x: Tensor) -> bool:
    """Whether the values of one pixel lie side by side in memory (and more than one value and pixel exist)."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def depth_to_space(x: Tensor, scale: Scale = 2) -> Tensor:
    """The exact inverse of `space_to_depth`, (B, scale^2 * C, H, W) -> (B, C, H*scale, W*scale)."""
    rows, columns = scale_pair(scale)
    b, c, h, w = x.shape
    if c % (rows * columns):
        raise ValueError(f"depth_to_space got {c} channels, which scale {rows}x{columns} does not divide")
    cells = x.reshape(b, columns, rows, c // (rows * columns), h, w)
    return cells.permute(0, 3, 4, 2, 5, 1).reshape(b, c // (rows * columns), h * rows, w * columns)
