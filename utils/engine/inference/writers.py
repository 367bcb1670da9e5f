"""What `detect.py` leaves behind: pictures, videos, labels, crops, tables, all under one run folder.

Writers take frames in order, one call each, and never write where the user's own pictures lie.
"""

import csv
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from utils.core.errors import UserError
from utils.core.files import ODD_NAMES
from utils.data.frames import Frame, safe_name, unique_names
from utils.engine.inference.records import Forms
from utils.ops.detections import Detections

WRITABLE = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
FALLBACK_FPS = 30.0
LONGEST_STILL = 5.0  # seconds of a recording for which the last picture of a stream is repeated


class Writer(Protocol):
    """One kind of output; takes the results that its `Forms` are for."""

    def write(self, frame: Frame, result: Any) -> None: ...

    def close(self) -> None: ...


def write_all(writers: Sequence[Writer], folder: Path | None, frame: Frame, result: Any) -> None:
    """One frame to every writer; a full disk, a missing right or an impossible name is a UserError."""
    try:
        for writer in writers:
            writer.write(frame, result)
    except OSError as error:
        raise UserError(f"cannot write the results to '{folder}': {error.strerror or error}") from error


def refuse_overwrite(folder: Path, files: Sequence[Path]) -> None:
    """UserError when `folder` holds one of the source files, at any depth: results must not land among them."""
    home = folder.resolve()
    for file in files:
        if home in file.resolve().parents:
            raise UserError(
                f"the results would be written to '{folder}', which holds the source '{file}'; "
                "choose another --project or --name"
            )


