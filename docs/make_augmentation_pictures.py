"""Draws docs/figures/augmentation.jpg: every augmentation on drawn scenes, with the boxes that go with it.

python docs/make_augmentation_pictures.py
"""

import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script beside the documentation, not a part of the program

from utils.core.hyp import Hyp  # noqa: E402
from utils.core.yamls import dump_yaml  # noqa: E402
from utils.data.dataset import DetectionDataset, Sample  # noqa: E402
from utils.data.index import build_index  # noqa: E402
from utils.data.spec import load_data  # noqa: E402
from utils.ops.boxes import cxcywh_to_xyxy  # noqa: E402

SIZE, CELL = 320, 240
SHAPES = {"triangle": 3, "square": 4, "hexagon": 6, "star": 10}
COLORS = ((235, 90, 70), (70, 170, 235), (240, 200, 60), (120, 210, 110))
STILL = Hyp(hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0, mosaic=0)
MOSAIC = STILL.replace(mosaic=1)
PANELS = (
    ("as it is", STILL),
    ("affine", STILL.replace(degrees=20, shear=8, scale=0.3, translate=0.1)),
    ("perspective", STILL.replace(perspective=0.0025)),
    ("hue, saturation, value", STILL.replace(hsv_h=0.1, hsv_s=0.7, hsv_v=0.4)),
    ("flips", STILL.replace(fliplr=1, flipud=1)),
    ("copy-paste (polygons)", STILL.replace(copy_paste=1)),
    ("mosaic of 4", MOSAIC.replace(scale=0.3)),
    ("mosaic of 9", MOSAIC.replace(mosaic9=1, scale=0.3)),
    ("mosaic, turned", MOSAIC.replace(degrees=25)),
    ("mixup", MOSAIC.replace(mixup=1)),
    ("cutmix", MOSAIC.replace(cutmix=1)),
    ("the default recipe", Hyp()),
)


def outline(sides: int, center: np.ndarray, radius: float, turn: float) -> np.ndarray:
    """Corners [sides, 2] of a regular polygon; ten of them make a star."""
    angles = turn + np.arange(sides) * 2 * np.pi / sides
    radii = np.where(np.arange(sides) % 2, 0.45, 1.0) if sides == 10 else np.ones(sides)
    return center + radius * radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def draw_scene(rng: np.random.Generator, hw: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    """A picture (BGR) with some shapes and its label lines, as polygons."""
    corners = rng.integers(60, 200, (3, 4, 3)).astype(np.float32)
    image = cv2.resize(corners, hw[::-1], interpolation=cv2.INTER_CUBIC)
    lines, taken = [], []
    for _ in range(12):
        cls = int(rng.integers(len(SHAPES)))
        radius = float(rng.uniform(14, 50))
        center = rng.uniform((radius, radius), np.array(hw[::-1]) - radius)
        if any(np.hypot(*(center - c)) < radius + r for c, r in taken):
            continue
        taken.append((center, radius))
        points = outline(list(SHAPES.values())[cls], center, radius, float(rng.uniform(0, 6)))
        color = COLORS[int(rng.integers(len(COLORS)))]
        cv2.fillPoly(image, [np.rint(points).astype(np.int32)], color, cv2.LINE_AA)
        lines.append(f"{cls} " + " ".join(f"{v:.5f}" for v in (points / hw[::-1]).reshape(-1)))
    noisy = image + rng.normal(0, 5, image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), lines


def write_scenes(folder: Path, count: int) -> Path:
    """A small data set; its YAML."""
    rng = np.random.default_rng(3)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for number in range(count):
        image, lines = draw_scene(rng, ((240, 320), (320, 320), (320, 220))[number % 3])
        cv2.imwrite(str(folder / "images" / f"{number}.png"), image)
        (folder / "labels" / f"{number}.txt").write_text("\n".join(lines))
    names = list(SHAPES)
    dump_yaml(folder / "data.yaml", {"path": ".", "train": "images", "val": "images", "names": names})
    return folder / "data.yaml"


def panel(sample: Sample, title: str) -> np.ndarray:
    """A sample with its boxes and a title, BGR."""
    image = cv2.resize(sample.image, (CELL, CELL), interpolation=cv2.INTER_AREA)[..., ::-1].copy()
    for cls, box in zip(sample.cls, cxcywh_to_xyxy(sample.cxcywh) * CELL, strict=True):
        x1, y1, x2, y2 = np.rint(box).astype(int).tolist()
        cv2.rectangle(image, (x1, y1), (x2, y2), COLORS[int(cls)][::-1], 3)
        cv2.rectangle(image, (x1, y1), (x2, y2), (255, 255, 255), 1)
    strip = np.full((22, CELL, 3), 255, np.uint8)
    cv2.putText(strip, title, (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return cv2.copyMakeBorder(np.vstack([strip, image]), 0, 4, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(load_data(write_scenes(Path(folder), 12)), "train", workers=0)
        panels = []
        for number, (title, hyp) in enumerate(PANELS):
            dataset = DetectionDataset(index, SIZE, hyp, augment=True, seed=4)
            position = 1 if hyp.mosaic == 0 else number
            panels.append(panel(dataset.sample(0, position, position), title))
    rows = [np.hstack(panels[start : start + 4]) for start in range(0, len(panels), 4)]
    target = ROOT / "docs" / "figures" / "augmentation.jpg"
    target.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(target), np.vstack(rows), [cv2.IMWRITE_JPEG_QUALITY, 76])
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
