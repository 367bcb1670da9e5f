"""Reading images: every kind of picture becomes upright RGB, headers tell the truth, nothing hangs or explodes."""

import contextlib
import io
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, features

from utils.core.errors import UserError
from utils.data.images import (
    MAX_PIXELS,
    ImageError,
    decode_image,
    image_header,
    image_size,
    missing_share,
    read_image,
    sniff,
)


def picture(height=48, width=64):
    """A smooth picture without symmetry, so that compression hardly changes it and every rotation shows."""
    seed = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(seed, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb():
    return Image.fromarray(picture())


@pytest.mark.parametrize(
    ("kind", "mode", "options", "tolerance"),
    [
        ("JPEG", "RGB", {"quality": 98, "subsampling": 0}, 3),
        ("JPEG", "RGB", {"quality": 98, "subsampling": 0, "progressive": True}, 3),
        ("JPEG", "CMYK", {"quality": 98}, 4),
        ("MPO", "RGB", {"quality": 98, "subsampling": 0}, 3),
        ("PNG", "RGB", {}, 0),
        ("PNG", "RGBA", {}, 0),
        ("BMP", "RGB", {}, 0),
        ("TIFF", "RGB", {}, 0),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}, 0),
        ("TIFF", "CMYK", {}, 1),
        ("WEBP", "RGB", {"lossless": True}, 0),
        ("WEBP", "RGBA", {"lossless": True}, 0),
        ("PPM", "RGB", {}, 0),
        ("JPEG2000", "RGB", {}, 1),
        ("PNG", "P", {}, None),
        ("PNG", "L", {}, None),
        ("PNG", "LA", {}, None),
        ("PNG", "1", {}, None),
        ("GIF", "P", {}, None),
        ("TIFF", "1", {"compression": "group4"}, None),
    ],
)
def test_formats_and_modes(tmp_path, kind, mode, options, tolerance):
    path = tmp_path / "name.without.meaning"
    image = rgb().convert(mode)
    path.write_bytes(encode(image, kind, **options))
    expected = np.asarray(image.convert("RGB")) if tolerance is None else picture()
    read = read_image(path)
    assert read.dtype == np.uint8 and read.shape == (48, 64, 3) and read.flags.c_contiguous
    assert np.abs(read.astype(int) - expected).mean() <= (tolerance or 0)
    assert image_size(path) == (48, 64)


