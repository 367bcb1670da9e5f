"""Tiles: cutting covers everything, merging gives each object back once and whole."""

import numpy as np
import pytest

from utils.core.errors import UserError
from utils.ops.boxes import box_ioa
from utils.ops.tiles import cut_by_tile, merge_tiles, tile_boxes


@pytest.mark.parametrize("hw", [(3000, 4000), (641, 640), (640, 1281), (700, 5000), (1000, 1000)])
@pytest.mark.parametrize("size, overlap", [(640, 0.2), (640, 0.0), (512, 0.5), (300, 0.33)])
def test_tiles_cover_the_image_and_overlap_enough(hw, size, overlap):
    tiles = tile_boxes(hw, size, overlap, whole=False)
    covered = np.zeros(hw, bool)
    for x1, y1, x2, y2 in tiles:
        assert 0 <= x1 < x2 <= hw[1] and 0 <= y1 < y2 <= hw[0]
        assert x2 - x1 == min(size, hw[1]) and y2 - y1 == min(size, hw[0])
        covered[y1:y2, x1:x2] = True
    assert covered.all()
    for axis in (0, 1):
        starts = sorted({t[axis] for t in tiles})
        steps = np.diff(starts)
        assert (size - steps >= int(size * overlap)).all()
        assert len(steps) < 2 or steps.max() - steps.min() <= 1  # evenly spread
    assert len(set(tiles)) == len(tiles)
    assert tile_boxes(hw, size, overlap)[-1] == (0, 0, hw[1], hw[0])


def test_a_small_image_is_one_tile():
    assert tile_boxes((480, 640), 640, 0.2) == [(0, 0, 640, 480)]
    assert tile_boxes((1, 1), 640, 0.2, whole=False) == [(0, 0, 1, 1)]


@pytest.mark.parametrize("size, overlap", [(0, 0.2), (640, 1.0), (640, -0.1)])
def test_impossible_tiles_are_refused(size, overlap):
    with pytest.raises(UserError, match="slices of"):
        tile_boxes((100, 100), size, overlap)


def oracle(truth, tiles, visible=0.1):
    """What a perfect predictor finds in each tile: the truth [n, 6], cut there."""
    rows = []
    for tile in tiles:
        cut = truth.copy()
        cut[:, :4] = np.clip(truth[:, :4], np.tile(tile[:2], 2), np.tile(tile[2:], 2))
        seen = np.prod(cut[:, 2:4] - cut[:, :2], axis=1)
        rows.append(cut[seen > visible * np.prod(truth[:, 2:4] - truth[:, :2], axis=1)])
    return rows


def scattered(rng, hw, count, largest, classes=2):
    """Objects of which none covers much of another, every one its own confidence."""
    kept = np.zeros((0, 4))
    while len(kept) < count:
        size = rng.uniform(4, largest, 2)
        low = rng.random(2) * (np.array(hw[::-1]) - size)
        box = np.concatenate([low, low + size])[None]
        if not len(kept) or (max(box_ioa(kept, box).max(), box_ioa(box, kept).max()) < 0.3):
            kept = np.concatenate([kept, box])
    labels = rng.integers(0, classes, count)
    return np.column_stack([kept, rng.permutation(np.linspace(0.3, 0.9, count)), labels]).astype(np.float32)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_object_comes_back_once_and_uncut(seed, whole):
    """Objects up to the overlap's size; with the whole image as a further tile, of any size."""
    rng, hw, size, overlap = np.random.default_rng(seed), (900, 1300), 320, 0.25
    large = whole and seed % 2
    truth = scattered(rng, hw, 30, 400) if large else scattered(rng, hw, 120, 0.25 * size)
    tiles = tile_boxes(hw, size, overlap, whole=whole)
    rows = oracle(truth, tiles)
    assert sum(map(len, rows)) > 1.2 * len(truth)
    merged = merge_tiles(rows, tiles, hw)
    expected = truth[np.argsort(-truth[:, 4], kind="stable")]
    assert merged.shape == expected.shape and np.allclose(merged, expected, atol=1e-3)


def test_pieces_yield_to_the_tile_that_sees_the_whole():
    tiles = [(0, 0, 100, 100), (80, 0, 180, 100)]
    piece, full = [70, 20, 100, 40, 0.95, 0], [71, 20, 115, 40, 0.4, 0]
    hw = (100, 180)
    assert cut_by_tile(np.array([piece[:4], full[:4]], float), tiles[0], hw).tolist() == [True, False]
    right = [[*full[:4], 0.4, 0]]
    merged = merge_tiles([np.array([piece]), np.array(right)], [tiles[0], (60, 0, 160, 100)], hw)
    assert merged.tolist() == [pytest.approx(full)]


def test_the_border_of_the_image_cuts_nothing():
    assert not cut_by_tile(np.array([[0.0, 0, 100, 100]]), (0, 0, 100, 100), (100, 100)).any()


def test_a_small_object_before_a_large_one_of_its_class_stays():
    """Both seen whole, but in different tiles."""
    tiles = [(0, 0, 100, 100), (0, 0, 200, 200)]
    rows = [np.array([[40, 40, 50, 50, 0.5, 0]]), np.array([[10, 10, 150, 150, 0.9, 0]])]
    assert len(merge_tiles(rows, tiles, (200, 200))) == 2


def test_classes_are_merged_apart_unless_agnostic():
    tiles = [(0, 0, 100, 100), (0, 0, 200, 200)]
    rows = [np.array([[40, 40, 60, 60, 0.5, 0]]), np.array([[40, 40, 61, 61, 0.9, 1]])]
    assert len(merge_tiles(rows, tiles, (200, 200))) == 2
    assert merge_tiles(rows, tiles, (200, 200), agnostic=True)[:, 5].tolist() == [1]


def test_nothing_is_merged_within_a_tile_and_order_does_not_matter():
    rows = [np.array([[10, 10, 50, 50, 0.5, 0], [12, 12, 52, 52, 0.6, 0]]), np.zeros((0, 6))]
    tiles = [(0, 0, 100, 100), (80, 0, 180, 100)]
    merged = merge_tiles(rows, tiles, (100, 180))
    assert merged.dtype == np.float32 and np.allclose(merged[:, 4], [0.6, 0.5])
    assert np.allclose(merged, merge_tiles(rows[::-1], tiles[::-1], (100, 180)))
    assert merge_tiles([], [], (5, 5)).shape == (0, 6)
    assert merge_tiles([np.zeros((0, 6))], [(0, 0, 5, 5)], (5, 5)).shape == (0, 6)
