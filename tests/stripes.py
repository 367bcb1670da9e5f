"""A tiny data set of class folders: stripes, whose width is the class."""

from pathlib import Path

import cv2
import numpy as np

from utils.data.folder import ClassIndex


def stripes(number: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A picture whose class is the width of its stripes, with noise."""
    x = np.arange(size)[None, :] // (1 + 2 * number) % 2 * 120 + rng.integers(0, 80, (size, size))
    return np.repeat(x[..., None], 3, 2).astype(np.uint8)


def write(path: Path, image: np.ndarray) -> None:
    """An RGB picture as file, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])


def class_folders(root: Path) -> Path:
    """Three classes of stripes, 12 train and 6 val images each, 16 pixels; `root` again."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for number, name in enumerate(("narrow", "middle", "wide")):
            for i in range(count):
                write(root / split / name / f"{i}.png", stripes(number, 16, rng))
    return root


def ramp_index(n: int = 40, size: int = 12) -> ClassIndex:
    pixels = np.random.default_rng(3).integers(1, 256, (n, size, size, 3), dtype=np.uint8)
    return ClassIndex(np.arange(n) % 4, tuple("abcd"), pixels=pixels)
