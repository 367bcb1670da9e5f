"""Reading images safely: any common format to upright RGB, sizes from headers alone, a clear word about the unreadable.

Everything here works on the content of a file, never on its suffix. A file is opened without blocking and only if it is
a regular file, so that a pipe or a device under an image's name cannot hang a run. What is done to odd images:

* EXIF rotation is applied, to the picture and to the size; boxes therefore refer to the upright picture.
* Gray, palette, 16-bit (the upper 8 bits) and CMYK images become 8-bit RGB; transparency is dropped; of an animation
  the first frame is taken. Floating-point images are refused.
* A JPEG that ends too early is read as far as it goes, gray below; the index counts it, and leaves it out where more
  than `MAX_MISSING` of its rows are gone.
* More than `MAX_PIXELS` pixels, or a large picture in a suspiciously small file, is refused before it is decoded.
"""

import io
import os
import stat
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

from utils.core.errors import UserError

IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo")
    + (".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)
MAX_PIXELS = 400_000_000  # 20,000 x 20,000
MAX_FILE_BYTES = 2**31
BOMB_PIXELS, BOMB_PIXELS_PER_BYTE = 50_000_000, 1000
MAX_MISSING = 0.05  # share of a truncated JPEG's rows
_CV2_FORMATS = frozenset(("jpeg", "png", "bmp", "webp", "tiff", "pnm", "jp2", "avif"))
_HEAD = 65536
_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, RuntimeError)


class ImageError(UserError):
    """An image that cannot be used; the message does not name the file where the caller does."""


@dataclass(frozen=True)
class Header:
    """What a file's first bytes say. Height and width are those of the upright picture."""

    format: str
    height: int
    width: int
    orientation: int = 1  # EXIF, 1 to 8; 5 to 8 swap height and width
    complete: bool = True  # the end marker is where it belongs (JPEG and PNG)


def sniff(head: bytes) -> str | None:
    """The image format that a file's first 32 bytes announce, or None."""
    for name, magic in (
        ("jpeg", b"\xff\xd8\xff"),
        ("png", b"\x89PNG\r\n\x1a\n"),
        ("gif", b"GIF8"),
        ("bmp", b"BM"),
        ("tiff", b"II*\0"),
        ("tiff", b"MM\0*"),
        ("bigtiff", b"II+\0"),
        ("bigtiff", b"MM\0+"),
        ("jp2", b"\0\0\0\x0cjP  "),
        ("jp2", b"\xff\x4f\xff\x51"),
        ("psd", b"8BPS"),
    ):
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp":
        return {b"avi": "avif", b"hei": "heic", b"hev": "heic", b"mif": "heic"}.get(head[8:11])
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "pnm"
    return None


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading, unbuffered; OSError, without blocking, for a folder, a pipe or a device."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise OSError("is a folder" if stat.S_ISDIR(mode) else "is not a regular file")
        return os.fdopen(handle, "rb", 0)
    except OSError:
        os.close(handle)
        raise


