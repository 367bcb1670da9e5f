"""Pictures of colored squares, and a predictor that finds them without learning: evaluation is tested on both."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch

from utils.core.yamls import dump_yaml

NAMES = ("red", "green", "blue")


def draw(rng: np.random.Generator, hw: tuple[int, int], count: int, sides=(6, 40)) -> tuple[np.ndarray, list]:
    """A dark picture with `count` squares that do not touch -> RGB, rows (class, x1, y1, x2, y2)."""
    image = rng.integers(20, 60, (*hw, 1), np.uint8).repeat(3, 2)
    taken = np.zeros(hw, bool)
    rows: list = []
    for _ in range(50 * count):
        if len(rows) == count:
            break
        side = int(rng.integers(sides[0], sides[1] + 1))
        x, y = int(rng.integers(0, hw[1] - side + 1)), int(rng.integers(0, hw[0] - side + 1))
        if taken[max(y - 8, 0) : y + side + 8, max(x - 8, 0) : x + side + 8].any():
            continue
        taken[y : y + side, x : x + side] = True
        cls = int(rng.integers(0, 3))
        image[y : y + side, x : x + side] = 0
        image[y : y + side, x : x + side, cls] = 255
        rows.append((cls, x, y, x + side, y + side))
    return image, rows


def dataset(
    folder: Path, images: int = 6, hw: tuple[int, int] = (120, 160), count: int = 5, labels: bool = True
) -> Path:
    """A YOLO-txt data set of such pictures -> its YAML. The last picture has no squares."""
    rng = np.random.default_rng(0)
    for i in range(images):
        image, rows = draw(rng, hw, count if i < images - 1 else 0)
        path = folder / "images" / f"picture{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image[..., ::-1])
        if labels:
            lines = []
            for c, x1, y1, x2, y2 in rows:
                center = (x1 + x2) / 2 / hw[1], (y1 + y2) / 2 / hw[0]
                size = (x2 - x1) / hw[1], (y2 - y1) / hw[0]
                lines.append(f"{c} " + " ".join(f"{v:.9f}" for v in (*center, *size)))
            target = folder / "labels" / f"picture{i}.txt"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("\n".join(lines))
    dump_yaml(folder / "squares.yaml", {"path": ".", "train": "images", "val": "images", "names": list(NAMES)})
    return folder / "squares.yaml"


class SquareFinder:
    """A predictor: connected regions of one color become predictions; `blind` sides (in px) are not seen."""

    end2end, half, batch, task = False, False, None, "detect"

    def __init__(self, imgsz=(160, 160), fixed: bool = False, blind: float = 0.0):
        self.names, self.strides, self.device = list(NAMES), [8, 16, 32], torch.device("cpu")
        self.metadata = SimpleNamespace(imgsz=imgsz)
        self.imgsz = imgsz if fixed else None
        self.blind = blind

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        assert self.imgsz is None or tuple(images.shape[2:]) == self.imgsz
        out = torch.zeros(len(images), 100, 8)
        for b, image in enumerate(images.float().numpy()):
            n = 0
            for c in range(3):
                mask = image[c] - np.delete(image, c, 0).max(0) > 0.5
                _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
                for x, y, w, h, _area in stats[1:]:
                    if max(w, h) > self.blind and n < 100:
                        sure = 0.6 + 0.3 * min(w, h) / max(images.shape[2:])
                        out[b, n, :5] = torch.tensor([x + w / 2, y + h / 2, w, h, sure])
                        out[b, n, 5 + c] = 0.99
                        n += 1
        return out
