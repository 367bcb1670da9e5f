"""Tracks: one number for one object, from 1 in every video, and a clear word where the library is missing."""

import sys

import numpy as np
import pytest

from utils.core.errors import UserError
from utils.data.frames import Frame
from utils.engine.inference.tracking import TRACKERS, Tracking
from utils.ops.detections import Detections

IMAGE = np.zeros((8, 8, 3), np.uint8)


def frame(index, item=1, kind="video"):
    return Frame(IMAGE, "cars.mp4", kind, item, 2, index, fps=25.0)


def moving(t, n=3, conf=0.8):
    """n boxes of 40 px that move by 3 px a frame, each on its own row, in an order that changes with time."""
    xyxy = np.array([[10 + 3 * t, 100 * i, 50 + 3 * t, 100 * i + 40] for i in range(n)], np.float32).reshape(-1, 4)
    order = np.roll(np.arange(n), t)
    return Detections(xyxy[order], np.full(n, conf), order % 2, ("car", "van")), order


@pytest.mark.parametrize("kind", list(TRACKERS))
def test_every_object_keeps_its_number(kind):
    pytest.importorskip("trackers")
    tracking = Tracking(kind, 0.25)
    seen: dict[int, set[int]] = {}
    for t in range(12):
        detections, order = moving(t)
        tracked = tracking.update(frame(t + 1), detections)
        assert np.array_equal(tracked.xyxy, detections.xyxy) and np.array_equal(tracked.cls, detections.cls)
        for row, number in zip(order, tracked.track_id, strict=True):
            if t >= 4:  # a track is confirmed after a few frames
                seen.setdefault(int(row), set()).add(int(number))
    assert sorted(number for numbers in seen.values() for number in numbers) == [1, 2, 3]


def test_numbers_start_again_in_every_video_and_streams_are_apart():
    pytest.importorskip("trackers")
    tracking = Tracking("bytetrack", 0.25)
    for t in range(6):
        first = tracking.update(frame(t + 1, 1, "stream"), moving(t, 2)[0])
        other = tracking.update(frame(t + 1, 2, "stream"), moving(5 - t, 1)[0])
    assert sorted(first.track_id) == [1, 2] and other.track_id.tolist() == [1]
    for item in (1, 2):
        tracking = Tracking("bytetrack", 0.25) if item == 1 else tracking
        for t in range(6):
            last = tracking.update(frame(t + 1, item), moving(t, 2)[0])
        assert sorted(last.track_id) == [1, 2]


def test_frames_without_boxes_and_pictures():
    pytest.importorskip("trackers")
    tracking = Tracking("bytetrack", 0.25)
    for t in range(3):
        empty = tracking.update(frame(t + 1), moving(t, 0)[0])
        assert len(empty) == 0 and empty.track_id.shape == (0,)
    detections, _ = moving(0)
    assert tracking.update(frame(1, kind="image"), detections).track_id is None


def test_weak_boxes_continue_a_track_but_start_none():
    pytest.importorskip("trackers")
    tracking = Tracking("bytetrack", 0.25)
    for t in range(5):
        assert set(tracking.update(frame(t + 1), moving(t, 1, 0.3)[0]).track_id) == {-1}
    for t in range(5, 9):
        tracked = tracking.update(frame(t + 1), moving(t, 1, 0.8)[0])
    assert tracked.track_id.tolist() == [1]
    assert tracking.update(frame(10), moving(9, 1, 0.3)[0]).track_id.tolist() == [1]


def test_unknown_trackers_and_a_missing_library_are_named(monkeypatch):
    with pytest.raises(UserError, match="did you mean 'bytetrack'"):
        Tracking("bytetrak")
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(UserError, match="pip install trackers"):
        Tracking("bytetrack")
