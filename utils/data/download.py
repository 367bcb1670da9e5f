"""Fetching a data set that its YAML offers: data, never code, and only when the user asks for it with --download.

A `download:` entry has a `url`, its `sha256`, and a folder `extract_to` under the data set's root. The file goes to a
temporary folder, is checked against the sum, is unpacked beside its place with every name and size checked (no path
that leads out, no link, no device, no bomb), and moved into place only when all of that went well. Existing files are
never overwritten.
"""

import bz2
import gzip
import hashlib
import http.client
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tqdm import tqdm

from utils.core.errors import UserError
from utils.core.log import LOGGER
from utils.data.frames import redact
from utils.data.problems import spelled_out
from utils.data.spec import DataSpec, normalize

MAX_BYTES = 200 * 10**9  # of an archive, and of what comes out of it
MAX_FILES = 20_000_000
HONEST_RATIO, HONEST_BYTES = 100, 10**9  # more than both: a bomb
BLOCK = 1 << 20
_ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)


def fetch(spec: DataSpec, *, max_bytes: int = MAX_BYTES) -> list[Path]:
    """Download and unpack what the data YAML offers, unless all declared splits are there. Returns the folders."""
    missing = [split for split in spec.splits if not _is_there(spec, split)]
    if not missing:
        LOGGER.info("%s: all of %s is there; nothing is downloaded", spec.yaml, ", ".join(spec.splits))
        return []
    if not spec.download:
        note = spec.download_note or "it has no 'download:' entry; expected url, sha256 and extract_to"
        raise UserError(f"{spec.yaml}: '{missing[0]}' is missing and cannot be downloaded: {note}")
    places = [_place(spec, entry) for entry in spec.download]
    for entry in spec.download:
        _check_source(spec, entry)
    for entry, place in zip(spec.download, places, strict=True):
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=place) as folder:
            file = Path(folder) / "file"
            _download(entry["url"], file, entry.get("sha256", ""), max_bytes)
            name = PurePosixPath(urllib.parse.urlsplit(entry["url"]).path).name
            staged = Path(folder) / "unpacked"
            staged.mkdir()
            _unpack(file, staged, name, max_bytes)
            _move_into(staged, place)
        LOGGER.info("unpacked into %s", place)
    return places


def _is_there(spec: DataSpec, split: str) -> bool:
    return all(path.exists() for path in (*spec.splits[split], *spec.annotations.get(split, ())))


def _place(spec: DataSpec, entry: dict[str, str]) -> Path:
    """The folder to unpack into, which must lie in the data set's root."""
    place = normalize(spec.root / entry.get("extract_to", "."))
    if place != spec.root and spec.root not in place.parents:
        raise UserError(
            f"{spec.yaml}: 'extract_to: {entry['extract_to']}' leads out of the data set's folder {spec.root}"
        )
    return place


def _check_source(spec: DataSpec, entry: dict[str, str]) -> None:
    shown, digest = redact(entry["url"]), entry.get("sha256", "")
    try:
        parts = urllib.parse.urlsplit(entry["url"])
    except ValueError:  # brackets that enclose no IPv6 address
        parts = urllib.parse.urlsplit("")
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise UserError(f"{spec.yaml}: 'download.url: {shown}' is not a web address; expected https://...")
    if digest and (len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef")):
        raise UserError(
            f"{spec.yaml}: 'download.sha256: {digest}' is not a SHA-256 sum; expected 64 hexadecimal digits"
        )
    if not digest and parts.scheme == "http":
        raise UserError(
            f"{spec.yaml}: {shown} is neither encrypted nor checked; expected https, or a 'sha256:' beside the url"
        )


# ---------------------------------------------------------------------------------------------------- fetching


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to the web only, and never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme != "https" and (scheme != "http" or req.type != "http"):
            raise UserError(
                f"{redact(req.full_url)} redirects to {redact(newurl)}, which is not followed; expected https"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, file: Path, expected: str, max_bytes: int) -> None:
    """Fetch a web address into a file, at most `max_bytes` and what the disk has room for; check its sum."""
    shown = redact(url)
    request = urllib.request.Request(url, headers={"User-Agent": "yolov5-spd"})
    digest, done = hashlib.sha256(), 0
    LOGGER.info("downloading %s", shown)
    try:
        with urllib.request.build_opener(_Redirects).open(request, timeout=60) as source:
            total = int(source.headers.get("Content-Length") or 0)
            limit = min(max_bytes, shutil.disk_usage(file.parent).free)
            if total > limit:
                raise UserError(f"{shown} has {total:,} bytes; there is room (or leave) for {limit:,}")
            with open(file, "wb") as target, tqdm(total=total or None, unit="B", unit_scale=True, disable=None) as bar:
                while block := source.read(BLOCK):
                    done += len(block)
                    if done > limit:
                        raise UserError(
                            f"{shown} has more than {limit:,} bytes, which is all there is room (or leave) for"
                        )
                    digest.update(block)
                    target.write(block)
                    bar.update(len(block))
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{shown} cannot be downloaded ({spelled_out(str(error))}); check the address and the network"
        ) from error
    if total and done != total:
        raise UserError(f"{shown} broke off after {done:,} of {total:,} bytes; try again")
    if expected and digest.hexdigest() != expected.lower():
        raise UserError(f"{shown} has the SHA-256 sum {digest.hexdigest()}, expected {expected}; it is not used")
    if not expected:
        LOGGER.warning("%s is not checked; to do so, add to the data YAML: sha256: %s", shown, digest.hexdigest())


