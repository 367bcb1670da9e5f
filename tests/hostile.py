"""A data set of everything that goes wrong: broken images, labels and names, each with what is expected of it."""

import io
import os
import socket
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

GOOD = b"0 0.5 0.5 0.5 0.5\n"
NAMES = ("first", "second")


@dataclass
class Kind:
    """One hostile thing: the image `name` with `image` and `label` content (None: no file)."""

    name: str | bytes
    image: bytes | None
    label: bytes | None = GOOD
    problem: str | None = None  # kind of problem expected; None: healthy, however odd
    on_label: bool = False  # whether the label file is to blame, not the image
    used: bool = True
    boxes: int = 1


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG file whose header claims any size."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rest = encode(Image.new("RGB", (8, 8)), "PNG")[33:]
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + rest


def flipped(data: bytes, at: float) -> bytes:
    """`data` with the byte at a share of its length inverted."""
    place = int(len(data) * at)
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


def images() -> list[Kind]:
    rng = np.random.default_rng(0)
    picture = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (96, 64), interpolation=cv2.INTER_CUBIC)
    rgb = Image.fromarray(picture)
    noise = Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    jpeg, png = encode(rgb, "JPEG", quality=90), encode(noise, "PNG")
    turned = Image.Exif()
    turned[274] = 6
    deep = cv2.imencode(".png", rng.integers(0, 65536, (64, 96), dtype=np.uint16))[1].tobytes()

    def bad(name: str, data: bytes | None, problem: str = "image-unreadable") -> Kind:
        return Kind(name, data, problem=problem, used=False)

    return [
        bad("empty.jpg", b""),
        bad("zeros.jpg", bytes(1000)),
        bad("page.jpg", b"<!DOCTYPE html><html>404 not found</html>"),
        bad("prose.png", b"this is a text file\n"),
        bad("magic.jpg", b"\xff\xd8\xff"),
        bad("no-frame.jpg", b"\xff\xd8\xff\xe0\x00\x04ab\xff\xd9"),
        bad("no-chunks.png", b"\x89PNG\r\n\x1a\n"),
        bad("no-screen.gif", b"GIF89a"),
        bad("no-directory.tif", b"II*\0\xff\xff\xff\x7f"),
        bad("short.webp", encode(rgb, "WEBP")[:24]),
        bad("short-bmp.bmp", encode(rgb, "BMP")[:20]),
        bad("cut.png", png[: len(png) // 2]),
        bad("cut-tiff.tif", encode(rgb, "TIFF")[:900]),
        bad("flipped.png", flipped(png, 0.5)),
        bad("lying.png", png_claiming(97, 64)),
        bad("flat.png", png_claiming(0, 64)),
        bad("bomb.png", png_claiming(15000, 15000)),
        bad("bigger-bomb.png", png_claiming(2**31 - 1, 2**31 - 1)),
        bad("phone.jpg", b"\0\0\0\x18ftypheic" + bytes(40)),
        bad("layers.jpg", b"8BPS\0\x01" + bytes(40)),
        bad("float.tif", encode(Image.fromarray(np.ones((20, 20), np.float32)), "TIFF")),
        bad("half.jpg", jpeg[: len(jpeg) // 2], "image-truncated"),
        Kind("almost.jpg", jpeg[:-2], problem="image-truncated"),
        Kind("png-inside.jpg", png, problem="image-misnamed"),
        Kind("jpeg-inside.png", jpeg, problem="image-misnamed"),
        Kind("dot.png", encode(Image.new("RGB", (1, 1)), "PNG"), problem="image-tiny"),
        bad("picture.dat", png, "image-suffix"),
        Kind("appended.jpg", jpeg + b"camera's own data" * 50),
        Kind("cmyk.jpg", encode(rgb.convert("CMYK"), "JPEG")),
        Kind("gray.jpg", encode(rgb.convert("L"), "JPEG")),
        Kind("progressive.jpg", encode(rgb, "JPEG", progressive=True)),
        Kind("turned.jpg", encode(rgb, "JPEG", exif=turned)),
        Kind("palette.png", encode(rgb.convert("P"), "PNG", transparency=0)),
        Kind("alpha.png", encode(rgb.convert("RGBA"), "PNG")),
        Kind("gray-alpha.png", encode(rgb.convert("LA"), "PNG")),
        Kind("bits.png", encode(rgb.convert("1"), "PNG")),
        Kind("deep.png", deep),
        Kind("moving.gif", encode(rgb.convert("P"), "GIF", save_all=True, append_images=[noise.convert("P")])),
        Kind("printed.tif", encode(rgb.convert("CMYK"), "TIFF", compression="tiff_lzw")),
        Kind(
            "pages.tif",
            encode(Image.new("RGB", (96, 64)), "TIFF", save_all=True, append_images=[Image.new("L", (9, 9))]),
        ),
        Kind("UPPER.JPG", jpeg),
        Kind("long-" + "n" * 240 + ".jpg", jpeg),
        Kind("Ünïcödé 火 🙂.jpg", jpeg),
        Kind("white space 'quoted' \"twice\" $(x) ; .jpg", jpeg),
        Kind("line\nbreak.jpg", jpeg),
        Kind(b"not-utf8-\xff\xfe.jpg", jpeg),
        Kind("-rf.jpg", jpeg),
        Kind("two.dots.jpg", jpeg),
    ]


def labels() -> list[Kind]:
    png = encode(Image.new("RGB", (96, 64), (90, 120, 30)), "PNG")

    def bad(name: str, lines: bytes, problem: str, **more) -> Kind:
        return Kind(name, png, GOOD + lines, problem, on_label=True, **more)

    return [
        bad("four-values.png", b"0 0.5 0.5 0.5\n", "label-format"),
        bad("six-values.png", b"0 0.5 0.5 0.5 0.5 0.9\n", "label-format"),
        bad("odd-polygon.png", b"0 0.1 0.1 0.2 0.1 0.2 0.2 0.1\n", "label-format"),
        bad("word.png", b"first 0.5 0.5 0.1 0.1\n", "label-format"),
        bad("commas.png", b"0,0.5,0.5,0.1,0.1\n", "label-format"),
        bad("decimal-commas.png", b"0 0,5 0,5 0,1 0,1\n", "label-format"),
        bad("comment.png", b"# drawn by hand\n", "label-format"),
        bad("nan.png", b"0 nan 0.5 0.1 0.1\n", "label-format"),
        bad("inf.png", b"0 0.5 0.5 inf 0.1\n", "label-format"),
        bad("overflow.png", b"0 0.5 0.5 1e999 0.1\n", "label-format"),
        bad("fraction.png", b"0.5 0.5 0.5 0.1 0.1\n", "label-format"),
        bad("underscore.png", b"0 0_5 0.5 0.1 0.1\n", "label-format"),
        bad("zero-byte.png", b"0 0.5\0 0.5 0.1 0.1\n", "label-format"),
        bad("endless-line.png", b"0 " + b"0.5 " * 100_001 + b"\n", "label-format"),
        bad("class-2.png", b"2 0.5 0.5 0.1 0.1\n", "label-class"),
        bad("class-minus.png", b"-1 0.5 0.5 0.1 0.1\n", "label-class"),
        bad("class-huge.png", b"99999999999999999999999 0.5 0.5 0.1 0.1\n", "label-class"),
        bad("pixels.png", b"0 48 32 20 20\n", "box-outside"),
        bad("outside.png", b"0 1.5 0.5 0.1 0.1\n", "box-outside"),
        bad("astronomic.png", b"0 1e300 1e300 1e300 1e300\n", "box-outside"),
        bad("no-width.png", b"0 0.5 0.5 0 0.1\n", "box-empty"),
        bad("negative.png", b"0 0.5 0.5 0.1 -0.1\n", "box-empty"),
        bad("line-polygon.png", b"0 0.1 0.1 0.2 0.1 0.3 0.1\n", "box-empty"),
        bad("over-the-edge.png", b"0 0.5 0.5 1.01 0.1\n", "box-overhang", boxes=2),
        bad("twice.png", b"0 0.50 0.5 0.5 0.5\n", "box-repeated"),
        Kind("binary.png", png, bytes(range(128, 256)), "label-unreadable", on_label=True, used=False),
        Kind("picture-as-label.png", png, png, "label-unreadable", on_label=True, used=False),
        Kind("bom.png", png, b"\xef\xbb\xbf" + GOOD),
        Kind("utf16.png", png, GOOD.decode().encode("utf-16")),
        Kind("windows.png", png, GOOD.replace(b"\n", b"\r\n\r\n")),
        Kind("old-mac.png", png, GOOD.replace(b"\n", b"\r") * 1 + b"1 0.2 0.2 0.1 0.1\r", boxes=2),
        Kind("tabs.png", png, GOOD.replace(b" ", b"\t ")),
        Kind("mixed.png", png, GOOD + b"1 0.1 0.1 0.2 0.1 0.2 0.3\n", boxes=2),
        Kind("blank.png", png, b"\n \n\n", boxes=0),
        Kind("no-byte.png", png, b"", boxes=0),
        Kind("no-file.png", png, None, boxes=0),
    ]


@dataclass
class Hostile:
    """What was written, and what is to be found."""

    yaml: Path
    kinds: int
    problems: set[tuple[str, str]]  # (kind, file)
    used: set[str]  # image files
    boxes: int


def build(root: Path) -> Hostile:
    """Write the data set under `root`, images in images/ and labels in labels/."""
    pictures, texts = root / "images", root / "labels"
    pictures.mkdir(parents=True)
    texts.mkdir()
    found = Hostile(root / "data.yaml", 0, set(), set(), 0)
    found.yaml.write_text(f"train: images\nnames: [{', '.join(NAMES)}]\n")
    for kind in [*images(), *labels()]:
        name = os.fsdecode(kind.name)
        image = os.path.join(pictures, name)
        label = os.path.join(texts, os.path.splitext(name)[0] + ".txt")
        for path, data in ((image, kind.image), (label, kind.label)):
            if data is not None:
                Path(path).write_bytes(data)
        expect(found, kind, image, label)
    special_files(found, pictures, texts)
    return found


def expect(found: Hostile, kind: Kind, image: str, label: str) -> None:
    found.kinds += 1
    if kind.problem:
        found.problems.add((kind.problem, label if kind.on_label else image))
    if kind.used:
        found.used.add(image)
        found.boxes += kind.boxes


def special_files(found: Hostile, pictures: Path, texts: Path) -> None:
    """Things that are no files: links, pipes, sockets, folders; a file of a terabyte; two images with one label."""
    png = encode(Image.new("RGB", (96, 64), (1, 2, 3)), "PNG")

    def add(name: str, problem: str | None, on_label: bool = False, used: bool = False, boxes: int = 1) -> None:
        label = str(texts / (os.path.splitext(name)[0] + ".txt"))
        expect(found, Kind(name, b"", b"", problem, on_label, used, boxes), str(pictures / name), label)

    os.mkfifo(pictures / "pipe.jpg")
    add("pipe.jpg", "image-unreadable")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(pictures)  # socket names are short
        server.bind("socket.jpg")
        os.chdir(here)
    add("socket.jpg", "image-unreadable")
    (pictures / "zero-device.jpg").symlink_to("/dev/zero")
    add("zero-device.jpg", "image-unreadable")
    (pictures / "dangling.jpg").symlink_to("nothing.jpg")
    add("dangling.jpg", "image-missing")
    (pictures / "itself.jpg").symlink_to("itself.jpg")
    add("itself.jpg", "image-unreadable")
    with open(pictures / "terabyte.jpg", "wb") as file:
        file.truncate(2**40)
    add("terabyte.jpg", "image-unreadable")
    (pictures / "folder.jpg").mkdir()
    (pictures / "folder.jpg" / "inside.png").write_bytes(png)
    add("folder.jpg/inside.png", None, used=True, boxes=0)
    (pictures / "circle").symlink_to(pictures)
    add("circle", "folder-repeated")
    (pictures / "chain").symlink_to("chain")
    add("chain", None)  # a link to itself without an image's suffix is passed over
    (pictures / ".hidden.jpg").write_bytes(b"")
    add(".hidden.jpg", None)
    (pictures / "notes.txt").write_text("not an image")
    add("notes.txt", None)
    for name in ("pipe", "folder", "dangling", "big"):
        (pictures / f"label-{name}.png").write_bytes(png)
        add(f"label-{name}.png", "label-unreadable", on_label=True)
    os.mkfifo(texts / "label-pipe.txt")
    (texts / "label-folder.txt").mkdir()
    (texts / "label-dangling.txt").symlink_to("nothing.txt")
    with open(texts / "label-big.txt", "wb") as file:
        file.truncate(2**32)
    for suffix in ("png", "webp"):
        (pictures / f"shared.{suffix}").write_bytes(encode(Image.new("RGB", (96, 64)), suffix))
        add(f"shared.{suffix}", "label-shared", on_label=True, used=True)
    (texts / "shared.txt").write_bytes(GOOD)
