"""Sources of pictures: what `--source` means, and the reader for image and video files.

Live sources (cameras, network streams, the screen) have their own rooms, `streams.py` and `screen.py`.
"""

import glob
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2

from utils.core.errors import UserError
from utils.core.log import LOGGER
from utils.data.frames import SCHEMES, Frame, Source, Tally, bare_url, redact, url_scheme
from utils.data.images import IMAGE_SUFFIXES, image_header, read_image
from utils.data.screen import ScreenSource
from utils.data.streams import StreamSource, finite_fps, quiet_decoder

VIDEO_SUFFIXES = frozenset(
    (".asf", ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
)
MEDIA_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
LIST_SUFFIXES = frozenset((".txt", ".streams"))
ENDING_SLACK = 2  # frames by which a container's own count may be off without the end being called damaged


LONGEST_NAME = 255  # bytes, on all file systems in use


def open_source(
    spec: str | Path | Sequence[str | Path], *, vid_stride: int = 1, stream_timeout: float = 60.0
) -> Source:
    """The source that `spec` means.

    A file, folder, glob, list file (`.txt`, `.streams`), URL, webcam number, `screen [n] [left top width height]`, or
    several files. `vid_stride` takes every n-th frame; a stream that gave no frame for `stream_timeout` seconds is
    given up (0: never).
    """
    if vid_stride < 1:
        raise UserError(f"--vid-stride {vid_stride}; expected 1 (every frame) or more")
    if not 0 <= stream_timeout < math.inf:
        raise UserError(f"--stream-timeout {stream_timeout:g}; expected seconds, or 0 to wait for ever")
    specs = [str(s) for s in spec] if isinstance(spec, Sequence) and not isinstance(spec, str) else [str(spec)]
    if specs and specs[0] == "screen":
        specs = [" ".join(specs)]
    entries = [entry for text in specs for entry in _expand(text)]
    if not entries:
        raise UserError("no --source given; expected a picture, video, folder, glob, list file, URL or webcam number")
    if len(entries) == 1 and _is_screen(entries[0]):
        return ScreenSource(entries[0], stride=vid_stride)
    live = [entry for entry in entries if _is_live(entry)]
    if live and len(live) < len(entries):
        other = next(entry for entry in entries if not _is_live(entry))
        mixed = f"live sources ({redact(live[0])}) and files ({redact(other)})"
        raise UserError(f"--source mixes {mixed}; run them separately")
    screens = [entry for entry in entries if _is_screen(entry)]
    if screens:
        raise UserError(f"'{screens[0]}' is one of {len(entries)} sources; the screen cannot be combined, run it alone")
    if live:
        return StreamSource(live, stride=vid_stride, give_up=stream_timeout)
    return FileSource(entries, stride=vid_stride)


def _expand(text: str) -> list[str]:
    """One `--source` word -> files or addresses; a path that does not exist is a UserError."""
    text = text.strip()
    if not text:
        return []
    path = Path(text)
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts) and not url_scheme(text):
        raise UserError(f"source '{text[:60]}...' is no path: names have at most {LONGEST_NAME} bytes")
    if path.is_dir():
        found = sorted(str(p) for p in path.iterdir() if _suffix(p) in MEDIA_SUFFIXES and p.is_file())
        if not found:
            raise UserError(f"folder '{text}' holds no picture or video; expected files ending in {_known()}")
        return found
    if path.is_file():
        if _suffix(path) in LIST_SUFFIXES:
            return _read_list(path)
        if _suffix(path) not in MEDIA_SUFFIXES and not _is_image(path):
            raise UserError(f"'{text}' is neither a picture nor a video; expected a file ending in {_known()}")
        return [text]
    if url_scheme(text) or text.isdigit() or _is_screen(text):
        return [_checked_address(text)]
    shown = re.sub("^.*:.*@", "...@", text)  # a mistyped address can hold a password
    if glob.has_magic(text):
        matches = sorted(glob.glob(text, recursive=True))
        found = [m for m in matches if _suffix(m) in MEDIA_SUFFIXES and os.path.isfile(m)]
        if not found:
            raise UserError(f"glob '{shown}' matches no picture or video ({len(matches)} other entries match)")
        return found
    raise UserError(
        f"source '{shown}' not found; expected a file, folder, glob, URL or webcam number (in {Path.cwd()})"
    )


def _read_list(path: Path) -> list[str]:
    """Entries of a list file: one path, URL or webcam number a line; `#` starts a comment line."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise UserError(f"list file '{path}' is empty; expected one path, URL or webcam number a line")
    return [_listed(entry, path.parent) for entry in entries]


def _listed(entry: str, folder: Path) -> str:
    """`./x` is relative to the list's own folder; any other relative path to the working directory, then the folder."""
    if url_scheme(entry) or entry.isdigit():
        return _checked_address(entry)
    beside = folder / entry
    return str(beside) if entry.startswith("./") or (not Path(entry).exists() and beside.exists()) else entry


