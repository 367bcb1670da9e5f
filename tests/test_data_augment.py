"""Draws, color, mirroring, mixing, and what happens to boxes and polygons."""

import cv2
import numpy as np
import pytest

from utils.core.hyp import Hyp
from utils.data.augment import Flip, Hsv, Warp, finish, generator
from utils.data.mixing import MIN_REST, CopyPaste, Cutmix, Mixup
from utils.data.objects import Objects, survivors
from utils.ops.polygons import clip_polygons, polygon_extents


def objects_of(xyxy, polygons=None):
    """Objects of classes 0, 1, ... with boxes and, where a list of [p, 2] is given, polygons."""
    xyxy = np.asarray(xyxy, np.float64).reshape(-1, 4)
    polygons = polygons or [np.zeros((0, 2))] * len(xyxy)
    points = np.concatenate([np.zeros((0, 2)), *polygons])
    return Objects(np.arange(len(xyxy), dtype=np.float32), xyxy, points, np.array([len(p) for p in polygons], np.int64))


# ---------------------------------------------------------------------------------------------------- draws


def test_the_generator_depends_on_its_place_alone():
    first = generator(3, 1, 7, 11).random(4)
    assert (generator(3, 1, 7, 11).random(4) == first).all()
    others = [generator(*p).random(4) for p in ((4, 1, 7, 11), (3, 0, 7, 11), (3, 1, 8, 11), (3, 1, 7, 12))]
    assert not any((o == first).any() for o in others)


def test_draws_cover_the_hyper_parameters_range_evenly():
    rng, hyp = np.random.default_rng(0), Hyp(degrees=10, shear=4, perspective=0.001)
    warps = [Warp.draw(rng, hyp) for _ in range(1500)]
    for name, low, high in (
        ("scale", 0.5, 1.5),
        ("translate_x", -0.1, 0.1),
        ("angle", -10, 10),
        ("shear_y", -4, 4),
        ("perspective_x", -0.001, 0.001),
    ):
        values = np.array([getattr(w, name) for w in warps])
        assert low <= values.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.03 * (high - low)
    flips = [Flip.draw(rng, hyp.replace(flipud=0.1)) for _ in range(1500)]
    assert abs(np.mean([f.lr for f in flips]) - 0.5) < 0.05 and abs(np.mean([f.ud for f in flips]) - 0.1) < 0.03
    gains = np.array([[h.hue, h.saturation, h.value] for h in (Hsv.draw(rng, hyp) for _ in range(1500))])
    assert np.allclose(gains.max(0), [1.015, 1.7, 1.4], atol=0.01) and np.allclose(gains.mean(0), 1, atol=0.04)


def test_without_augmentation_nothing_is_changed():
    rng, still = np.random.default_rng(0), Hyp(hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0)
    assert Warp.draw(rng, still) == Warp() and Hsv.draw(rng, still).neutral and Flip.draw(rng, still) == Flip()
    assert np.allclose(Warp().matrix((50, 70), (50, 70)), np.eye(3))


def test_the_warp_turns_around_the_center():
    matrix = Warp(angle=90, scale=2).matrix((100, 100), (50, 50))
    center, right = matrix @ (50, 50, 1), matrix @ (60, 50, 1)
    assert np.allclose(center, (25, 25, 1))
    assert np.allclose(right, (25, 5, 1))  # counter-clockwise, as in cv2.getRotationMatrix2D, twice as far
    moved = Warp(translate_x=0.1, translate_y=-0.2).matrix((100, 100), (50, 50)) @ (50, 50, 1)
    assert np.allclose(moved, (30, 15, 1))


def test_a_meeting_point_lands_on_a_whole_pixel():
    rng, hyp = np.random.default_rng(1), Hyp(degrees=20, shear=5, perspective=0.0005)
    for _ in range(50):
        warp, point = Warp.draw(rng, hyp), tuple(rng.random(2) * 128)
        met = warp.meeting(point, (128, 128), (64, 64))
        before, after = (w.matrix((128, 128), (64, 64)) @ (*point, 1) for w in (warp, met))
        before, after = before[:2] / before[2], after[:2] / after[2]
        assert np.allclose(after, np.rint(after), atol=1e-9) and np.abs(after - before).max() <= 0.5 + 1e-9