class Stems:
    """A file name for each item of a source, the same one each time, never one for two items or their frames."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}
        self._of_item: dict[int, str] = {}
        self._sequences: set[str] = set()  # names of videos and streams
        self._like_frames: set[str] = set()  # `cars` where a picture is called `cars_7`

    def of(self, frame: Frame) -> str:
        """`street`, or `street_2` when an earlier item had that name (case ignored), or a frame of one has."""
        if frame.item not in self._of_item:
            stem, picture = frame.stem, frame.kind == "image"
            between = "-" if picture and stem.lower() in self._sequences else "_"  # `cars_2` is a frame of `cars`
            count = self._taken.get(stem.lower(), 0)
            name = f"{stem}{between}{count + 1}" if count else stem
            while self._clashes(name.lower(), picture):
                count += 1
                name = f"{stem}{between}{count + 1}"
            self._taken[stem.lower()] = count + 1
            self._taken.setdefault(name.lower(), 1)
            if picture:
                self._like_frames.add(_without_number(name.lower()))
                return name  # passes once: need not be remembered
            self._sequences.add(name.lower())
            self._of_item[frame.item] = name
        return self._of_item[frame.item]

    def _clashes(self, name: str, picture: bool) -> bool:
        """Whether the name, or that of one of its frames, is an earlier item's or one of its frames'."""
        frames = _without_number(name) in self._sequences if picture else name in self._like_frames
        return name in self._taken or frames

    def of_frame(self, frame: Frame) -> str:
        """The same with the frame number behind it for videos and streams."""
        stem = self.of(frame)
        return stem if frame.kind == "image" else f"{stem}_{frame.index}"


def _without_number(name: str) -> str:
    """`cars` of `cars_7`, which a frame of `cars` would be called; an empty string for other names."""
    stem, _, number = name.rpartition("_")
    return stem if number.isdigit() else ""


def encode_image(image: np.ndarray, suffix: str, quality: int = 95) -> bytes:
    """uint8 [H, W, 3] RGB as the bytes of an image file of that suffix."""
    options = {
        ".jpg": [cv2.IMWRITE_JPEG_QUALITY, quality],
        ".jpeg": [cv2.IMWRITE_JPEG_QUALITY, quality],
        ".webp": [cv2.IMWRITE_WEBP_QUALITY, quality],
    }
    ok, data = cv2.imencode(suffix, np.ascontiguousarray(image[:, :, ::-1]), options.get(suffix, []))
    if not ok:
        raise UserError(f"a {image.shape[1]}x{image.shape[0]} picture cannot be written as {suffix}")
    return data.tobytes()


class PictureWriter:
    """Annotated pictures under their own names, and one .mp4 for each video and stream."""

    def __init__(self, folder: Path, forms: Forms) -> None:
        self._folder, self._draw = folder, forms.draw
        self._names = Stems()
        self._videos: dict[int, _Video] = {}

    def write(self, frame: Frame, result: Any) -> None:
        picture = self._draw(frame.image, result)
        stem = self._names.of(frame)
        if frame.kind == "image":
            suffix = frame.path.suffix.lower() if frame.path else ".jpg"
            target = self._folder / f"{stem}{suffix if suffix in WRITABLE else '.jpg'}"
            target.write_bytes(encode_image(picture, target.suffix))
            return
        if frame.item not in self._videos:
            if frame.kind == "video":
                self.close()
            self._videos[frame.item] = _Video(self._folder / f"{stem}.mp4", frame)
        self._videos[frame.item].add(picture, frame)

    def close(self) -> None:
        for video in self._videos.values():
            video.close()
        self._videos.clear()


class _Video:
    """One .mp4 at the rate of its source. Recordings of streams last as long as reality did."""

    def __init__(self, path: Path, first: Frame) -> None:
        self._path, self._first = path, first
        self._fps = first.fps or FALLBACK_FPS
        self._part, self._written = 1, 0
        self._last = first.timestamp
        self._due = 0.0
        self._hw: tuple[int, int] | None = None
        self._writer: cv2.VideoWriter | None = None

    def add(self, picture: np.ndarray, frame: Frame) -> None:
        if self._hw != picture.shape[:2]:
            self._open(picture.shape[:2])
        assert self._writer is not None
        bgr = _even(picture)[:, :, ::-1]
        for _ in range(self._copies(frame)):
            self._writer.write(np.ascontiguousarray(bgr))
            self._written += 1

    def _copies(self, frame: Frame) -> int:
        """How often a picture is written: once for videos; for streams until the recording has caught up."""
        if frame.kind == "video":
            return 1
        gap = min(max(frame.timestamp - self._last, 0.0), LONGEST_STILL)
        self._last = frame.timestamp
        self._due += gap * self._fps
        return max(round(self._due) + 1 - self._written, 0)

    def _open(self, hw: tuple[int, int]) -> None:
        """Start the file, or a further one when the picture changes its size."""
        if self._writer is not None:
            self._writer.release()
            self._part += 1
        path = self._path if self._part == 1 else self._path.with_name(f"{self._path.stem}_part{self._part}.mp4")
        size = (hw[1] + hw[1] % 2, hw[0] + hw[0] % 2)
        self._writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), self._fps, size)
        self._hw = hw
        if not self._writer.isOpened():
            raise UserError(f"cannot write the video '{path}' ({size[0]}x{size[1]}, mp4v); use --nosave or --save-json")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()
            self._writer = None


def _even(picture: np.ndarray) -> np.ndarray:
    """The picture with its last row and column repeated where a side is odd: video codecs want even sides."""
    h, w = picture.shape[:2]
    return np.pad(picture, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge") if h % 2 or w % 2 else picture


class TextWriter:
    """`labels/<stem>.txt` (`<stem>_<frame>.txt` of videos), no file for a frame without results."""

    def __init__(self, folder: Path, forms: Forms) -> None:
        self._folder, self._lines = folder / "labels", forms.lines
        self._folder.mkdir(parents=True, exist_ok=True)
        self._names = Stems()

    def write(self, frame: Frame, result: Any) -> None:
        path = self._folder / f"{self._names.of_frame(frame)}.txt"
        lines = self._lines(frame, result)
        if not lines:
            path.unlink(missing_ok=True)  # of an earlier run into the same folder
            return
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def close(self) -> None: ...


class CropWriter:
    """`crops/<class>/<stem>.jpg`: each box cut from the clean picture with a small margin."""

    def __init__(self, folder: Path, names: Sequence[str], *, gain: float = 1.02, pad: int = 10) -> None:
        self._folder = folder / "crops"
        self._classes = unique_names(list(names))
        self._gain, self._pad = gain, pad
        self._names = Stems()
        self._taken: set[Path] = set()  # of pictures: the second of `street` has the name of the first of `street_2`

    def write(self, frame: Frame, result: Detections) -> None:
        stem = self._names.of_frame(frame)
        counts: dict[int, int] = {}
        for i in range(len(result)):
            cls = int(result.cls[i])
            counts[cls] = counts.get(cls, 0) + 1
            folder = self._folder / (self._classes[cls] if cls < len(self._classes) else str(cls))
            path = folder / (f"{stem}_{counts[cls]}.jpg" if counts[cls] > 1 else f"{stem}.jpg")
            while path in self._taken:
                counts[cls] += 1
                path = folder / f"{stem}_{counts[cls]}.jpg"
            if frame.kind == "image":
                self._taken.add(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            cut = crop(frame.image, result.xyxy[i], self._gain, self._pad)
            path.write_bytes(encode_image(cut, ".jpg"))

    def close(self) -> None: ...


def crop(image: np.ndarray, xyxy: np.ndarray, gain: float = 1.02, pad: int = 10) -> np.ndarray:
    """The part of [H, W, 3] under a box enlarged by `gain` and `pad` pixels in all, at least one pixel; a view."""
    h, w = image.shape[:2]
    cx, cy = (xyxy[0] + xyxy[2]) / 2, (xyxy[1] + xyxy[3]) / 2
    half_w, half_h = ((xyxy[2] - xyxy[0]) * gain + pad) / 2, ((xyxy[3] - xyxy[1]) * gain + pad) / 2
    left, top = int(np.clip(cx - half_w, 0, w - 1)), int(np.clip(cy - half_h, 0, h - 1))
    right, bottom = int(np.clip(np.ceil(cx + half_w), left + 1, w)), int(np.clip(np.ceil(cy + half_h), top + 1, h))
    return image[top:bottom, left:right]


class CsvWriter:
    """`predictions.csv`: a row for each box, or for each of the likeliest classes."""

    def __init__(self, folder: Path, forms: Forms) -> None:
        self._rows = forms.rows
        self._file = open(folder / "predictions.csv", "w", encoding="utf-8", errors=ODD_NAMES, newline="")  # noqa: SIM115 (closed in close)
        self._csv = csv.writer(self._file)
        self._csv.writerow(forms.header)

    def write(self, frame: Frame, result: Any) -> None:
        self._csv.writerows(self._rows(frame, result))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class NdjsonWriter:
    """`predictions.ndjson`: a JSON object a line for each frame, also for those without boxes."""

    def __init__(self, folder: Path, forms: Forms) -> None:
        self._record = forms.record
        self._file = open(folder / "predictions.ndjson", "w", encoding="utf-8", errors=ODD_NAMES)  # noqa: SIM115 (closed in close)

    def write(self, frame: Frame, result: Any) -> None:
        self._file.write(json.dumps(self._record(frame, result), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class ViewWriter:
    """A window for each source (`--view-img`). `closed` turns true when the user presses q or Esc."""

    def __init__(self, forms: Forms) -> None:
        require_gui()
        self._draw = forms.draw
        self.closed = False

    def write(self, frame: Frame, result: Any) -> None:
        picture = self._draw(frame.image, result)
        cv2.imshow(safe_name(frame.name), picture[:, :, ::-1])
        pause = 0 if frame.kind == "image" and frame.items == 1 else 1
        self.closed = self.closed or cv2.waitKey(pause) & 0xFF in (ord("q"), 27)

    def close(self) -> None:
        cv2.destroyAllWindows()


def require_gui() -> None:
    """UserError unless this OpenCV can open windows and there is a display to open them on."""
    found = re.search(r"^\s*GUI:\s*(\S+)", cv2.getBuildInformation(), re.MULTILINE)
    if found is None or found[1].upper() == "NONE":
        raise UserError(
            "--view-img needs an OpenCV with windows, but opencv-python-headless is installed; "
            "pip uninstall opencv-python-headless, pip install opencv-python, or look at the saved files"
        )
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise UserError("--view-img needs a display, but DISPLAY is not set; look at the saved files instead")
