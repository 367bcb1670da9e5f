"""Small detection data sets for the tests of loading and augmentation."""

from pathlib import Path

import cv2
import numpy as np

from utils.core.yamls import dump_yaml
from utils.data.index import LabelIndex, build_index
from utils.data.spec import load_data

SIZES = ((120, 160), (160, 120), (97, 143), (200, 80), (300, 310))  # heights and widths, in turn


def picture(rng: np.random.Generator, hw: tuple[int, int]) -> np.ndarray:
    """A picture with soft and sharp structure, uint8 RGB."""
    noise = rng.normal(0, 1, (max(hw[0] // 8, 1), max(hw[1] // 8, 1), 3)).astype(np.float32)
    soft = cv2.resize(noise, hw[::-1], interpolation=cv2.INTER_CUBIC) * 40 + 120
    return np.clip(soft + rng.normal(0, 8, (*hw, 3)), 0, 255).astype(np.uint8)


def boxes(rng: np.random.Generator, hw: tuple[int, int], count: int) -> np.ndarray:
    """xyxy [count, 4] with sides of 4 px to half of the image."""
    size = np.exp(rng.uniform(np.log(4), np.log(np.array(hw[::-1]) / 2), (count, 2)))
    low = rng.random((count, 2)) * (np.array(hw[::-1]) - size)
    return np.concatenate([low, low + size], 1)


def make_index(
    folder: Path, count: int = 9, *, sizes=SIZES, objects: int = 6, polygons: bool = False, suffix: str = ".jpg"
) -> LabelIndex:
    """Write `count` pictures with labels (an ellipse in each box with `polygons`) and index them."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    for i in range(count):
        hw = sizes[i % len(sizes)]
        cv2.imwrite(str(folder / "images" / f"{i:03d}{suffix}"), picture(rng, hw)[..., ::-1])
        lines = []
        for box in boxes(rng, hw, objects):
            center, size = (box[:2] + box[2:]) / 2 / hw[::-1], (box[2:] - box[:2]) / hw[::-1]
            values = np.concatenate([center, size])
            if polygons:
                values = (center + size / 2 * np.stack([np.cos(turn), np.sin(turn)], 1)).reshape(-1)
            lines.append(f"{rng.integers(0, 3)} " + " ".join(f"{v:.8f}" for v in values))
        (folder / "labels" / f"{i:03d}.txt").write_text("\n".join(lines))
    dump_yaml(folder / "data.yaml", {"path": ".", "train": "images", "val": "images", "names": ["a", "b", "c"]})
    return build_index(load_data(folder / "data.yaml"), "train", workers=0)