# ---------------------------------------------------------------------------------------------------- pixels


def slow_hsv(image, gains):
    """Hue, saturation and value in floating point, from their definitions."""
    rgb = image.astype(np.float64)
    hsv = cv2.cvtColor((rgb / 255).astype(np.float32), cv2.COLOR_RGB2HSV).astype(np.float64)
    hsv[..., 0] = hsv[..., 0] * gains.hue % 360
    hsv[..., 1:] = np.minimum(hsv[..., 1:] * (gains.saturation, gains.value), 1)
    return cv2.cvtColor(hsv.astype(np.float32), cv2.COLOR_HSV2RGB) * 255


@pytest.mark.parametrize("gains", [Hsv(1.015, 1.7, 1.4), Hsv(0.985, 0.3, 0.6), Hsv(1.5, 1.0, 0.9), Hsv(1, 1, 0.5)])
def test_color_is_that_of_the_definition(gains):
    image = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8), (200, 130))
    out = np.empty_like(image)
    finish(image, gains, Flip(), out)
    apart = np.abs(out - slow_hsv(image, gains))
    assert apart.mean() < 2.5 and np.quantile(apart, 0.99) < 10  # 8-bit hue has steps of two degrees


def test_the_fast_color_path_equals_the_tables():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    for gains in (Hsv(1.015, 1.7, 1.4), Hsv(1.4, 1.2, 1.1), Hsv(0.9, 0.2, 0.3)):
        by_table = cv2.merge([cv2.LUT(p, t) for p, t in zip(cv2.split(hsv), gains.tables(), strict=True)])
        pair = [cv2.cvtColor(h, cv2.COLOR_HSV2RGB).astype(int) for h in (gains.recolor(hsv), by_table)]
        assert (np.abs(pair[0] - pair[1]) > 1).mean() < 0.01  # products that end in .5 may be rounded either way


@pytest.mark.parametrize("lr", [False, True])
@pytest.mark.parametrize("ud", [False, True])
def test_mirroring_moves_pixels_and_objects_alike(lr, ud):
    image = np.zeros((70, 90, 3), np.uint8)
    image[10:20, 5:35] = 255
    out = np.empty_like(image)
    finish(image, Hsv(), Flip(lr, ud), out)
    triangle = np.array([[5.0, 10], [35, 10], [35, 20]])
    mirrored = objects_of([[5, 10, 35, 20]], [triangle]).flipped((70, 90), lr, ud)
    x1, y1, x2, y2 = mirrored.xyxy[0].astype(int)
    assert (out[y1:y2, x1:x2] == 255).all() and (out == 255).sum() == (image == 255).sum()
    assert np.allclose(polygon_extents(mirrored.points, mirrored.counts), mirrored.xyxy)
    expected = image[::-1] if ud else image
    assert (out == (expected[:, ::-1] if lr else expected)).all()


# ---------------------------------------------------------------------------------------------------- objects


def mask_extents(polygon, region, size=400, fine=8):
    """Extents of a polygon within a region by counting pixels, an independent way."""
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, [np.rint(np.asarray(polygon) * fine).astype(np.int32)], 1)
    x1, y1, x2, y2 = (int(v * fine) for v in region)
    inside = np.zeros_like(mask)
    inside[y1:y2, x1:x2] = mask[y1:y2, x1:x2]
    ys, xs = np.nonzero(inside)
    return None if not len(xs) else np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / fine


def test_clipped_polygons_have_the_extents_of_their_pixels():
    rng = np.random.default_rng(4)
    polygons, regions = [], []
    for _ in range(60):
        turn = np.sort(rng.random(rng.integers(3, 12))) * 2 * np.pi
        reach = rng.uniform(2, 20, (len(turn), 1))  # star-shaped, often concave
        polygons.append(rng.uniform(15, 30, 2) + np.stack([np.cos(turn), np.sin(turn)], 1) * reach)
        polygons[-1] = polygons[-1].clip(0, 49)
        low = rng.integers(0, 25, 2)
        regions.append([*low, *(low + rng.integers(4, 24, 2))])
    counts = np.array([len(p) for p in polygons])
    points, left = clip_polygons(np.concatenate(polygons), counts, np.array(regions, np.float64))
    boxes = polygon_extents(points, left)
    for box, polygon, region, count in zip(boxes, polygons, regions, left, strict=True):
        expected = mask_extents(polygon, region)
        if expected is None:
            assert count == 0 or np.prod(box[2:] - box[:2]) < 0.5
        elif np.prod(expected[2:] - expected[:2]) > 1:
            assert np.abs(box - expected).max() < 0.5