def _checked_address(text: str) -> str:
    """Refuse addresses that are no stream: unknown schemes, web pages of video platforms, single pictures."""
    scheme = url_scheme(text)
    if not scheme:
        return text
    shown = redact(text)
    host, _, tail = bare_url(text).partition("://")[2].partition("/")
    if scheme not in SCHEMES:
        raise UserError(f"source '{shown}' has scheme '{scheme}'; expected one of {', '.join(SCHEMES)}, or a path")
    if host.removeprefix("www.").removeprefix("m.") in ("youtube.com", "youtu.be"):
        raise UserError(f"source '{shown}' is a web page, not a stream; save the video and give its path")
    if _suffix(tail) in IMAGE_SUFFIXES:
        raise UserError(f"source '{shown}' is a single picture on the network; download it and give its path")
    return text


def _suffix(path: str | Path) -> str:
    return os.path.splitext(path)[1].lower()


def _known() -> str:
    return " ".join(sorted(MEDIA_SUFFIXES))


def _is_image(path: Path) -> bool:
    """Whether the content is a picture under a suffix that says nothing."""
    try:
        image_header(path)
    except (UserError, OSError):
        return False
    return True


def _is_screen(text: str) -> bool:
    return text.split()[0] == "screen" and not os.path.lexists(text)


def _is_remote_file(text: str) -> bool:
    """A URL that names a video file: it has an end, so it is read as a video and not as a stream."""
    return bool(url_scheme(text)) and _suffix(bare_url(text)) in VIDEO_SUFFIXES and url_scheme(text).startswith("http")


def _is_live(text: str) -> bool:
    if os.path.exists(text) or _is_remote_file(text):
        return False
    return bool(url_scheme(text)) or text.isdigit() or _is_screen(text)


def has_sequence(source: Source) -> bool:
    """Whether anything in the source goes on in time: a stream or a video, local or remote."""
    return source.live or len(source.files) < source.items or any(_suffix(f) in VIDEO_SUFFIXES for f in source.files)


class FileSource:
    """Pictures and videos, one after the other. What cannot be read is reported in one line and passed over."""

    live = False

    def __init__(self, paths: Sequence[str | Path], *, stride: int = 1) -> None:
        self._paths = [str(p) for p in paths]
        self._stride = stride
        self.items = len(self._paths)
        self.tally = Tally()
        self.files = tuple(Path(p) for p in self._paths if not url_scheme(p))

    def batches(self, size: int) -> Iterator[list[Frame]]:
        """Frames in order, `size` at a time (the last list may be shorter); see `Source`."""
        batch: list[Frame] = []
        for frame in self._frames():
            self.tally.frames += 1
            batch.append(frame)
            if len(batch) >= size:
                yield batch
                batch = []
        if batch:
            yield batch

    def close(self) -> None:
        """Nothing stays open between batches but the video that `batches` itself closes."""

    def _frames(self) -> Iterator[Frame]:
        for item, path in enumerate(self._paths, 1):
            if _suffix(bare_url(path)) in VIDEO_SUFFIXES:
                yield from self._video(path, item)
                continue
            try:
                image = read_image(Path(path))
            except UserError as error:
                self._fail(path, str(error).removeprefix(path).lstrip(": "))
                continue
            yield Frame(image, path, "image", item, self.items, path=Path(path))

    def _fail(self, path: str, reason: str) -> None:
        self.tally.failed.append(redact(path))
        LOGGER.warning(f"{redact(path)}: skipped, {reason}")

    def _video(self, path: str, item: int) -> Iterator[Frame]:
        quiet_decoder()
        capture = cv2.VideoCapture(path)
        try:
            fps = finite_fps(capture.get(cv2.CAP_PROP_FPS))
            announced = max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
            name, file = redact(path), None if url_scheme(path) else Path(path)
            index = 0
            while capture.isOpened() and capture.grab():
                index += 1
                if (index - 1) % self._stride:
                    continue
                ok, image = capture.retrieve()
                if not ok:
                    break
                rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
                seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                if not (seconds > 0 and math.isfinite(seconds)):
                    seconds = (index - 1) / fps if fps else 0.0
                yield Frame(rgb, name, "video", item, self.items, index, announced, seconds, fps / self._stride, file)
            if not index:
                self._fail(path, "no such file" if file and not file.is_file() else "no frame can be decoded")
            elif index + ENDING_SLACK < announced:
                LOGGER.warning(f"{name}: {index} of {announced} announced frames read; the rest is damaged or missing")
        finally:
            capture.release()
