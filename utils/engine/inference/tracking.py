"""Tracks through a video: the `trackers` library behind one small class, one tracker for each video or stream."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from utils.core.errors import UserError
from utils.core.files import nearest
from utils.data.frames import Frame
from utils.ops.detections import Detections

TRACKERS = {"bytetrack": "ByteTrackTracker", "sort": "SORTTracker", "ocsort": "OCSORTTracker"}
FALLBACK_FPS = 30.0


def make_tracker(kind: str, fps: float, conf_thres: float) -> Any:
    """A tracker of the library. Boxes below `conf_thres` + 0.1 continue tracks but start none."""
    if kind not in TRACKERS:
        raise UserError(f"--track {kind}; expected one of {', '.join(TRACKERS)}{nearest(kind, TRACKERS)}")
    try:
        import trackers
    except ModuleNotFoundError:
        raise UserError("--track needs the package trackers, which is not installed; pip install trackers") from None
    start = min(conf_thres + 0.1, 0.9)
    options = {
        "bytetrack": {"track_activation_threshold": start, "high_conf_det_threshold": start},
        "sort": {"track_activation_threshold": start},
        "ocsort": {"high_conf_det_threshold": start},
    }[kind]
    return getattr(trackers, TRACKERS[kind])(frame_rate=fps or FALLBACK_FPS, **options)


class Tracking:
    """Adds track numbers to detections. Pictures are left as they are; numbers count from 1 within each source item."""

    def __init__(self, kind: str, conf_thres: float = 0.25, make: Callable[[str, float, float], Any] = make_tracker):
        self._kind, self._conf_thres, self._make = kind, conf_thres, make
        make(kind, FALLBACK_FPS, conf_thres)  # a missing library shows before anything runs
        self._trackers: dict[int, Any] = {}
        self._numbers: dict[int, dict[int, int]] = {}

    def update(self, frame: Frame, detections: Detections) -> Detections:
        """The same boxes, in their order, with `track_id`: -1 where a box belongs to no track yet."""
        if frame.kind == "image":
            return detections
        if frame.item not in self._trackers:
            if frame.kind == "video":
                self._trackers.clear()
                self._numbers.clear()
            self._trackers[frame.item] = self._make(self._kind, frame.fps, self._conf_thres)
            self._numbers[frame.item] = {}
        ids = self._ids(self._trackers[frame.item], detections)
        numbers = self._numbers[frame.item]
        renamed = [numbers.setdefault(int(i), len(numbers) + 1) if i >= 0 else -1 for i in ids]
        return replace(detections, track_id=np.array(renamed, np.int64))

    @staticmethod
    def _ids(tracker: Any, detections: Detections) -> np.ndarray:
        """The library's own track number of each detection. It may reorder boxes, so each carries its position."""
        import supervision

        n = len(detections)
        boxes = supervision.Detections(
            xyxy=detections.xyxy.copy(),
            confidence=detections.conf.copy(),
            class_id=detections.cls.astype(int),
            data={"position": np.arange(n)},
        )
        tracked = tracker.update(boxes)
        ids = np.full(n, -1, np.int64)
        if len(tracked) and tracked.tracker_id is not None:
            ids[np.asarray(tracked.data["position"], int)] = tracked.tracker_id
        return ids