def test_clipping_no_polygons_and_empty_ones():
    points, counts = clip_polygons(np.zeros((0, 2)), np.zeros(0, np.int64), np.zeros((0, 4)))
    assert points.shape == (0, 2) and counts.shape == (0,)
    square = np.array([[0.0, 0], [4, 0], [4, 4], [0, 4]])
    points, counts = clip_polygons(square, np.array([0, 4, 0]), np.tile([[1.0, 1, 9, 9]], (3, 1)))
    assert counts[0] == counts[2] == 0 and (polygon_extents(points, counts)[1] == [1, 1, 4, 4]).all()


def test_a_cut_polygon_gives_a_tighter_box_than_a_cut_box():
    """A triangle whose slim end is cut off: the box shrinks in both directions."""
    triangle = np.array([[0.0, 50], [100, 0], [100, 100]])
    objects = objects_of([[0, 0, 100, 100]] * 2, [triangle, np.zeros((0, 2))])
    seen = objects.cut(np.array([[0.0, 0, 20, 100]] * 2))
    assert np.allclose(seen.xyxy, [[0, 40, 20, 60], [0, 0, 20, 100]])
    assert seen.counts[1] == 0 and np.allclose(polygon_extents(seen.points, seen.counts)[0], seen.xyxy[0])


def test_polygons_keep_boxes_tight_when_turned():
    """A circle turned by 45 degrees keeps its extents; its box would grow by the square root of two."""
    turn = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    circle = 50 + 20 * np.stack([np.cos(turn), np.sin(turn)], 1)
    objects = objects_of([[30, 30, 70, 70]] * 2, [circle, np.zeros((0, 2))])
    turned = objects.warped(Warp(angle=45).matrix((100, 100), (100, 100)))
    assert np.allclose(turned.xyxy[0], [30, 30, 70, 70], atol=0.01)
    assert np.allclose(turned.xyxy[1], np.array([50, 50, 50, 50]) + np.sqrt(2) * 20 * np.array([-1, -1, 1, 1]))


def test_mixed_objects_keep_their_own_polygons_through_a_cut():
    square = np.array([[10.0, 10], [20, 10], [20, 20], [10, 20]])
    objects = objects_of(
        [[10, 10, 20, 20], [0, 0, 5, 5], [12, 12, 22, 22]], [square, np.zeros((0, 2)), square + 2]
    ).cut(np.tile([[0.0, 0, 15, 40]], (3, 1)))
    assert np.allclose(objects.xyxy, [[10, 10, 15, 20], [0, 0, 5, 5], [12, 12, 15, 22]])
    assert objects.counts[1] == 0
    assert np.allclose(polygon_extents(objects.points, objects.counts)[[0, 2]], objects.xyxy[[0, 2]])
    kept = objects.take(np.array([False, True, True]))
    assert np.allclose(polygon_extents(kept.points, kept.counts)[1], objects.xyxy[2])


def test_the_survival_filter_is_that_of_the_hyper_parameters():
    seen = objects_of([[0, 0, 2, 9], [0, 0, 3, 3], [0, 0, 90, 3], [0, 0, 30, 10], [0, 0, 0, 0]])
    full = np.array([18.0, 9, 270, 6000, 50])
    none, all_known = np.zeros(5, bool), np.ones(5, bool)
    assert survivors(seen, full, none, 2, 0.1, 20).tolist() == [False, True, False, False, False]
    assert survivors(seen, full, none, 1, 0.1, 20).tolist() == [True, True, False, False, False]
    assert survivors(seen, full, none, 2, 0.1, 100).tolist() == [False, True, True, False, False]
    assert survivors(seen, full, all_known, 2, 0.1, 20).tolist() == [False, True, False, True, False]


