"""How results are put down: as drawing, text rows, table rows and JSON, for detections and for classifications."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.data.frames import Frame
from utils.engine.figures.draw import Style, annotate, draw_lines
from utils.engine.inference.classifying import Classification
from utils.ops.detections import Detections

Result = Detections | Classification
DETECTION_HEADER = ("Image Name", "Prediction", "Confidence", "Frame", "Timestamp", "X1", "Y1", "X2", "Y2", "Track")
CLASS_HEADER = ("Image Name", "Prediction", "Confidence", "Frame", "Timestamp", "Place")


@dataclass(frozen=True)
class Forms:
    """The forms of one kind of result; the writers ask for them frame by frame."""

    draw: Callable[[np.ndarray, Any], np.ndarray]  # picture and result -> annotated copy
    lines: Callable[[Frame, Any], list[str]]  # of the text file
    header: tuple[str, ...]
    rows: Callable[[Frame, Any], list[list[Any]]]  # of the table
    record: Callable[[Frame, Any], dict[str, Any]]  # one line of NDJSON


def detection_forms(style: Style, save_conf: bool = False) -> Forms:
    """The forms of `Detections`."""
    return Forms(
        lambda image, found: annotate(image, found, style),
        lambda frame, found: box_lines(frame, found, save_conf),
        DETECTION_HEADER,
        box_rows,
        frame_record,
    )


def class_forms(style: Style) -> Forms:
    """The forms of `Classification`."""
    return Forms(
        lambda image, found: image if style.hide_labels else draw_lines(image, found.labels(not style.hide_conf)),
        lambda frame, found: [f"{p:.4f} {found.name(i)}" for i, p in enumerate(found.conf)],
        CLASS_HEADER,
        lambda frame, found: [[*_first(frame, found, i), *_when(frame), i + 1] for i in range(len(found.cls))],
        class_record,
    )


def box_lines(frame: Frame, found: Detections, save_conf: bool = False) -> list[str]:
    """`class cx cy w h [confidence] [track]` for each box, normalized."""
    h, w = frame.image.shape[:2]
    x1, y1, x2, y2 = found.xyxy.astype(np.float64).T / np.array([w, h, w, h])[:, None]
    boxes = np.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), 1)
    lines = []
    for i, box in enumerate(boxes):
        words = [str(found.cls[i]), *(f"{v:g}" for v in box)]
        if save_conf:
            words.append(f"{found.conf[i]:g}")
        if found.track_id is not None:
            words.append(str(found.track_id[i]))
        lines.append(" ".join(words))
    return lines


def box_rows(frame: Frame, found: Detections) -> list[list[Any]]:
    """A row under `DETECTION_HEADER` for each box."""
    tracks = [""] * len(found) if found.track_id is None else found.track_id.tolist()
    return [
        [*_first(frame, found, i), *_when(frame), *(f"{v:.2f}" for v in found.xyxy[i]), tracks[i]]
        for i in range(len(found))
    ]


def frame_record(frame: Frame, found: Detections) -> dict[str, Any]:
    """One line of NDJSON: source, kind, frame (from 1), timestamp (seconds), height, width, boxes in pixels."""
    boxes = []
    for i in range(len(found)):
        box = {**_entry(found, i), "xyxy": [round(float(v), 2) for v in found.xyxy[i]]}
        if found.track_id is not None:
            box["track"] = int(found.track_id[i]) if found.track_id[i] >= 0 else None
        boxes.append(box)
    return {**_place(frame), "boxes": boxes}


def class_record(frame: Frame, found: Classification) -> dict[str, Any]:
    """The same with `classes`, the likeliest first."""
    return {**_place(frame), "classes": [_entry(found, i) for i in range(len(found.cls))]}


def _place(frame: Frame) -> dict[str, Any]:
    h, w = frame.image.shape[:2]
    place = {"source": frame.name, "kind": frame.kind, "frame": frame.index, "timestamp": round(frame.timestamp, 3)}
    return {**place, "height": h, "width": w}


def _entry(found: Result, i: int) -> dict[str, Any]:
    return {"class": int(found.cls[i]), "name": found.name(i), "confidence": round(float(found.conf[i]), 5)}


def _first(frame: Frame, found: Result, i: int) -> list[str]:
    return [frame.path.name if frame.path else frame.name, found.name(i), f"{found.conf[i]:.5f}"]


def _when(frame: Frame) -> list[Any]:
    return [frame.index, f"{frame.timestamp:.3f}"]
