"""Samples as pure functions of (seed, epoch, position, image), and what is in them."""

import dataclasses
import pickle

import numpy as np
import pytest

from tests.samples import make_index
from utils.core.hyp import Hyp
from utils.data.dataset import DetectionDataset
from utils.data.images import read_image
from utils.data.mosaic import Frame
from utils.data.objects import Objects
from utils.data.order import NEIGHBOURS, aspect_order, batch_shape, before, epoch_order, eval_batches
from utils.ops.boxes import cxcywh_to_xyxy
from utils.ops.letterbox import letterbox_geometry, letterbox_image

BUSY = Hyp(degrees=5, mixup=0.3, cutmix=0.3, copy_paste=0.5, mosaic=0.8, mosaic9=0.3, flipud=0.3)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("plain") / "set", 12)


@pytest.fixture(scope="module")
def polygons(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("polygons") / "set", 6, polygons=True)


def equal(a, b):
    return (a.image == b.image).all() and np.array_equal(a.cls, b.cls) and np.array_equal(a.cxcywh, b.cxcywh)


# ---------------------------------------------------------------------------------------------------- orders


def test_an_epoch_is_a_permutation_of_its_own():
    orders = [epoch_order(100, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert (np.sort(order) == np.arange(100)).all() and order.dtype == np.int64
    assert not (orders[0] == orders[1]).all() and not (orders[0] == orders[2]).all()
    assert (epoch_order(100, 0, 1) == orders[1]).all()


def test_weights_choose_in_proportion():
    weights = np.array([0.0, 1, 3])
    counts = np.bincount(np.concatenate([epoch_order(3, 0, e, weights) for e in range(1000)]), minlength=3)
    assert counts[0] == 0 and abs(counts[2] / counts.sum() - 0.75) < 0.03


def test_partners_stand_before_a_position():
    order = np.arange(1000) * 7
    assert (before(order, 500, 128) == order[499 : 499 - 128 : -1]).all()
    assert set(before(order, 0, 128)) == set(order[-128:])
    short = np.arange(5)
    for size in (128, 0):
        assert sorted(before(short, 3, size)) == [0, 1, 2, 3, 4]  # a small set's own image included
        assert before(np.array([9]), 0, size).tolist() == [9]


def test_the_window_uses_all_images_alike_and_anew_each_epoch():
    """Three partners a position, drawn from the window: as even as draws from the whole set, other pairs each epoch."""
    n, pairs, rng = 2000, [], np.random.default_rng(0)
    for epoch in range(3):
        order = epoch_order(n, 0, epoch)
        partners = np.stack([rng.choice(before(order, p, Hyp.mosaic_window), 3) for p in range(n)])
        counts = np.bincount(partners.reshape(-1), minlength=n)
        assert abs(counts.mean() - 3) < 1e-9 and counts.std() < 1.1 * np.sqrt(3)  # the spread of independent draws
        pairs.append({(int(a), int(b)) for a, row in zip(order, partners, strict=True) for b in row})
    assert len(pairs[0] & pairs[1]) < 0.01 * len(pairs[0])


def test_batch_shapes_hold_every_image():
    shapes = np.array([[480, 640], [300, 640], [333, 500]])
    assert batch_shape(shapes, 640, 32, 0.0) == (480, 640)
    assert batch_shape(shapes, 640, 32, 0.5) == (512, 672)
    assert batch_shape(np.array([[640, 480], [480, 640]]), 320, 32, 0.0) == (320, 320)
    assert batch_shape(np.array([[1, 10_000]]), 640, 32, 0.0) == (32, 640)
    assert aspect_order(np.array([[2, 1], [1, 2], [1, 1]])).tolist() == [1, 2, 0]


def test_rectangles_of_validation_do_not_depend_on_the_batch_size():
    shapes = np.random.default_rng(0).integers(100, 640, (101, 2))
    shapes[:40] = 480, 640  # five groups of one rectangle, which fill larger batches
    seen = []
    for batch_size in (1, 3, NEIGHBOURS, 32):
        batches = eval_batches(shapes, batch_size, 640, 32, 0.5)
        indices = np.concatenate([b for b, _ in batches])
        assert sorted(indices.tolist()) == list(range(101)) and max(len(b) for b, _ in batches) == batch_size
        ratios = shapes / shapes.max(1, keepdims=True) * 640
        assert all((ratios[b].max(0) <= hw).all() for b, hw in batches)
        seen.append({int(i): hw for b, hw in batches for i in b})
    assert all(rectangles == seen[0] for rectangles in seen)
    assert eval_batches(shapes[:0], 4, 640, 32, 0.5) == []


# ---------------------------------------------------------------------------------------------------- purity


@pytest.mark.parametrize("hyp", [Hyp(), BUSY], ids=["default", "everything"])
def test_a_sample_depends_on_its_place_alone(index, hyp):
    """Not on what was made before, what is in memory, or the copy of the dataset."""
    first = DetectionDataset(index, 96, hyp, augment=True, seed=5)
    forward = [first.sample(1, p, p) for p in range(12)]
    other = pickle.loads(pickle.dumps(first))
    for p in reversed(range(12)):
        assert equal(other.sample(1, p, p), forward[p])
    assert not equal(first.sample(2, 3, 3), forward[3]) and not equal(first.sample(1, 4, 3), forward[3])
    assert not equal(DetectionDataset(index, 96, hyp, augment=True, seed=6).sample(1, 3, 3), forward[3])


def test_a_plan_can_be_replayed_and_read(index):
    dataset = DetectionDataset(index, 96, BUSY, augment=True)
    plan = dataset.plan(0, 3, 3)
    again = dataset.render(plan)
    assert equal(dataset.render(plan), again) and equal(dataset.sample(0, 3, 3), again)
    assert any(t.index == 3 for t in plan.scenes[0].tiles)
    assert np.allclose(cxcywh_to_xyxy(again.cxcywh) * 96, plan.objects.xyxy, atol=1e-3)


def test_memory_of_decoded_images_never_changes_a_picture(index, monkeypatch):
    plenty = DetectionDataset(index, 64, Hyp(), augment=True)
    monkeypatch.setattr("utils.data.cache.RECENT_BYTES", 0)
    monkeypatch.setattr("utils.data.cache.Recent.__init__.__defaults__", (0,), raising=False)
    none = DetectionDataset(index, 64, Hyp(), augment=True)
    for p in range(12):
        assert equal(plenty.sample(0, p, p), none.sample(0, p, p))


def test_pixels_are_written_where_they_are_wanted(index):
    dataset = DetectionDataset(index, 64, Hyp(), augment=True)
    out = np.zeros((64, 64, 3), np.uint8)
    sample = dataset.sample(0, 0, 0, out=out)
    assert sample.image is out and equal(sample, dataset.sample(0, 0, 0))
    kept = sample.image.copy()
    dataset.sample(0, 1, 1)
    assert (sample.image == kept).all(), "a later sample wrote into an earlier one"


# ---------------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize("hyp", [Hyp(), BUSY, Hyp(mosaic=0)], ids=["default", "everything", "single"])
def test_samples_are_whole(index, hyp):
    dataset = DetectionDataset(index, 96, hyp, augment=True)
    total = 0
    for p in range(40):
        s = dataset.sample(0, p, p % 12)
        assert s.image.shape == (96, 96, 3) and s.image.dtype == np.uint8 and s.image.flags.c_contiguous
        assert s.cls.dtype == s.cxcywh.dtype == np.float32 and s.cls.shape == s.cxcywh.shape[:1]
        corners = cxcywh_to_xyxy(s.cxcywh)
        assert (corners >= -1e-6).all() and (corners <= 1 + 1e-6).all() and set(s.cls) <= {0.0, 1.0, 2.0}
        assert (s.cxcywh[:, 2:] * 96 > hyp.min_box_px - 1e-3).all() or hyp is BUSY
        assert s.geometry is None
        total += len(s.cls)
    assert total > 40


def test_boxes_lie_on_their_objects(tmp_path):
    """White objects on black: where a box is, it is bright; outside all boxes it is not."""
    import cv2

    from utils.core.yamls import dump_yaml
    from utils.data.index import build_index
    from utils.data.spec import load_data

    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for i in range(6):
        h, w = int(rng.integers(150, 400)), int(rng.integers(150, 400))
        image, lines = np.zeros((h, w, 3), np.uint8), []
        for x, y in rng.integers(0, 100, (4, 2)) + np.array([[0, 0], [100, 0], [0, 100], [100, 100]]) // 2 * (w > 0):
            x2, y2 = min(int(x) + 30, w), min(int(y) + 24, h)
            image[y:y2, x:x2] = 255
            lines.append(f"0 {(x + x2) / 2 / w} {(y + y2) / 2 / h} {(x2 - x) / w} {(y2 - y) / h}")
        cv2.imwrite(str(tmp_path / "images" / f"{i}.png"), image)
        (tmp_path / "labels" / f"{i}.txt").write_text("\n".join(lines))
    dump_yaml(tmp_path / "d.yaml", {"path": ".", "train": "images", "val": "images", "names": ["a"]})
    found = build_index(load_data(tmp_path / "d.yaml"), "train", workers=0)
    hyp = Hyp(hsv_h=0, hsv_s=0, hsv_v=0, degrees=0, min_box_px=0, min_area_ratio=0, max_aspect=1e9, flipud=0.5)
    for size in (128, 320):
        dataset = DetectionDataset(found, size, hyp, augment=True)
        for p in range(12):
            s = dataset.sample(0, p, p % 6)
            inside = np.zeros((size, size), bool)
            for x1, y1, x2, y2 in cxcywh_to_xyxy(s.cxcywh) * size:
                a, b, c, d = (int(np.ceil(x1)), int(np.ceil(y1)), int(np.floor(x2)), int(np.floor(y2)))
                if c - a > 4 and d - b > 4:
                    assert s.image[b + 1 : d - 1, a + 1 : c - 1].mean() > 250
                inside[max(int(y1) - 1, 0) : int(y2) + 2, max(int(x1) - 1, 0) : int(x2) + 2] = True
            outside = s.image[~inside]
            assert len(outside) == 0 or ((outside < 130).mean() > 0.999)  # black, or the fill


def test_polygons_feed_the_same_samples_with_tighter_boxes(polygons):
    """An ellipse cut by the border: its box is at most that of the cut box, and survives where less is left."""
    boxes_only = dataclasses.replace(
        polygons, poly_offsets=np.zeros_like(polygons.poly_offsets), poly_xy=np.zeros((0, 2), np.float32)
    )
    with_polygons, plain = (DetectionDataset(i, 96, Hyp(), augment=True) for i in (polygons, boxes_only))
    tighter = 0
    for p in range(30):
        a, b = with_polygons.sample(0, p, p % 6), plain.sample(0, p, p % 6)
        assert (a.image == b.image).all()
        if len(a.cls) == len(b.cls):
            smaller = (a.cxcywh[:, 2:] <= b.cxcywh[:, 2:] + 1e-5).all()
            assert smaller
            tighter += (a.cxcywh[:, 2:] < b.cxcywh[:, 2:] - 1e-3).any(1).sum()
    assert tighter > 5
    turned = Hyp(degrees=30, mosaic=0, scale=0, translate=0, fliplr=0)
    a, b = (DetectionDataset(i, 96, turned, augment=True).plan(0, 0, 0) for i in (polygons, boxes_only))
    assert (
        np.prod(a.objects.xyxy[:, 2:] - a.objects.xyxy[:, :2], 1).sum()
        < np.prod(b.objects.xyxy[:, 2:] - b.objects.xyxy[:, :2], 1).sum()
    )


def test_evaluation_samples_are_plain_letterboxes(index):
    dataset = DetectionDataset(index, 96, Hyp(), augment=False)
    for i in range(len(index)):
        s = dataset.sample(0, 0, i)
        image, geometry = read_image(index.file(i)), letterbox_geometry(tuple(index.shapes[i].tolist()), 96)
        assert s.geometry == geometry and (s.image == letterbox_image(image, geometry)).all()
        back = geometry.to_source(cxcywh_to_xyxy(s.cxcywh) * 96)
        assert np.allclose(back, index.labels(i)[1], atol=0.02) and (s.cls == index.labels(i)[0]).all()


def test_rect_samples_take_the_shape_they_are_given(index):
    plain = DetectionDataset(index, 96, Hyp(), augment=False, rect=True)
    augmented = DetectionDataset(index, 96, Hyp(), augment=True, rect=True)
    for i in range(5):
        assert plain.sample(0, 0, i, hw=(96, 128)).image.shape == (96, 128, 3)
        geometry = plain.sample(0, 0, i, hw=(96, 128)).geometry
        assert max(geometry.resized_hw) == 96, "the long side is the image size, whatever the padding"
        sample = augmented.sample(0, i, i, hw=(96, 128))
        assert sample.image.shape == (96, 128, 3) and len(augmented.plan(0, i, i, hw=(96, 128)).scenes[0].tiles) == 1


def test_single_class_and_images_without_objects(tmp_path):
    empty = make_index(tmp_path / "set", 4, objects=0)
    dataset = DetectionDataset(empty, 64, BUSY, augment=True, single_cls=True)
    for p in range(10):
        assert len(dataset.sample(0, p, p % 4).cls) == 0


def test_single_class_hides_the_classes(index):
    dataset = DetectionDataset(index, 64, Hyp(), augment=True, single_cls=True)
    assert {float(c) for p in range(5) for c in dataset.sample(0, p, p).cls} == {0.0}


def test_one_image_is_enough(tmp_path):
    dataset = DetectionDataset(make_index(tmp_path / "set", 1), 64, Hyp(mosaic9=0.5, mixup=0.5), augment=True)
    assert all(dataset.sample(e, 0, 0).image.shape == (64, 64, 3) for e in range(6))


def test_crowd_regions_are_not_learned(index):
    crowd = np.zeros(len(index.cls), bool)
    crowd[::2] = True
    marked = dataclasses.replace(index, crowd=crowd)
    assert len(Objects.of(marked, 0)) == len(Objects.of(index, 0)) - crowd[: index.offsets[1]].sum()


def test_large_images_are_decoded_no_finer_than_needed(tmp_path):
    index = make_index(tmp_path / "set", 3, sizes=((400, 600), (601, 399), (150, 100)))
    dataset = DetectionDataset(index, 96, Hyp(), augment=True)
    assert dataset.levels.tolist() == [4, 4, 1]
    assert dataset.frame(1) == Frame((151, 100), 4, (0, 0)) and dataset.pixels(1).shape == (151, 100, 3)
    exact = DetectionDataset(index, 96, Hyp(), augment=False)
    assert exact.levels.tolist() == [1, 1, 1]


# ---------------------------------------------------------------------------------------------------- slices


def test_slices_are_items_with_their_own_objects(index):
    dataset = DetectionDataset(index, 96, Hyp(), augment=True, slices=(96, 0.25))
    assert len(dataset) > len(index) and (dataset.shapes <= 96).all()
    for i in range(len(dataset)):
        x1, y1, x2, y2 = dataset.unit_box[i].tolist()
        image = read_image(index.file(int(dataset.unit_image[i])))
        assert (dataset.pixels(i) == image[y1:y2, x1:x2]).all()
        objects = dataset.objects(i)
        assert (objects.xyxy >= 0).all() and (objects.xyxy <= [x2 - x1, y2 - y1] * 2).all()
        full = Objects.of(index, int(dataset.unit_image[i]))
        shared = np.prod(
            np.maximum(np.minimum(full.xyxy[:, 2:], (x2, y2)) - np.maximum(full.xyxy[:, :2], (x1, y1)), 0), axis=1
        )
        assert len(objects) == (shared >= 0.25 * full.areas).sum()
    sample = dataset.sample(0, 0, len(dataset) - 1)
    assert sample.image.shape == (96, 96, 3)


def test_slices_of_huge_images_may_be_decoded_coarsely(tmp_path):
    index = make_index(tmp_path / "set", 1, sizes=((500, 700),))
    dataset = DetectionDataset(index, 96, Hyp(), augment=True, slices=(300, 0.2))
    assert dataset.levels.tolist() == [2]
    for i in range(len(dataset)):
        frame, pixels = dataset.frame(i), dataset.pixels(i)
        assert pixels.shape[:2] == frame.hw and frame.level == 2
        x1, y1, x2, y2 = dataset.unit_box[i].tolist()
        assert frame.origin == (x1 // 2 * 2 - x1, y1 // 2 * 2 - y1)
        assert frame.origin[0] + 2 * frame.hw[1] >= x2 - x1 and frame.origin[1] + 2 * frame.hw[0] >= y2 - y1


# ---------------------------------------------------------------------------------------------------- real data


def test_coco128_gives_a_default_sample(shared_data):
    from utils.data.index import build_index
    from utils.data.spec import load_data

    index = build_index(load_data(shared_data / "coco128" / "coco128.yaml"), "train", workers=0)
    dataset = DetectionDataset(index, 320, Hyp(), augment=True)
    counts = [len(dataset.sample(0, p, p).cls) for p in range(16)]
    assert np.mean(counts) > 5