# ---------------------------------------------------------------------------------------------------- mixing


def test_mixup_is_a_weighted_sum_with_all_objects():
    first, second = np.full((4, 4, 3), 200, np.uint8), np.full((4, 4, 3), 100, np.uint8)
    Mixup(0.25).apply(first, second)
    assert (first == 125).all()
    assert len(Mixup(0.25).objects(objects_of([[0, 0, 1, 1]]), objects_of([[1, 1, 2, 2]] * 2), Hyp())) == 3
    weights = [Mixup.draw(np.random.default_rng(i)).weight for i in range(300)]
    assert abs(np.mean(weights) - 0.5) < 0.02 and abs(np.std(weights) - 0.062) < 0.01  # Beta(32, 32)


def test_cutmix_shows_what_its_boxes_say():
    patch = Cutmix((20, 20, 60, 60))
    first, second = np.zeros((80, 80, 3), np.uint8), np.full((80, 80, 3), 255, np.uint8)
    patch.apply(first, second)
    assert (first[20:60, 20:60] == 255).all() and (first == 255).all(2).sum() == 1600
    behind = objects_of([[30, 30, 50, 50], [10, 25, 40, 55], [0, 0, 25, 25], [25, 25, 59, 80]])
    front = objects_of([[0, 0, 10, 10], [50, 50, 70, 70], [30, 30, 40, 40]])
    mixed = patch.objects(behind, front, Hyp())
    assert np.allclose(
        mixed.xyxy,
        [
            [10, 25, 20, 55],  # its right part is hidden over the full height
            [0, 0, 25, 25],  # only a corner is hidden
            [25, 60, 59, 80],  # likewise downward
            [50, 50, 60, 60],  # cut to the patch
            [30, 30, 40, 40],
        ],
    )
    assert MIN_REST == 0.3


def test_cutmix_rectangles_stay_inside():
    for seed in range(200):
        x1, y1, x2, y2 = Cutmix.draw(np.random.default_rng(seed), (50, 70)).rect
        assert 0 <= x1 <= x2 <= 70 and 0 <= y1 <= y2 <= 50


@pytest.mark.parametrize("polygons", [True, False])
def test_copy_paste_pastes_the_mirrored_object(polygons):
    image = np.zeros((60, 100, 3), np.uint8)
    diamond = np.array([[10.0, 20], [20, 10], [30, 20], [20, 30]])
    cv2.fillPoly(image, [diamond.astype(np.int32)], (255, 255, 255))
    objects = objects_of([[10, 10, 30, 30]], [diamond] if polygons else None)
    paste = CopyPaste.draw(np.random.default_rng(0), objects, 100, share=1.0)
    assert paste.chosen == (0,)
    image[40:50, 80:90] = 77  # below the paste
    image[12:14, 72:74] = 99  # inside the pasted box, outside its diamond
    paste.apply(image, objects)
    both = paste.objects(objects, (60, 100))
    assert np.allclose(both.xyxy, [[10, 10, 30, 30], [70, 10, 90, 30]]) and both.cls.tolist() == [0, 0]
    assert (image[20, 72:88] == 255).all() and (image[45, 85] == 77).all()
    assert (image[12, 72] == (99 if polygons else 0)).all()


def test_copy_paste_covers_nothing_much():
    rng = np.random.default_rng(0)
    for _ in range(30):
        low = rng.uniform(0, 80, (12, 2))
        objects = objects_of(np.concatenate([low, low + rng.uniform(5, 20, (12, 2))], 1))
        pasted = CopyPaste.draw(rng, objects, 100, share=1.0)
        boxes = pasted.objects(objects, (100, 100)).xyxy
        for number in range(12, len(boxes)):
            others = boxes[:number]
            shared = np.prod(
                np.maximum(
                    np.minimum(others[:, 2:], boxes[number, 2:]) - np.maximum(others[:, :2], boxes[number, :2]), 0
                ),
                axis=1,
            )
            assert (shared < 0.3 * np.prod(others[:, 2:] - others[:, :2], axis=1) + 1e-9).all()
    assert CopyPaste.draw(rng, objects_of(np.zeros((0, 4))), 100, 1.0).chosen == ()
