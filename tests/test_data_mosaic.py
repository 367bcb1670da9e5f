"""The direct drawing of mosaics against the classic canvas: where every pixel comes from, and how it looks."""

import cv2
import numpy as np
import pytest

from benchmarks.classic import boxes_of, canvas_of, resized, warped
from utils.core.hyp import Hyp
from utils.data.augment import Warp
from utils.data.mosaic import (
    Frame,
    Scene,
    draw_scene,
    fitted,
    mosaic4,
    mosaic9,
    placements,
    reduction,
    scene_objects,
    single,
    snap,
)
from utils.data.objects import Objects
from utils.ops.letterbox import letterbox_geometry

SIZE = 128
PLAIN = Hyp()
TURNED = Hyp(degrees=30, shear=8, perspective=0.0008, scale=0.4)


def scene_of(rng, hyp, sizes, layout=mosaic4):
    """A mosaic of images 0, 1, 2, ..."""
    x, y = rng.integers(SIZE // 2, SIZE * 3 // 2, 2).tolist()
    tiles = layout(list(range(len(sizes))), sizes, (x, y), SIZE)
    canvas, out = (2 * SIZE, 2 * SIZE), (SIZE, SIZE)
    return Scene(tiles, canvas, out, Warp.draw(rng, hyp).meeting((x, y), canvas, out))


def sizes_of(rng, scale, count=4):
    """Heights and widths of images whose long side is `scale` times the target."""
    return [(int(h), int(w)) for h, w in (rng.uniform(0.5, 1, (count, 2)) * SIZE * scale).round() + 1]


def draw(scene, images, dtype=np.uint8):
    frames = [Frame(image.shape[:2]) for image in images]
    out = np.empty((*scene.out_hw, 3), dtype)
    places = placements(scene, frames.__getitem__) if scene.warp.axis_aligned else []
    draw_scene(scene, places, frames.__getitem__, images.__getitem__, out)
    return out, places


def classic(scene, images):
    return warped(scene, canvas_of(scene, lambda i: resized(images[i], SIZE)))


def coordinates(hw, number):
    """An image whose pixels say where they are: x, y, 1000 * image number + 1000."""
    y, x = np.mgrid[: hw[0], : hw[1]].astype(np.float32) + 0.5
    return np.stack([x, y, np.full_like(x, 1000 * number + 1000)], -1)


@pytest.mark.parametrize("layout", [mosaic4, mosaic9])
@pytest.mark.parametrize("hyp", [PLAIN, TURNED], ids=["axis-aligned", "turned"])
@pytest.mark.parametrize("scale", [0.5, 0.9, 1.3, 2.0, 3.1, 4.0])
def test_every_pixel_comes_from_the_same_place(scale, hyp, layout):
    rng = np.random.default_rng(int(scale * 10))
    compared = 0
    for _ in range(6):
        sizes = sizes_of(rng, scale, 4 if layout is mosaic4 else 9)
        scene = scene_of(rng, hyp, sizes, layout)
        images = [coordinates(hw, i) for i, hw in enumerate(sizes)]
        fast, reference = draw(scene, images, np.float32)[0], classic(scene, images)
        for tile in scene.tiles:
            of_tile = 1000 * tile.index + 1000
            ours, theirs = (np.abs(i[..., 2] - of_tile) < 1e-3 for i in (fast, reference))
            # a pixel's mixture with its neighbor across a seam belongs to neither
            inner = cv2.erode((ours & theirs).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
            apart = np.abs(fast - reference)[inner][:, :2] * tile.scale * scene.warp.scale
            if len(apart):
                assert apart.max() <= 0.5 + 1e-2, (tile, apart.max())
                compared += len(apart)
            both = cv2.erode(theirs.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
            assert ours[both].all(), "an inner pixel of a tile was not drawn by it"
    assert compared > 6 * SIZE * SIZE / 3


@pytest.mark.parametrize("hyp", [PLAIN, TURNED], ids=["axis-aligned", "turned"])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.7, 4.0])
def test_every_box_lies_where_the_canvas_puts_it(scale, hyp):
    rng = np.random.default_rng(7)
    hyp = hyp.replace(min_area_ratio=0.0, max_aspect=1e9, min_box_px=-1)
    for _ in range(20):
        sizes = sizes_of(rng, scale)
        scene = scene_of(rng, hyp, sizes)
        objects = []
        for number, hw in enumerate(sizes):
            corners = np.sort(rng.random((8, 2, 2)) * hw[::-1], axis=1).reshape(-1, 4)
            objects.append(Objects(np.full(8, number), corners, np.zeros((0, 2)), np.zeros(8, np.int64)))
        frames = [Frame(hw) for hw in sizes]
        places = placements(scene, frames.__getitem__) if scene.warp.axis_aligned else []
        ours = scene_objects(scene, places, objects.__getitem__, hyp)
        cls, theirs = boxes_of(scene, objects.__getitem__, hyp.replace(min_area_ratio=-1))
        big = (theirs[:, 2:] - theirs[:, :2] > 1).all(1)
        for value in range(4):
            mine, reference = ours.xyxy[ours.cls == value], theirs[(cls == value) & big]
            apart = np.abs(reference[:, None] - mine[None]).max(-1).min(1, initial=np.inf)
            assert (apart <= 0.5 + 1e-6).all()


def photos(shared_data, count=8):
    files = sorted((shared_data / "coco128" / "images").rglob("*.jpg"))[:count]
    return [cv2.imread(str(f))[..., ::-1].copy() for f in files]


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7, 4.0])
def test_real_pictures_look_the_same(shared_data, scale, monkeypatch):
    """After 4 x 4 averaging the mean difference stays under 2 of 255, at a usual size."""
    size = 512
    monkeypatch.setattr(f"{__name__}.SIZE", size)
    rng = np.random.default_rng(1)
    pool = [cv2.resize(p, None, fx=f, fy=f) for p in photos(shared_data) for f in [size * scale / max(p.shape[:2])]]
    differences = []
    for _ in range(3):
        images = [pool[i] for i in rng.choice(len(pool), 4, replace=False)]
        scene = scene_of(rng, PLAIN, [i.shape[:2] for i in images])
        pair = [draw(scene, images)[0], classic(scene, images)]
        small = [cv2.resize(p, (size // 4, size // 4), interpolation=cv2.INTER_AREA).astype(float) for p in pair]
        differences.append(np.abs(small[0] - small[1]).mean())
    assert np.mean(differences) < 1.5


@pytest.mark.parametrize("scale", [1.0, 1.9, 3.0, 4.0])
def test_small_objects_are_not_aliased_worse(scale):
    """Dots of a few pixels: the error against exact area averaging is at most that of the canvas."""
    rng = np.random.default_rng(2)
    errors = np.zeros(2)
    for _ in range(10):
        side = round(SIZE * scale)
        image = np.full((side, side, 3), 60, np.uint8)
        for x, y in rng.integers(0, side - 6, (side // 2, 2)):
            image[y : y + int(scale * 1.5) + 1, x : x + int(scale * 1.5) + 1] = 220
        gain = float(rng.uniform(0.5, 1))
        scene = Scene(single(0, letterbox_geometry((side, side), SIZE)), (SIZE, SIZE), (SIZE, SIZE), Warp(scale=gain))
        (placement,) = draw(scene, [image])[1]
        assert placement is not None
        x1, y1, x2, y2 = placement.rect
        exact = cv2.resize(image, (x2 - x1, y2 - y1), interpolation=cv2.INTER_AREA).astype(float)
        for k, drawn in enumerate((draw(scene, [image])[0], classic(scene, [image]))):
            errors[k] += np.abs(drawn[y1:y2, x1:x2] - exact).mean()
    assert errors[0] <= errors[1] * 1.02, errors


def test_reduced_decoding_keeps_the_geometry():
    """Pixels that stand for blocks of the source, with an origin of their own, land where the source's pixels would."""
    rng = np.random.default_rng(3)
    for level in (2, 4):
        sizes = [(int(h), int(w)) for h, w in rng.integers(3 * SIZE, 5 * SIZE, (4, 2))]
        scene = scene_of(rng, PLAIN, sizes)
        images, frames = [], []
        for number, (h, w) in enumerate(sizes):
            whole = coordinates((-(-h // level) * level, -(-w // level) * level), number)
            images.append(
                cv2.resize(whole, (whole.shape[1] // level, whole.shape[0] // level), interpolation=cv2.INTER_AREA)
            )
            frames.append(Frame(images[-1].shape[:2], level))
        out = np.empty((SIZE, SIZE, 3), np.float32)
        draw_scene(scene, placements(scene, frames.__getitem__), frames.__getitem__, images.__getitem__, out)
        reference, _ = draw(scene, [coordinates(hw, i) for i, hw in enumerate(sizes)], np.float32)
        for tile in scene.tiles:
            same = (np.abs(out[..., 2] - 1000 * tile.index - 1000) < 1) & (np.abs(out - reference)[..., 2] < 1)
            apart = np.abs(out - reference)[cv2.erode(same.astype(np.uint8), np.ones((3, 3))) > 0][:, :2]
            assert (apart * tile.scale * scene.warp.scale < 0.75).all()


def test_a_tile_of_one_pixel_and_a_tile_outside_are_drawn():
    for hw in ((1, 1), (1, 500), (3, 2)):
        scene = Scene(mosaic4([0, 1, 2, 3], [hw] * 4, (SIZE, SIZE), SIZE), (2 * SIZE,) * 2, (SIZE, SIZE), Warp())
        out, _ = draw(scene, [np.zeros((*hw, 3), np.uint8)] * 4)
        assert (out == 0).any()
    away = Scene(scene.tiles, scene.canvas_hw, scene.out_hw, Warp(translate_x=3.0))
    assert (draw(away, [np.zeros((3, 2, 3), np.uint8)] * 4)[0] == 114).all()


def test_mosaics_cover_what_they_should():
    sizes = [(100, 100)] * 9
    four = mosaic4(range(4), sizes[:4], (SIZE, SIZE), SIZE)
    assert [t.rect for t in four] == [
        (0, 0, SIZE, SIZE),
        (SIZE, 0, 2 * SIZE, SIZE),
        (0, SIZE, SIZE, 2 * SIZE),
        (SIZE, SIZE, 2 * SIZE, 2 * SIZE),
    ]
    nine = mosaic9(range(9), sizes, (SIZE, SIZE), SIZE)
    covered = np.zeros((2 * SIZE, 2 * SIZE), int)
    for tile in nine:
        x1, y1, x2, y2 = (int(v) for v in tile.rect)
        covered[y1:y2, x1:x2] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("scale, expected", [(3.0, 1), (1.0, 1), (0.51, 1), (0.5, 2), (0.26, 2), (0.25, 4), (0.1, 8)])
def test_reduction_leaves_a_pixel_for_each_output_pixel(scale, expected):
    assert reduction(scale) == expected


def test_snap_rounds_to_half_an_output_pixel():
    rng = np.random.default_rng(5)
    for _ in range(2000):
        scale, pixels = float(np.exp(rng.uniform(-3, 2))), int(rng.integers(1, 400))
        offset = float(rng.uniform(-200, 200))
        step = reduction(scale)
        span = snap(scale, offset, offset, offset + scale * pixels, pixels, SIZE, step)
        if span is None:
            continue
        assert 0 <= span.low < span.high <= SIZE and span.begin <= span.low and span.high <= span.end
        assert 0 <= span.start < span.stop < pixels + step and span.start % step == span.stop % step == 0
        if scale * pixels < 2:  # a sliver is widened to what can be drawn
            continue
        for place, pixel in ((span.begin, span.start), (span.end, span.stop)):
            assert abs(scale * pixel + offset - place) <= 0.5 + 1e-6 + (scale * (step - 1) if pixel > pixels else 0)


def test_fitted_keeps_the_long_side():
    assert fitted((480, 640), 320) == (240, 320)
    assert fitted((1, 5000), 320) == (1, 320)