def read_regular(path: str | Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes; OSError for anything else."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(f"has {size:,} bytes; at most {limit:,} are read")
        return file.read()


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of the upright picture, from the header alone."""
    try:
        header = image_header(path)
    except (ImageError, OSError) as error:
        raise ImageError(f"{path} {reason(error)}") from error
    return header.height, header.width


def image_header(path: str | Path) -> Header:
    """Format, upright size, orientation and completeness of an image file. ImageError or OSError if it is none."""
    with open_regular(path) as file:
        return parse_header(file, os.fstat(file.fileno()).st_size)


def parse_header(file: BinaryIO, size: int) -> Header:
    """Like `image_header`, of an open file of `size` bytes."""
    if size == 0:
        raise ImageError("is empty (0 bytes)")
    head = file.read(_HEAD)
    kind = sniff(head[:32])
    if kind is None:
        raise ImageError(f"is not an image (it starts with {head[:8]!r})")
    if kind in ("heic", "psd"):
        raise ImageError(f"is a {kind.upper()} file, which is not supported; expected JPEG, PNG, TIFF, WebP or BMP")
    try:
        header = _parse(kind, file, head, size)
    except (struct.error, IndexError, KeyError, EOFError, OverflowError) as error:
        raise ImageError(f"has a broken {kind.upper()} header") from error
    refuse_bomb(header.height, header.width, size)
    return header


def refuse_bomb(height: int, width: int, size: int) -> None:
    """ImageError for pictures too large to decode, or far larger than a file of `size` bytes could honestly hold."""
    pixels = height * width
    if pixels < 1:
        raise ImageError(f"has no pixels ({width} x {height})")
    if pixels > MAX_PIXELS:
        raise ImageError(f"has {width} x {height} pixels; at most {MAX_PIXELS:,} in all are read")
    if pixels > BOMB_PIXELS and pixels > BOMB_PIXELS_PER_BYTE * size:
        raise ImageError(f"claims {width} x {height} pixels in {size:,} bytes, which looks like a decompression bomb")
    if size > MAX_FILE_BYTES:
        raise ImageError(f"is {size:,} bytes long; at most {MAX_FILE_BYTES:,} are read")


def reason(error: Exception) -> str:
    """What is wrong, as a predicate that follows a file name."""
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    return str(error)


# ---------------------------------------------------------------------------------------------------- headers


def _parse(kind: str, file: BinaryIO, head: bytes, size: int) -> Header:
    if kind == "jpeg":
        return _jpeg_header(file, head, size)
    if kind == "png":
        return _png_header(file, head, size)
    if kind == "tiff":
        tags = _tiff_tags(file)
        return _upright("tiff", tags[257], tags[256], tags.get(274, 1))
    return _pillow_header(kind, file)


def _upright(kind: str, height: int, width: int, orientation: int, complete: bool = True) -> Header:
    orientation = orientation if 1 <= orientation <= 8 else 1
    if orientation >= 5:
        height, width = width, height
    return Header(kind, height, width, orientation, complete)


def _jpeg_header(file: BinaryIO, head: bytes, size: int) -> Header:
    """Walk the marker segments up to the frame header (SOFn)."""
    position, orientation, data, base = 2, 1, head, 0
    while True:
        if position + 10 > base + len(data):  # segments such as color profiles can exceed what was read at first
            file.seek(position)
            data, base = file.read(_HEAD), position
        at = position - base
        if len(data) < at + 4 or data[at] != 0xFF:
            raise EOFError("marker expected")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without content
            position += 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return _upright("jpeg", height, width, orientation, _ends_with(file, size, b"\xff\xd9"))
        if marker in (0xD9, 0xDA) or length < 2:
            raise EOFError("no frame header")
        if marker == 0xE1 and orientation == 1:
            file.seek(position + 4)
            segment = file.read(min(length - 2, 65536))
            if segment.startswith(b"Exif\0\0"):
                orientation = _exif_orientation(segment[6:])
        position += 2 + length


def _ends_with(file: BinaryIO, size: int, marker: bytes) -> bool:
    """Whether an end marker stands in the last bytes (a few may follow it)."""
    file.seek(max(0, size - 64))
    return marker in file.read(64)


def _png_header(file: BinaryIO, head: bytes, size: int) -> Header:
    if head[12:16] != b"IHDR":
        raise EOFError("IHDR expected")
    width, height = struct.unpack_from(">II", head, 16)
    orientation, position = 1, 33
    while position + 8 <= len(head):  # an eXIf chunk stands before the pixels, if at all
        length, name = struct.unpack_from(">I4s", head, position)
        if name == b"eXIf":
            orientation = _exif_orientation(head[position + 8 : position + 8 + length])
        if name in (b"IDAT", b"eXIf"):
            break
        position += 12 + length
    return _upright("png", height, width, orientation, _ends_with(file, size, b"IEND\xaeB`\x82"))


def _exif_orientation(block: bytes) -> int:
    """The orientation in an EXIF block (a small TIFF); 1 where it is absent or broken."""
    try:
        return _tiff_tags(io.BytesIO(block)).get(274, 1)
    except (struct.error, EOFError):
        return 1


def _tiff_tags(file: BinaryIO) -> dict[int, int]:
    """The whole-number tags (first value of each) of a TIFF structure's first directory."""
    file.seek(0)
    head = file.read(8)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None:
        raise EOFError("byte order expected")
    file.seek(struct.unpack_from(order + "I", head, 4)[0])
    count = struct.unpack(order + "H", file.read(2))[0]
    block = file.read(12 * count)
    tags = {}
    for at in range(0, len(block) - 11, 12):
        tag, kind = struct.unpack_from(order + "HH", block, at)
        if kind in (3, 4):  # 16 or 32 bits
            tags[tag] = struct.unpack_from(order + ("H" if kind == 3 else "I"), block, at + 8)[0]
    return tags


def _pillow_header(kind: str, file: BinaryIO) -> Header:
    """Formats for which Pillow's lazy open is good enough."""
    from PIL import Image

    file.seek(0)
    try:
        with _quiet(), Image.open(file) as image:
            width, height = image.size
            return _upright(kind, height, width, int(image.getexif().get(274, 1) or 1))
    except Image.DecompressionBombError as error:
        raise ImageError("has too many pixels, which looks like a decompression bomb") from error
    except _PILLOW_ERRORS as error:
        raise ImageError(f"has a broken {kind.upper()} header") from error


# ---------------------------------------------------------------------------------------------------- pictures


def read_image(path: str | Path, *, reduce: int = 1) -> np.ndarray:
    """An image file as upright RGB, uint8 [H, W, 3].

    `reduce` 2, 4 or 8 decodes a JPEG at that fraction of its size, rounded up; other formats come at full size, so the
    caller looks at the shape. ImageError (a UserError) names the file and what is wrong with it.
    """
    try:
        return decode_image(read_regular(path), reduce=reduce)
    except (ImageError, OSError) as error:
        raise ImageError(f"{path} {reason(error)}") from error


def read_indexed_image(path: str | Path, *, reduce: int = 1) -> np.ndarray:
    """An image of a data set, like `read_image`; the error says what to do about one that only decoding shows bad."""
    try:
        return read_image(path, reduce=reduce)
    except ImageError as error:
        raise ImageError(
            f"{error}; replace the file to go on, or run check.py on the data once: what it cannot decode is left out"
        ) from error


def decode_image(data: bytes, *, reduce: int = 1) -> np.ndarray:
    """Like `read_image`, of a file's content; the message of an ImageError is a predicate ("is empty")."""
    header = parse_header(io.BytesIO(data), len(data))
    assert reduce in _REDUCED, f"reduce is {reduce}; expected one of {list(_REDUCED)}"
    flag = _REDUCED[reduce if header.format == "jpeg" else 1]
    if header.format == "tiff" and header.orientation > 1:  # OpenCV rotates TIFFs in some releases only
        return _pillow_decode(data)  # Pillow does it while decoding
    image = None
    if header.format in _CV2_FORMATS:
        image = _cv2_decode(data, flag)
        if image is None and header.format == "jpeg" and not header.complete:
            image = _cv2_decode(data + b"\xff\xd9", flag)
    if image is None:
        image = _pillow_decode(data)
    image = _turn(image, header.orientation)
    if reduce == 1 and image.shape[:2] != (header.height, header.width):
        height, width = image.shape[:2]
        raise ImageError(f"decodes to {width} x {height}, but its header says {header.width} x {header.height}")
    return image


def missing_share(data: bytes) -> float | None:
    """The share of rows that a JPEG which ends too early lacks (1: not decodable); None when it has its end marker.

    For files whose header is not `complete`: some cameras and servers append bytes of their own to a whole JPEG.
    """
    scan = data.rfind(b"\xff\xda")
    if scan >= 0 and data.find(b"\xff\xd9", scan) >= 0:  # in a scan, the bytes ff d9 are the marker and nothing else
        return None
    image = _cv2_decode(data + b"\xff\xd9", cv2.IMREAD_COLOR)
    if image is None:
        return 1.0
    filled = (image == 128).all(axis=(1, 2))  # the decoder's fill value
    return 1.0 if filled.all() else float(np.argmin(filled[::-1])) / len(filled)


def _cv2_decode(data: bytes, flag: int) -> np.ndarray | None:
    """Decode to RGB, not rotated; None where OpenCV cannot."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def _pillow_decode(data: bytes) -> np.ndarray:
    """The second decoder, for what OpenCV cannot read (animations, some TIFFs). TIFFs come upright."""
    from PIL import Image

    try:
        with _quiet(), Image.open(io.BytesIO(data)) as image:
            if image.mode == "F":
                raise ImageError("is a floating-point image; expected 8 or 16 bits a channel")
            if image.mode.startswith("I"):
                return np.repeat(
                    (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, 2
                )
            return np.ascontiguousarray(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise ImageError("has too many pixels, which looks like a decompression bomb") from error
    except _PILLOW_ERRORS as error:
        raise ImageError(f"cannot be decoded ({' '.join(str(error).split())[:80]})") from error


def _quiet() -> warnings.catch_warnings:
    """Pillow warns of large pictures, on which `refuse_bomb` has decided, and of broken EXIF, which is left unread."""
    return warnings.catch_warnings(action="ignore")


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """Make a picture upright by its EXIF orientation."""
    if orientation == 1:
        return image
    if orientation in (5, 6, 7, 8):
        image = cv2.transpose(image)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return image if flip is None else cv2.flip(image, flip)
