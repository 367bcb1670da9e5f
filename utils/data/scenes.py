"""Drawn scenes: a small, deterministic data set of tiny objects seen from above, for the demo, tests and checks.

Cars, boats, planes and silos of mostly 4 to 24 px lie on textured, noisy, low-resolution ground with unlabeled clutter.
A scene is a pure function of (seed, stream, number), so the same pictures come out on every machine without a download.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.core.yamls import dump_yaml

NAMES = ("car", "boat", "plane", "silo")
LENGTHS = (1.25, 1.35, 1.0, 1.0)  # long and narrow things are drawn longer, so that all classes cover similar areas
SCALE = 4  # objects are drawn this many times larger and averaged down, which gives sub-pixel edges
_TRAIN, _VAL, _VIDEO, _SAMPLE = range(4)

Image = NDArray[np.uint8]
Floats = NDArray[np.float32]

_GROUNDS = np.array([[62, 96, 70], [120, 150, 165], [98, 98, 98], [128, 96, 52], [70, 92, 118]], np.float32)  # BGR
_BODIES = np.array(
    [[40, 40, 190], [190, 90, 30], [150, 60, 140], [40, 170, 220], [60, 140, 50], [30, 30, 30]], np.float32
)
# Outlines around the origin, long side 1, pointing along +x; one list of (polygon, shade) per class.
_HULL = [(-0.5, -0.2), (0.2, -0.2), (0.5, 0.0), (0.2, 0.2), (-0.5, 0.2)]
_WINGS = [(-0.05, -0.5), (0.12, -0.5), (0.2, 0.0), (0.12, 0.5), (-0.05, 0.5), (0.0, 0.0)]
_SHAPES: dict[str, list[tuple[list[tuple[float, float]], float]]] = {
    "car": [
        ([(-0.5, -0.27), (0.5, -0.27), (0.5, 0.27), (-0.5, 0.27)], 1.0),
        ([(0.08, -0.22), (0.26, -0.22), (0.26, 0.22), (0.08, 0.22)], 0.25),
    ],
    "boat": [(_HULL, 1.0), ([(-0.38, -0.1), (0.1, -0.1), (0.1, 0.1), (-0.38, 0.1)], 0.45)],
    "plane": [
        ([(-0.5, -0.06), (0.42, -0.06), (0.5, 0.0), (0.42, 0.06), (-0.5, 0.06)], 1.0),
        (_WINGS, 0.92),
        ([(-0.5, -0.2), (-0.38, -0.2), (-0.34, 0.2), (-0.5, 0.2)], 0.8),
    ],
    "silo": [],
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object: class number, center and long side in pixels, heading in radians, BGR color."""

    cls: int
    center: tuple[float, float]
    side: float
    angle: float
    color: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture (HWC uint8, BGR) and its objects (xyxy in pixels)."""

    image: Image
    cls: NDArray[np.int64]
    xyxy: Floats


def _noise(rng: np.random.Generator, hw: tuple[int, int], cells: int) -> Floats:
    """Smooth noise of mean 0 and deviation 1 with about `cells` bumps along the long side."""
    h, w = hw
    small = rng.standard_normal((max(h * cells // max(hw), 2), max(w * cells // max(hw), 2)), np.float32)
    return cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC).astype(np.float32, copy=False)


def draw_ground(rng: np.random.Generator, hw: tuple[int, int]) -> Floats:
    """Textured ground of two kinds with a road and unlabeled clutter, [H, W, 3] BGR as float."""
    h, w = hw
    first, second = _GROUNDS[rng.permutation(len(_GROUNDS))[:2]] + rng.normal(0, 8, (2, 3)).astype(np.float32)
    mask = np.clip(_noise(rng, hw, 3) * 4 + rng.uniform(-4, 4), 0, 1)[..., None]
    ground = first * mask + second * (1 - mask)
    texture = 6 * _noise(rng, hw, 8) + 5 * _noise(rng, hw, 24) + 5 * _noise(rng, hw, 64)
    ground = (ground + texture[..., None]).astype(np.float32)
    if rng.random() < 0.6:
        ends = rng.uniform(-0.2, 1.2, (2, 2)) * (w, h)
        a, b = (tuple(int(v) for v in end) for end in ends)
        cv2.line(ground, a, b, (88.0, 90.0, 92.0), int(rng.integers(6, 16)), cv2.LINE_AA)
    for _ in range(int(h * w / 25600 * rng.integers(4, 14))):
        center = rng.uniform(0, 1, 2) * (w, h)
        color = ground[int(center[1]), int(center[0])] + rng.normal(0, 28, 3)
        reach = rng.uniform(1, 7, 2) * (1, rng.uniform(0.2, 1))
        box = (center.tolist(), reach.tolist(), float(rng.uniform(0, 180)))
        cv2.ellipse(ground, box, [float(v) for v in color], -1, cv2.LINE_AA)
    return ground


def _paint(canvas: Floats, thing: Thing) -> Floats | None:
    """Draw one object onto `canvas` in place; returns its tight box clipped to the canvas, None if hardly visible."""
    h, w = canvas.shape[:2]
    half = int(np.ceil(thing.side * 0.75)) + 2
    x0, y0 = int(thing.center[0]) - half, int(thing.center[1]) - half
    size = 2 * half * SCALE
    layer = np.zeros((size, size, 4), np.float32)
    origin = (np.array(thing.center) - (x0, y0)) * SCALE
    length = thing.side * SCALE
    color = np.array(thing.color)
    turn = np.array([[np.cos(thing.angle), np.sin(thing.angle)], [-np.sin(thing.angle), np.cos(thing.angle)]])
    if NAMES[thing.cls] == "silo":
        center = tuple(int(round(v)) for v in origin)
        cv2.circle(layer, center, int(length / 2), (*(color * 0.8).tolist(), 1.0), -1)
        lit = tuple(int(round(v)) for v in origin - length * 0.1)
        cv2.circle(layer, lit, int(length * 0.28), (*np.minimum(color * 1.15, 255).tolist(), 1.0), -1)
    for outline, shade in _SHAPES[NAMES[thing.cls]]:
        points = np.array(outline) @ turn * length + origin
        cv2.fillPoly(layer, [np.round(points).astype(np.int32)], (*(color * shade).tolist(), 1.0))
    layer = cv2.resize(layer, (2 * half, 2 * half), interpolation=cv2.INTER_AREA)
    top, left, bottom, right = max(0, -y0), max(0, -x0), min(2 * half, h - y0), min(2 * half, w - x0)
    if top >= bottom or left >= right:
        return None
    shown = layer[top:bottom, left:right]
    alpha = shown[..., 3:]
    if alpha.sum() < 0.6 * layer[..., 3].sum():
        return None
    part = canvas[y0 + top : y0 + bottom, x0 + left : x0 + right]
    shadow = cv2.GaussianBlur(np.roll(shown[..., 3], (1, 1), (0, 1)), (0, 0), 0.8)[..., None]
    part *= 1 - 0.35 * shadow * (1 - alpha)
    part += shown[..., :3] - part * alpha
    ys, xs = np.nonzero(alpha[..., 0] > 0.25)
    if not len(xs):
        return None
    edges = np.array([xs.min() + left, ys.min() + top, xs.max() + left + 1, ys.max() + top + 1], np.float32)
    return edges + np.array([x0, y0, x0, y0], np.float32)


def _side(rng: np.random.Generator) -> float:
    """Long sides in pixels: most between 6 and 24, some medium, a few large."""
    draw = rng.random()
    low, high = (6, 24) if draw < 0.9 else (24, 56) if draw < 0.98 else (100, 130)
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def place_things(rng: np.random.Generator, hw: tuple[int, int], count: int) -> list[Thing]:
    """`count` objects (fewer where there is no room), large ones first, that do not cover each other."""
    things: list[Thing] = []
    for side in sorted((min(_side(rng), 0.9 * min(hw)) for _ in range(count)), reverse=True):
        cls = int(rng.integers(len(NAMES)))
        side = min(side * LENGTHS[cls], 0.9 * min(hw))
        color = _BODIES[rng.integers(len(_BODIES))] if cls == 0 else np.full(3, rng.uniform(190, 235))
        color = np.clip(color + rng.normal(0, 12, 3), 0, 255)
        for _ in range(20):
            center = rng.uniform(0, 1, 2) * (hw[1], hw[0])
            apart = [np.hypot(*(center - t.center)) > 0.55 * (side + t.side) for t in things]
            if all(apart):
                b, g, r = (float(v) for v in color)
                place = (float(center[0]), float(center[1]))
                things.append(Thing(cls, place, side, float(rng.uniform(0, 2 * np.pi)), (b, g, r)))
                break
    return things


def _expose(rng: np.random.Generator, canvas: Floats) -> Image:
    """A cheap camera: uneven light, slight blur, sensor noise."""
    h, w = canvas.shape[:2]
    light = 1 + 0.12 * _noise(rng, (h, w), 2)[..., None]
    blurred = cv2.GaussianBlur(canvas * light, (0, 0), float(rng.uniform(0.4, 0.8)))
    noise = rng.normal(0, rng.uniform(4, 11), canvas.shape) + rng.normal(0, 3, (h, w, 1))
    return np.clip(np.round(blurred + noise), 0, 255).astype(np.uint8)


def draw_scene(seed: int, number: int, hw: tuple[int, int] = (160, 160), stream: int = _SAMPLE) -> Scene:
    """Scene `number` of a stream: one in twenty is empty, the others hold 5 to 15 objects per 160 x 160 px."""
    rng = np.random.default_rng([seed, stream, number])
    canvas = draw_ground(rng, hw)
    density = hw[0] * hw[1] / 25600
    count = 0 if rng.random() < 0.05 else int(round(density * rng.integers(5, 16)))
    cls, boxes = [], []
    for thing in place_things(rng, hw, count):
        box = _paint(canvas, thing)
        if box is not None:
            cls.append(thing.cls)
            boxes.append(box)
    xyxy = np.array(boxes, np.float32).reshape(-1, 4)
    return Scene(_expose(rng, canvas), np.array(cls, np.int64), xyxy)


def draw_video(seed: int, frames: int, hw: tuple[int, int] = (240, 320)) -> Iterator[Image]:
    """Frames (HWC uint8, BGR) of objects that drive over a fixed ground and come back at the other side."""
    rng = np.random.default_rng([seed, _VIDEO, 0])
    ground = draw_ground(rng, hw)
    density = hw[0] * hw[1] / 25600
    things = [t for t in place_things(rng, hw, int(density * 7)) if t.side < 60]
    speeds = rng.uniform(0.3, 1.6, len(things))
    for number in range(frames):
        canvas = ground.copy()
        for thing, speed in zip(things, speeds, strict=True):
            moved = 0.0 if NAMES[thing.cls] == "silo" else number * speed
            x = (thing.center[0] + moved * np.cos(thing.angle)) % hw[1]
            y = (thing.center[1] + moved * np.sin(thing.angle)) % hw[0]
            _paint(canvas, dataclasses.replace(thing, center=(float(x), float(y))))
        yield _expose(np.random.default_rng([seed, _VIDEO, 1 + number]), canvas)


def label_rows(scene: Scene) -> str:
    """The scene's objects as YOLO rows: class, then center x, center y, width, height as fractions of the picture."""
    h, w = scene.image.shape[:2]
    rows = []
    for cls, (x1, y1, x2, y2) in zip(scene.cls, scene.xyxy, strict=True):
        rows.append(f"{cls} {(x1 + x2) / 2 / w:.6f} {(y1 + y2) / 2 / h:.6f} {(x2 - x1) / w:.6f} {(y2 - y1) / h:.6f}\n")
    return "".join(rows)


