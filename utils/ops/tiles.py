"""Tiles of large images: the one function that cuts, and the one that merges what was found in the pieces."""

from collections.abc import Sequence

import numpy as np

from utils.core.errors import UserError
from utils.ops.boxes import intersections

Box = tuple[int, int, int, int]


def _starts(length: int, size: int, overlap: float) -> list[int]:
    """Where the tiles of one axis begin: evenly spread, none shorter than `size`, each pair overlapping enough."""
    if length <= size:
        return [0]
    step = max(int(size * (1 - overlap)), 1)
    count = -(-(length - size) // step) + 1
    return [round(k * (length - size) / (count - 1)) for k in range(count)]


def tile_boxes(hw: tuple[int, int], size: int, overlap: float, whole: bool = True) -> list[Box]:
    """Tiles xyxy of an image of height and width `hw`: squares of `size` (cut where the image is smaller) that overlap
    their neighbors by at least the share `overlap`, row by row; with `whole` and more than one, the whole image last."""
    if size < 1 or not 0 <= overlap < 1:
        raise UserError(
            f"slices of {size} pixels with overlap {overlap}; expected at least 1 pixel and an overlap of 0 to below 1"
        )
    h, w = int(hw[0]), int(hw[1])
    tiles = [
        (x, y, min(x + size, w), min(y + size, h)) for y in _starts(h, size, overlap) for x in _starts(w, size, overlap)
    ]
    if whole and len(tiles) > 1:
        tiles.append((0, 0, w, h))
    return tiles
