"""Pictures of what the network sees and says: training batches, validation labels and predictions, comparisons."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from utils.core.files import atomic_write
from utils.engine.figures.draw import color_of, draw_box, draw_label, font_of
from utils.ops.boxes import cxcywh_to_xyxy
from utils.ops.letterbox import resize

PICTURE_SIDE = 1920
PICTURE_CONF = 0.25
MAX_IMAGES = 16
TEXT_PX = 10


def draw_boxes(image: np.ndarray, xyxy: np.ndarray, cls: np.ndarray, texts: Sequence[str] = ()) -> np.ndarray:
    """A copy of RGB `image` [H, W, 3] with boxes in the colors of their classes, and a text each where given."""
    return draw_boxes_in(image, xyxy, [color_of(int(c)) for c in cls], texts)


def draw_boxes_in(
    image: np.ndarray,
    xyxy: np.ndarray,
    shades: Sequence[tuple[int, int, int]],
    texts: Sequence[str] = (),
    line_width: int = 1,
) -> np.ndarray:
    """A copy of RGB `image` with boxes in given colors; an empty text is left away."""
    canvas = Image.fromarray(np.ascontiguousarray(image))
    draw = ImageDraw.Draw(canvas)
    usable = np.flatnonzero(np.isfinite(xyxy).all(1)).tolist()
    for i in usable:
        draw_box(draw, xyxy[i], shades[i], line_width)
    for i in usable:
        if len(texts) and texts[i]:
            draw_label(draw, xyxy[i], texts[i], shades[i], font_of(TEXT_PX))
    return np.asarray(canvas)


def save_picture(image: np.ndarray, path: str | Path, quality: int = 92) -> Path:
    """Write RGB [H, W, 3] as JPEG or PNG."""
    path = Path(path)
    with atomic_write(path) as file:
        if path.suffix.lower() == ".png":
            Image.fromarray(image).save(file, format="PNG")
        else:
            Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return path


def mosaic(images: Sequence[np.ndarray], columns: int | None = None, gap: int = 2) -> np.ndarray:
    """RGB pictures of one size in a grid, white in between."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    h, w = images[0].shape[:2]
    out = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        out[y : y + h, x : x + w] = image
    return out


def draw_batch(
    images: torch.Tensor, rows: Sequence[np.ndarray], names: Sequence[str], path: str | Path, titles: Sequence[str] = ()
) -> Path | None:
    """Up to 16 images uint8 [B, 3, H, W] with their boxes -> one picture.

    rows: per image float [n, 5 or 6] x1, y1, x2, y2 in network pixels, (confidence,) class. Nothing for an empty batch.
    """
    count = min(len(images), MAX_IMAGES)
    if not count:
        return None
    h, w = images.shape[-2:]
    columns = int(np.ceil(np.sqrt(count)))
    scale = min(PICTURE_SIDE / (columns * max(h, w)), 3.0)
    scale = float(int(scale)) if scale > 1 else scale
    tiles = []
    for i in range(count):
        image = images[i, :3].permute(1, 2, 0).cpu().numpy()
        image = np.repeat(image, 3, 2) if image.shape[2] == 1 else image
        if scale < 1:
            image = resize(image, (max(round(h * scale), 1), max(round(w * scale), 1)))
        elif scale > 1:  # whole pixels, so that small objects show as the network gets them
            image = image.repeat(int(scale), 0).repeat(int(scale), 1)
        table = np.asarray(rows[i], np.float64)
        cls = table[:, -1].astype(int)
        texts = [names[int(c)] if c < len(names) else str(c) for c in cls]
        if table.shape[1] == 6:
            texts = [f"{text} {conf:.2f}" for text, conf in zip(texts, table[:, 4], strict=True)]
        drawn = draw_boxes(image, table[:, :4] * scale, cls, texts)
        if i < len(titles):
            drawn = titled(drawn, titles[i])
        tiles.append(drawn)
    return save_picture(mosaic(tiles, columns), path)


def titled(image: np.ndarray, title: str, text_px: int = 12) -> np.ndarray:
    """A copy with `title` written in the upper left corner."""
    canvas = Image.fromarray(np.ascontiguousarray(image))
    draw_label(ImageDraw.Draw(canvas), np.zeros(4), title, (32, 32, 32), font_of(text_px))
    return np.asarray(canvas)


def target_rows(targets: torch.Tensor, batch: int, hw: tuple[int, int]) -> list[np.ndarray]:
    """Targets [M, 6] (image, class, cx, cy, w, h normalized) -> per image [n, 5] x1, y1, x2, y2 in pixels, class."""
    table = targets.cpu().numpy()
    boxes = cxcywh_to_xyxy(table[:, 2:6]) * np.array([hw[1], hw[0], hw[1], hw[0]], np.float32)
    rows = np.concatenate([boxes, table[:, 1:2]], 1)
    return [rows[table[:, 0] == i] for i in range(batch)]


def draw_train_batch(batch: Any, names: Sequence[str], path: str | Path) -> Path | None:
    """The images of a training batch with their targets, as the network gets them."""
    hw = (int(batch.images.shape[-2]), int(batch.images.shape[-1]))
    return draw_batch(batch.images, target_rows(batch.targets, len(batch.images), hw), names, path)


class BatchPictures:
    """`on_batch` of validation: `val_batch*_labels.jpg` and `val_batch*_pred.jpg` of the first batches."""

    def __init__(self, folder: str | Path, names: Sequence[str], limit: int = 3, confidence: float = PICTURE_CONF):
        self.folder = Path(folder)
        self.names = list(names)
        self.limit = limit
        self.confidence = confidence

    def __call__(self, number: int, batch: Any, detections: Sequence[torch.Tensor]) -> None:
        if number >= self.limit:
            return
        hw = (int(batch.images.shape[-2]), int(batch.images.shape[-1]))
        labels = target_rows(batch.targets, len(batch.images), hw)
        draw_batch(batch.images, labels, self.names, self.folder / f"val_batch{number}_labels.jpg")
        found = [d[d[:, 4] >= self.confidence].cpu().numpy() for d in detections]
        draw_batch(batch.images, found, self.names, self.folder / f"val_batch{number}_pred.jpg")