def write_dataset(root: str | Path, *, train: int = 320, val: int = 80, size: int = 160, seed: int = 0) -> Path:
    """Write images/{train,val}, labels/{train,val} and data.yaml (returned) under `root`; a finished set is kept.

    data.yaml is written last and records the settings, so an interrupted or different set is drawn anew.
    """
    root = Path(root)
    spec = root / "data.yaml"
    settings = (
        f"# {train} train, {val} val scenes of {size} px, seed {seed}, drawn by utils/data/scenes.py, version 3\n"
    )
    if spec.is_file() and spec.read_text(encoding="utf-8").startswith(settings):
        return spec
    spec.unlink(missing_ok=True)
    for split, count, stream in (("train", train, _TRAIN), ("val", val, _VAL)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
            for old in (root / kind / split).glob("[0-9]" * 5 + ".*"):
                old.unlink()
        for number in range(count):
            scene = draw_scene(seed, number, (size, size), stream)
            save_image(root / "images" / split / f"{number:05d}.png", scene.image)
            (root / "labels" / split / f"{number:05d}.txt").write_text(label_rows(scene), encoding="utf-8")
    dump_yaml(spec, {"path": ".", "train": "images/train", "val": "images/val", "names": list(NAMES)})
    text = spec.read_text(encoding="utf-8")
    with atomic_write(spec, "w") as file:
        file.write(settings + text)
    return spec


def save_image(path: Path, image: Image) -> None:
    """Write a picture (HWC uint8, BGR) in the format of the suffix."""
    ok, data = cv2.imencode(path.suffix, image)
    assert ok, path
    path.write_bytes(data.tobytes())


def write_video(path: str | Path, *, frames: int = 75, fps: float = 15.0, seed: int = 0) -> Path:
    """Write the moving scene as an mp4 video of 320 x 240 px."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (320, 240))
    if not writer.isOpened():
        raise UserError(f"cannot write the video '{path}': this OpenCV build has no mp4v encoder; reinstall it")
    for frame in draw_video(seed, frames):
        writer.write(frame)
    writer.release()
    return path


def write_class_folders(root: str | Path, *, train: int, val: int, size: int = 64, seed: int = 0) -> Path:
    """Write {train,val}/<class>/*.png under `root`: pictures of single objects, for classification."""
    root = Path(root)
    for split, count in (("train", train), ("val", val)):
        for cls, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                rng = np.random.default_rng([seed, _SAMPLE, _TRAIN if split == "train" else _VAL, cls, number])
                canvas = draw_ground(rng, (size, size))
                color = _BODIES[rng.integers(len(_BODIES))] if cls == 0 else np.full(3, rng.uniform(190, 235))
                b, g, r = (float(v) for v in color)
                center = (float(size * rng.uniform(0.4, 0.6)), float(size * rng.uniform(0.4, 0.6)))
                side = float(size * rng.uniform(0.3, 0.7))
                _paint(canvas, Thing(cls, center, side, float(rng.uniform(0, 2 * np.pi)), (b, g, r)))
                save_image(root / split / name / f"{number:05d}.png", _expose(rng, canvas))
    return root