# ---------------------------------------------------------------------------------------------------- unpacking


def _unpack(file: Path, folder: Path, name: str, max_bytes: int) -> None:
    """Unpack an archive into an empty folder; a file that is none is put there under `name`."""
    allowed = min(max_bytes, shutil.disk_usage(folder).free, max(HONEST_BYTES, HONEST_RATIO * file.stat().st_size))
    written = count = 0
    try:
        for member, source, size in _members(file, name, allowed):
            written, count = written + size, count + 1
            if written > allowed or count > MAX_FILES:
                raise UserError(
                    f"'{name}' unpacks to more than {allowed:,} bytes or {MAX_FILES:,} files; "
                    "it looks like a decompression bomb, or the disk is too small"
                )
            path = folder.joinpath(*_safe_parts(member, name))
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as target:
                _copy(source, target, size, f"'{spelled_out(member)}' in '{name}'")
    except _ARCHIVE_ERRORS as error:
        raise UserError(
            f"'{name}' is a broken archive ({spelled_out(str(error))}); try again, or tell its owner"
        ) from error
    except (OSError, RuntimeError) as error:
        raise UserError(f"'{name}' cannot be unpacked ({spelled_out(str(error))})") from error


def _copy(source: IO[bytes], target: IO[bytes], size: int, what: str) -> None:
    done = 0
    while block := source.read(BLOCK):
        done += len(block)
        if done > size:
            break
        target.write(block)
    if done != size:
        raise UserError(f"{what} is not of the size that the archive declares; it looks like a decompression bomb")


def _safe_parts(member: str, name: str) -> tuple[str, ...]:
    """The folders and the name of an archive member; UserError if they could lead out of the folder."""
    parts = PurePosixPath(member).parts
    bad = not parts or member.startswith("/") or ".." in parts or any(c in member for c in "\\:\0")
    if bad:
        raise UserError(
            f"'{name}' holds the path '{spelled_out(member)}', which leads out of its folder; it is not used"
        )
    return parts


def _members(file: Path, name: str, allowed: int) -> Iterator[tuple[str, IO[bytes], int]]:
    """(path, stream, size) of each regular file in an archive; UserError for anything but files and folders."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                kind = stat.S_IFMT(entry.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _no_file(name, entry.filename)
                _safe_parts(entry.filename, name)
                if not entry.is_dir():
                    with archive.open(entry) as source:
                        yield entry.filename, source, entry.file_size
        return
    head = _first_bytes(file)
    opener = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}.get(head[:2], open)
    with opener(file, "rb") as stream:
        if opener is open and head[257:262] != b"ustar":
            yield name, stream, file.stat().st_size  # type: ignore[misc]
            return
        capped = _Capped(stream, allowed, name)  # type: ignore[arg-type]
        with tarfile.open(fileobj=capped, mode="r:") as archive:  # type: ignore[call-overload]
            for entry in archive:
                archive.members = []  # it would remember every entry
                _safe_parts(entry.name, name)
                if not (entry.isfile() or entry.isdir()):
                    raise _no_file(name, entry.name)
                if entry.isfile():
                    source = archive.extractfile(entry)
                    assert source is not None
                    yield entry.name, source, entry.size


def _first_bytes(file: Path) -> bytes:
    with open(file, "rb") as stream:
        return stream.read(512)


def _no_file(name: str, member: str) -> UserError:
    return UserError(
        f"'{name}' holds '{spelled_out(member)}', a link or device; expected files and folders; it is not used"
    )


class _Capped:
    """A stream that a tar archive cannot read without bounds, neither in all nor at once: its headers may lie."""

    def __init__(self, stream: IO[bytes], allowed: int, name: str) -> None:
        self._stream, self._allowed, self._name = stream, 2 * allowed + (1 << 26), name

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > 1 << 24:
            raise UserError(f"'{self._name}' has a header of {size:,} bytes; it looks like a decompression bomb")
        return self._stream.read(size)

    def seek(self, position: int, whence: int = 0) -> int:
        if whence == 0 and position > self._allowed:
            raise UserError(
                f"'{self._name}' declares more than {self._allowed:,} bytes; it looks like a decompression bomb"
            )
        return self._stream.seek(position, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def _move_into(staged: Path, place: Path) -> None:
    """Move everything below `staged` into `place`; UserError, before anything is moved, if a file is there already."""
    files = [Path(folder) / name for folder, _, names in os.walk(staged) for name in names]
    for file in files:
        target = place / file.relative_to(staged)
        blocked = [
            parent for parent in target.parents if parent != place and place in parent.parents and parent.is_file()
        ]
        if os.path.lexists(target) or blocked:
            raise UserError(
                f"{(blocked or [target])[0]} exists already and is not overwritten; move it away, or change extract_to"
            )
    for file in files:
        target = place / file.relative_to(staged)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