@pytest.mark.parametrize("kind", [".png", ".tiff"])
@pytest.mark.parametrize("gray", [True, False])
def test_16_bit_keeps_the_upper_8(tmp_path, kind, gray):
    path = tmp_path / f"deep{kind}"
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30) if gray else (20, 30, 3), dtype=np.uint16)
    cv2.imwrite(str(path), deep)
    expected = (deep >> 8).astype(np.uint8)
    expected = np.repeat(expected[..., None], 3, 2) if gray else expected[..., ::-1]
    assert np.abs(read_image(path).astype(int) - expected).max() <= (1 if kind == ".tiff" else 0)  # libtiff rounds


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_applied_to_picture_and_size(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    path = tmp_path / "turned"
    path.write_bytes(encode(rgb(), kind, exif=exif, **options))
    with Image.open(path) as image:
        from PIL import ImageOps

        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    read = read_image(path)
    assert read.shape == expected.shape and image_size(path) == expected.shape[:2]
    assert np.abs(read.astype(int) - expected).mean() < 1


def test_header_behind_a_long_profile(tmp_path):
    path = tmp_path / "profile.jpg"
    path.write_bytes(encode(rgb(), "JPEG", icc_profile=bytes(200_000)))
    assert image_size(path) == (48, 64)


def test_reduced_jpeg():
    data = encode(Image.fromarray(picture(49, 65)), "JPEG")
    assert decode_image(data, reduce=2).shape == (25, 33, 3)
    assert decode_image(data, reduce=8).shape == (7, 9, 3)
    assert decode_image(encode(rgb(), "PNG"), reduce=2).shape == (48, 64, 3)


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_that_ends_too_early_is_read_as_far_as_it_goes(progressive):
    whole = encode(Image.fromarray(picture(480, 640)), "JPEG", quality=90, progressive=progressive)
    full = decode_image(whole)
    assert missing_share(whole) is None and missing_share(whole + bytes(500)) is None
    short = whole[:-2]
    assert missing_share(short) == 0 and np.array_equal(decode_image(short), full)
    half = whole[: len(whole) // 2]
    image = decode_image(half)
    assert image.shape == full.shape
    if not progressive:
        share = missing_share(half)
        assert 0.2 < share < 0.8
        kept = int(480 * (1 - share)) - 32
        assert np.array_equal(image[:kept], full[:kept])


def png_claiming(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return head + encode(rgb(), "PNG")[33:]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"\0" * 100, "not an image"),
        (b"<html>not found</html>", "not an image"),
        (b"\xff\xd8\xff", "header"),
        (b"\xff\xd8\xff\xe0\x00\x02\xff\xd9", "header"),
        (b"\x89PNG\r\n\x1a\n", "header"),
        (b"II*\0\xff\xff\xff\x7f", "header"),
        (b"GIF89a", "header"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "header"),
        (b"BM" + b"\xff" * 60, "header"),
        (b"P6 9999999999 9999999999 255\n", "PNM|bomb|pixels"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "HEIC"),
        (b"8BPS" + bytes(40), "PSD"),
        (png_claiming(0, 5), "no pixels"),
        (png_claiming(20001, 20001), "pixels"),
        (png_claiming(9000, 9000), "bomb"),
        (png_claiming(65, 48), "decode"),
        (encode(rgb(), "PNG")[:200], "decode"),
        (encode(rgb(), "TIFF")[:200], "decode"),
        (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, data, word):
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=word) as error:
        read_image(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, UserError)


def test_pixel_limit_is_decided_from_the_header():
    with pytest.raises(ImageError, match=f"{MAX_PIXELS:,}"):
        decode_image(png_claiming(40_000, 40_000))


@pytest.mark.parametrize("thing", ["folder", "pipe", "missing", "dangling", "/dev/zero"])
def test_only_regular_files_are_opened(tmp_path, thing):
    path = tmp_path / "x.jpg"
    if thing == "folder":
        path.mkdir()
    elif thing == "pipe":
        os.mkfifo(path)
    elif thing == "dangling":
        path.symlink_to(tmp_path / "nothing")
    elif thing == "/dev/zero":
        path.symlink_to(thing)
    for function in (read_image, image_size):
        with pytest.raises(ImageError, match="cannot be read"):
            function(path)


def test_huge_sparse_file_is_refused_unread(tmp_path):
    path = tmp_path / "sparse.jpg"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ImageError):
        read_image(path)


def test_random_bytes_after_any_magic_never_surprise():
    rng = np.random.default_rng(0)
    magics = [b"\xff\xd8\xff\xe1", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"P6 ", b"II+\0"]
    for _ in range(300):
        data = magics[rng.integers(len(magics))] + rng.bytes(int(rng.integers(0, 120)))
        assert sniff(data[:32])
        with contextlib.suppress(ImageError):
            decode_image(data)


def test_flipped_bytes_of_real_files_never_surprise():
    rng = np.random.default_rng(1)
    files = [encode(rgb(), kind) for kind in ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF")]
    for _ in range(240):
        data = bytearray(files[rng.integers(len(files))])
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            image = decode_image(bytes(data))
        except ImageError:
            continue
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


@pytest.mark.skipif(not features.check("avif"), reason="needs Pillow with AVIF")
def test_a_damaged_avif_is_an_image_error(tmp_path):
    ramp = (np.indices((300, 400)).sum(0) % 256).astype(np.uint8)
    Image.fromarray(ramp).convert("RGB").save(tmp_path / "a.avif")
    data = bytearray((tmp_path / "a.avif").read_bytes())
    data[len(data) // 3 : 2 * len(data) // 3] = bytes(2 * len(data) // 3 - len(data) // 3)
    (tmp_path / "a.avif").write_bytes(data)
    with pytest.raises(ImageError, match=r"a\.avif cannot be decoded"):
        read_image(tmp_path / "a.avif")


def test_size_of_every_shared_picture_equals_pillow(shared_data):
    paths = sorted((shared_data / "coco128" / "images").rglob("*.jpg"))
    assert len(paths) == 128
    for path in paths:
        with Image.open(path) as image:
            assert image_size(path) == image.size[::-1]
        assert image_header(path).complete
