"""What a source hands over: one picture with its origin, and names that are safe to print and to use as files."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "tcp", "udp", "rtp", "srt", "mms")
_URL = re.compile(r"^([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_RESERVED = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)$", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a source.

    `image` is uint8 [H, W, 3] RGB. `name` is the path or the redacted URL. `item` of `items` counts the files or
    streams and `index` of `frames` (0: unknown) the frames within one, both from 1. `timestamp` is seconds from the
    start of a video, seconds since 1970 for a live source, 0 for a picture. `path` is the file, None for live sources.
    """

    image: np.ndarray
    name: str
    kind: Literal["image", "video", "stream"]
    item: int = 1
    items: int = 1
    index: int = 1
    frames: int = 0
    timestamp: float = 0.0
    fps: float = 0.0
    path: Path | None = None

    @property
    def stem(self) -> str:
        """The name without folder and suffix, usable as a file name."""
        return self.path.stem if self.path else safe_name(self.name)


@dataclass
class Tally:
    """How a source fared: frames that were read and the items that could not be."""

    frames: int = 0
    failed: list[str] = field(default_factory=list)


class Source(Protocol):
    """Pictures to work on. `live` sources give the newest frames and never end by themselves while they are up."""

    live: bool
    items: int
    tally: Tally
    files: tuple[Path, ...]

    def batches(self, size: int) -> Iterator[list[Frame]]:
        """Lists of frames: `size` at a time from files, whatever is new from live sources."""
        ...

    def close(self) -> None:
        """Stop readers and free devices; a second call does nothing."""
        ...


def url_scheme(text: str) -> str:
    """The lower-case scheme of `scheme://...`, or an empty string for anything else."""
    match = _URL.match(text)
    return match[1].lower() if match else ""


def bare_url(text: str) -> str:
    """A URL without user, password, query and fragment; other text unchanged.

    Everything up to the last `@` goes, because passwords with `/`, `?` or `#` in them are common and nothing says
    where such a password ends.
    """
    scheme = url_scheme(text)
    if not scheme:
        return text
    rest = text[len(scheme) + 3 :].rpartition("@")[2]
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    return f"{scheme}://{rest}"


def redact(text: str) -> str:
    """A URL as it may be shown: bare, without RTMP stream key and path parts such as `user=me&password=secret`."""
    scheme = url_scheme(text)
    if not scheme:
        return text
    bare = re.sub(r"[^/]*=[^/]*", "...", bare_url(text))
    key = scheme.startswith("rtmp") and bare.count("/") > 2
    return bare.rpartition("/")[0] + "/..." if key else bare


def safe_name(text: str, fallback: str = "unnamed") -> str:
    """`text` as one file or folder name that no system misreads: no separators, leading dots, reserved words."""
    cleaned = re.sub(r"[^\w.+=, -]+", "_", text).strip(" ._")[:100].rstrip(" ._")
    if _RESERVED.match(cleaned.split(".")[0]):
        cleaned = f"_{cleaned}"
    return cleaned or fallback


def distinct(names: Sequence[str]) -> list[str]:
    """Names of files as they are; those that a file system could take for an earlier one get a number."""
    first: dict[str, int] = {}
    for number, name in enumerate(names):
        first.setdefault(name.lower(), number)
    taken, result = set(first), []
    for number, name in enumerate(names):
        count = 2
        while first[name.lower()] != number and f"{name}_{count}".lower() in taken:
            count += 1
        result.append(name if first[name.lower()] == number else f"{name}_{count}")
        taken.add(result[-1].lower())
    return result


def unique_names(names: list[str]) -> list[str]:
    """Safe names, one for each of `names`, all different even where a file system ignores case."""
    taken: set[str] = set()
    result = []
    for number, name in enumerate(names):
        candidate = safe_name(name, f"class{number}")
        if candidate.lower() in taken:
            candidate = f"{candidate}_{number}"
        while candidate.lower() in taken:
            candidate += "_"
        taken.add(candidate.lower())
        result.append(candidate)
    return result
