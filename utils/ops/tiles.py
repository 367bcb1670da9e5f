"""Tiles of large images: the one function that cuts, and the one that merges what was found in the pieces."""

from collections.abc import Sequence

import numpy as np

from utils.core.errors import UserError

Box = tuple[int, int, int, int]

EDGE = 2.0  # pixels: a box this close to an inner tile edge counts as cut there
SAME_SIZE = 0.25  # ratio of areas above which two whole boxes can be the same object


def _starts(length: int, size: int, overlap: float) -> list[int]:
    """Where the tiles of one axis begin: evenly spread, none shorter than `size`, each pair overlapping enough."""
    if length <= size:
        return [0]
    step = max(int(size * (1 - overlap)), 1)
    count = -(-(length - size) // step) + 1
    return [round(k * (length - size) / (count - 1)) for k in range(count)]


def tile_boxes(hw: tuple[int, int], size: int, overlap: float, whole: bool = True) -> list[Box]:
    """Tiles xyxy of an image of height and width `hw`: squares of `size` (cut where the image is smaller) that overlap
    their neighbors by at least the share `overlap`, row by row; of several, with `whole`, the whole image last."""
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


def cut_by_tile(xyxy: np.ndarray, tile: Box, hw: tuple[int, int]) -> np.ndarray:
    """Which boxes [n, 4] (image pixels) touch an edge of `tile` that is not an edge of the image, bool [n]."""
    inner = np.array([tile[0] > 0, tile[1] > 0, tile[2] < hw[1], tile[3] < hw[0]])
    near = np.abs(xyxy - np.asarray(tile, np.float64)) <= EDGE
    return np.any(near & inner, axis=1)


def merge_tiles(
    rows: Sequence[np.ndarray],
    tiles: Sequence[Box],
    hw: tuple[int, int],
    *,
    threshold: float = 0.5,
    agnostic: bool = False,
) -> np.ndarray:
    """Join what was found tile by tile: rows [n, 6] (x1, y1, x2, y2, confidence, class, in image pixels) of each tile
    -> one table [m, 6], most confident first.

    Two detections of different tiles are one object where their intersection exceeds `threshold` of the smaller box
    and, if both are whole, their sizes are alike (a small object before a large one of its class stays). The whole one
    stays, then the more confident, then the larger: what touches an inner tile edge yields to the tile that sees it
    whole. Within a tile nothing is merged, NMS has been there.
    """
    assert len(rows) == len(tiles)
    tables = [np.asarray(r, np.float64).reshape(-1, 6) for r in rows]
    table = np.concatenate([np.zeros((0, 6)), *tables])
    origin = np.repeat(np.arange(len(rows)), [len(t) for t in tables])
    parts = [cut_by_tile(t[:, :4], tile, hw) for t, tile in zip(tables, tiles, strict=True)]
    cut = np.concatenate([np.zeros(0, bool), *parts])
    area = np.prod(np.maximum(table[:, 2:4] - table[:, :2], 0), axis=1)
    order = np.lexsort((-area, -table[:, 4], cut))
    table, origin, cut, area = table[order], origin[order], cut[order], area[order]
    label = np.zeros(len(table)) if agnostic else table[:, 5]
    kept = np.zeros(len(table), bool)
    for value in np.unique(label):
        members = np.flatnonzero(label == value)
        kept[members[_merge_class(table[members, :4], origin[members], cut[members], area[members], threshold)]] = True
    merged = table[kept]
    return merged[np.argsort(-merged[:, 4], kind="stable")].astype(np.float32)


def _merge_class(
    xyxy: np.ndarray, origin: np.ndarray, cut: np.ndarray, area: np.ndarray, threshold: float
) -> list[int]:
    """Numbers of the boxes that stay, of boxes of one class in order of preference."""
    kept: list[int] = []
    left = np.arange(len(xyxy))
    while len(left):
        best, left = int(left[0]), left[1:]
        kept.append(best)
        low = np.maximum(xyxy[left, :2], xyxy[best, :2])
        shared = np.prod(np.maximum(np.minimum(xyxy[left, 2:], xyxy[best, 2:]) - low, 0), axis=1)
        smaller, larger = np.minimum(area[left], area[best]), np.maximum(area[left], area[best])
        if not cut[best]:  # a piece yields to what shows most of the piece itself
            smaller = np.where(cut[left], area[left], smaller)
        same = shared > threshold * smaller
        same &= cut[left] | (smaller > SAME_SIZE * larger)
        left = left[~(same & (origin[left] != origin[best]))]
    return kept
