"""Prediction: boxes in the pixels of the picture whatever its size, batch, tiles, augmentation or ensemble."""

import threading
import time

import numpy as np
import pytest
import torch

from models import build_model
from models.backends.pytorch import PyTorchPredictor
from tests.media import Endless, RedFinder, one_thread, with_squares  # noqa: F401
from utils.core.errors import UserError
from utils.engine.inference.pipeline import Behind, ahead
from utils.engine.inference.predict import (
    AugmentedPredictor,
    Detector,
    EnsemblePredictor,
    PredictSettings,
    combine,
    level_counts,
    network_size,
)
from utils.engine.speed import STAGES


def settings(**options) -> PredictSettings:
    return PredictSettings(**{"imgsz": (256, 256), **options})


@pytest.mark.parametrize("hw", [(256, 256), (200, 512), (900, 300), (128, 100), (37, 411)])
@pytest.mark.parametrize("rect", [True, False])
def test_boxes_come_back_in_pixels_of_the_picture(hw, rect):
    h, w = hw
    box = (w // 4, h // 5, w // 4 + w // 10 + 8, h // 5 + h // 2)
    detector = Detector(RedFinder(), settings(rect=rect))
    (found,) = detector([with_squares(hw, [box])])
    assert found.names == ("tall", "wide") and len(found) == 1
    assert np.abs(found.xyxy[0] - box).max() <= 1.01 * max(1, max(hw) / 256)  # one network pixel


def test_rect_gives_the_smallest_shape_that_the_stride_divides():
    predictor = RedFinder()
    Detector(predictor, settings())([with_squares((100, 256), [])])
    Detector(predictor, settings(rect=False))([with_squares((100, 256), [])])
    assert predictor.shapes == [(1, 3, 128, 256), (1, 3, 256, 256)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_batches_do_not_change_the_result_or_the_order(batch_size):
    pictures = [with_squares((200 + 40 * (i % 3), 256), [(10 * i, 20, 10 * i + 30, 60 + i)]) for i in range(7)]
    one_by_one = [Detector(RedFinder(), settings())([picture])[0].xyxy for picture in pictures]
    predictor = RedFinder()
    together = Detector(predictor, settings(batch_size=batch_size))(pictures)
    for one, other in zip(one_by_one, together, strict=True):
        assert np.array_equal(one, other.xyxy)
    assert max(shape[0] for shape in predictor.shapes) <= batch_size


@pytest.mark.parametrize("hw", [(1, 1), (1, 50), (50, 1), (10_000, 200), (200, 10_000), (3, 3)])
def test_odd_sizes_pass(hw):
    detector = Detector(RedFinder(), settings())
    (found,) = detector([np.full((*hw, 3), (255, 0, 0), np.uint8)])
    assert len(found) == 1 and np.isfinite(found.xyxy).all()
    assert (found.xyxy >= 0).all() and (found.xyxy <= (hw[1], hw[0], hw[1], hw[0])).all()


def test_no_picture_and_no_box():
    detector = Detector(RedFinder(), settings())
    assert detector([]) == []
    (found,) = detector([with_squares((64, 64), [])])
    assert len(found) == 0 and found.xyxy.shape == (0, 4)


def test_thresholds_classes_and_max_det_reach_nms():
    picture = with_squares((256, 256), [(10, 10, 20, 60), (100, 10, 200, 30), (50, 100, 60, 150)])
    assert len(Detector(RedFinder(), settings())([picture])[0]) == 3
    assert len(Detector(RedFinder(), settings(conf_thres=0.95))([picture])[0]) == 0
    assert len(Detector(RedFinder(), settings(max_det=2))([picture])[0]) == 2
    (wide,) = Detector(RedFinder(), settings(classes=(1,)))([picture])
    assert wide.cls.tolist() == [1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conf_thres": 1.5}, "--conf-thres"),
        ({"iou_thres": -1}, "--iou-thres"),
        ({"overlap": 1.0}, "--overlap"),
        ({"max_det": 0}, "--max-det"),
        ({"batch_size": 0}, "--batch-size"),
        ({"slice_size": -1}, "--slice -1"),
        ({"classes": (2,)}, "--classes 2"),
        ({"imgsz": (0, 0)}, "--imgsz"),
    ],
)
def test_impossible_settings_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Detector(RedFinder(), settings(**options))


def test_image_sizes_are_rounded_up_and_fixed_models_keep_theirs():
    assert network_size(RedFinder(), (250, 300)) == (256, 320)
    assert network_size(RedFinder(), (1,)) == (32, 32)
    assert network_size(RedFinder(imgsz=(128, 96)), (640,)) == (128, 96)


def test_fixed_size_and_batch_are_respected():
    predictor = RedFinder(imgsz=(128, 96), batch=2)
    pictures = [with_squares((50, 60), [(10, 10, 20, 40)])] * 5
    found = Detector(predictor, settings(batch_size=8))(pictures)
    assert all(shape[2:] == (128, 96) and shape[0] <= 2 for shape in predictor.shapes)
    assert all(np.abs(d.xyxy[0] - (10, 10, 20, 40)).max() < 1 for d in found)


def test_end_to_end_models_are_filtered_and_not_suppressed_again():
    picture = np.zeros((64, 64, 3), np.uint8)
    (found,) = Detector(Endless(), settings(conf_thres=0.25))([picture])
    assert found.to_rows().tolist() == [[8, 8, 16, 16, np.float32(0.9), 0], [8, 8, 40, 40, 0.5, 1]]
    (found,) = Detector(Endless(), settings(conf_thres=0.0, classes=(1, 2), max_det=1))([picture])
    assert found.cls.tolist() == [1]


def test_speed_counts_pictures_and_warm_up_does_not_count():
    detector = Detector(RedFinder(), settings())
    detector.warm_up()
    assert detector.speed.images == 0
    detector([with_squares((64, 64), [])] * 3)
    assert detector.speed.images == 3 and all(ms > 0 for ms in detector.speed.ms().values())
    assert tuple(detector.speed.ms()) == STAGES and detector.speed.shape == (1, 3, 256, 256)


# ------------------------------------------------------------------------------------------------ slices


def grid_of_small_objects(hw=(500, 900), size=6, step=45):
    return [(x, y, x + size, y + size) for y in range(7, hw[0] - size, step) for x in range(7, hw[1] - size, step)]


@pytest.mark.parametrize("overlap", [0.2, 0.4])
def test_slices_find_every_small_object_once_and_uncut(overlap):
    boxes = grid_of_small_objects()
    predictor = RedFinder(rows=400)
    detector = Detector(predictor, settings(slice_size=256, overlap=overlap, batch_size=4))
    (found,) = detector([with_squares((500, 900), boxes)])
    assert sorted(map(tuple, found.xyxy.round().astype(int).tolist())) == sorted(boxes)
    assert max(shape[0] for shape in predictor.shapes) == 4


def test_slices_keep_large_objects_whole():
    boxes = [(100, 50, 800, 400), (20, 20, 30, 30)]
    detector = Detector(RedFinder(), settings(slice_size=256, overlap=0.2, agnostic=True))
    (found,) = detector([with_squares((500, 900), boxes)])
    got = sorted(map(tuple, found.xyxy.tolist()))
    assert len(got) == 2 and np.abs(np.array(got) - np.array(sorted(boxes))).max() <= 900 / 256 + 0.01


def test_slices_of_a_small_picture_are_the_picture():
    predictor = RedFinder()
    detector = Detector(predictor, settings(slice_size=256))
    (found,) = detector([with_squares((200, 180), [(10, 10, 20, 40)])])
    assert len(predictor.shapes) == 1 and len(found) == 1


def test_several_pictures_with_slices_do_not_mix():
    pictures = [with_squares((300, 600), [(10 + 50 * i, 20, 20 + 50 * i, 40)]) for i in range(4)]
    found = Detector(RedFinder(), settings(slice_size=256, batch_size=16))(pictures)
    for i, d in enumerate(found):
        assert d.xyxy.round().astype(int).tolist() == [[10 + 50 * i, 20, 20 + 50 * i, 40]]


# ------------------------------------------------------------------------------- augmentation and ensembles


class Levels:
    """A predictor with three levels and two anchors; a row's class probability tells its level."""

    def __init__(self, names=("a",), strides=(8, 16, 32), imgsz=None, end2end=False):
        self.names, self.strides, self.device = list(names), list(strides), torch.device("cpu")
        self.imgsz, self.batch, self.half, self.end2end = imgsz, None, False, end2end

    def __call__(self, images):
        b, _, h, w = images.shape
        parts = []
        for stride in self.strides:
            n = 2 * (h // stride) * (w // stride)
            rows = torch.zeros(b, n, 5 + len(self.names))
            rows[..., 0], rows[..., 1], rows[..., 2], rows[..., 3] = w / 4, h / 2, w / 8, h / 8
            rows[..., 4], rows[..., 5] = 1, stride
            parts.append(rows)
        return torch.cat(parts, 1)


def test_level_counts_follow_the_grid():
    assert level_counts(2 * (64 + 16 + 4), (64, 64), (8, 16, 32)) == [128, 32, 8]
    with pytest.raises(UserError, match="do not divide"):
        level_counts(100, (64, 64), (8, 16, 32))


def test_augmentation_drops_the_coarsest_level_of_the_largest_and_the_finest_of_the_smallest_image():
    out = AugmentedPredictor(Levels())(torch.zeros(2, 3, 320, 640))
    counts = {stride: int((out[0, :, 5] == stride).sum()) for stride in (8, 16, 32)}
    full = {stride: 2 * (320 // stride) * (640 // stride) for stride in (8, 16, 32)}
    middle = {stride: 2 * (288 // stride) * (544 // stride) for stride in (8, 16, 32)}  # 0.83, up to multiples of 32
    small = {stride: 2 * (224 // stride) * (448 // stride) for stride in (8, 16, 32)}  # 0.67
    assert counts == {8: full[8] + middle[8], 16: full[16] + middle[16] + small[16], 32: middle[32] + small[32]}
    assert out.shape[0] == 2


def test_augmented_boxes_lie_where_the_plain_ones_lie():
    box = (40, 60, 80, 180)
    picture = with_squares((256, 256), [box])
    finder = RedFinder(rows=2 * (32 * 32 + 16 * 16 + 8 * 8))  # fits the plain size
    finder.__class__ = type("Resizing", (RedFinder,), {"__call__": resizing_call})
    (found,) = Detector(AugmentedPredictor(finder), settings())([picture])
    assert len(found) == 1  # three views agree, NMS leaves one
    assert np.abs(found.xyxy[0] - box).max() <= 2
    (all_views,) = Detector(AugmentedPredictor(finder), settings(iou_thres=1.0))([picture])
    assert len(all_views) == 2  # the first level carries the box here, and the smallest view drops its first level
    assert np.abs(all_views.xyxy - np.array(box)).max() <= 2


def resizing_call(self, images):
    """As many rows as a network of two anchors would give."""
    h, w = images.shape[2:]
    self._rows = sum(2 * (h // s) * (w // s) for s in self.strides)
    return RedFinder.__call__(self, images)


@pytest.mark.parametrize(("augment", "slice_size"), [(False, 0), (True, 0), (False, 72)])
def test_a_head_that_leaves_the_coarsest_level_out_gets_sizes_that_its_backbone_takes(augment, slice_size):
    config = build_model("yolov5n", nc=1).cfg
    rows = [*config["head"][:-1], [[17, 20], 1, "Detect", ["nc", "anchors"]]]
    config = {**config, "width_multiple": 0.125, "head": rows, "anchors": config["anchors"][:2]}
    predictor = PyTorchPredictor(build_model(config, nc=1), ["a"])
    assert max(predictor.strides) == 16 and predictor.max_stride == 32
    model = combine([predictor, predictor], augment=augment)
    detector = Detector(model, settings(imgsz=(64, 64), slice_size=slice_size))
    assert len(detector([np.zeros((100, 70, 3), np.uint8)])) == 1
    assert network_size(model, (80, 80)) == (96, 96)


def test_an_ensemble_is_the_predictions_side_by_side():
    a, b = Levels(), Levels()
    images = torch.zeros(1, 3, 64, 64)
    out = EnsemblePredictor([a, b])(images)
    assert torch.equal(out, torch.cat((a(images), b(images)), 1))
    assert combine([a]) is a
    assert isinstance(combine([a, b]), EnsemblePredictor) and isinstance(combine([a], augment=True), AugmentedPredictor)
    assert combine([a, b], augment=True)(images).shape[1] == 2 * AugmentedPredictor(a)(images).shape[1]


def test_models_that_do_not_go_together_are_refused():
    with pytest.raises(UserError, match="same classes"):
        EnsemblePredictor([Levels(), Levels(names=("b",))])
    with pytest.raises(UserError, match="image sizes"):
        EnsemblePredictor([Levels(imgsz=(64, 64)), Levels(imgsz=(96, 96))])
    with pytest.raises(UserError, match="--nms"):
        EnsemblePredictor([Levels(end2end=True)])
    with pytest.raises(UserError, match="--nms"):
        AugmentedPredictor(Levels(end2end=True))
    with pytest.raises(UserError, match="fixed"):
        AugmentedPredictor(Levels(imgsz=(64, 64)))


# ------------------------------------------------------------------------------------------------ threads


def test_reading_ahead_keeps_order_and_bounds():
    produced = []

    def items():
        for i in range(50):
            produced.append(i)
            yield i

    seen = []
    for item in ahead(items(), depth=2):
        seen.append(item)
        assert len(produced) - len(seen) <= 4  # two waiting, one in the thread's hand, one being made
        time.sleep(0.001)
    assert seen == list(range(50))


def test_reading_ahead_passes_errors_on_and_stops_with_its_reader():
    def broken():
        yield 1
        raise UserError("the disk is gone")

    with pytest.raises(UserError, match="disk is gone"):
        list(ahead(broken()))

    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    reader = ahead(endless())
    assert next(reader) == 0
    reader.close()
    assert closed.wait(2)


def test_writing_behind_keeps_order_and_raises_late_errors():
    done = []
    behind = Behind(done.append, depth=2)
    for i in range(100):
        behind.put(i)
    behind.close()
    assert done == list(range(100))

    def fail(item):
        raise OSError(28, "No space left on device")

    behind = Behind(fail)
    behind.put(1)
    with pytest.raises(OSError, match="No space left"):
        behind.close()


def test_writing_behind_holds_back_a_producer_that_is_too_fast():
    gate = threading.Event()
    behind = Behind(lambda item: gate.wait(60), depth=2)
    for i in range(2):  # one in work, one waiting
        behind.put(i)
    blocked = threading.Thread(target=behind.put, args=(3,), daemon=True)
    blocked.start()
    blocked.join(0.1)
    assert blocked.is_alive()
    gate.set()
    blocked.join(60)
    assert not blocked.is_alive()
    behind.close()
