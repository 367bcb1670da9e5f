"""What is written and drawn of a classifier's evaluation: tables, predictions, confusion, pictures of its errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.data.folder import ClassIndex, center_crop
from utils.data.loader import Batch
from utils.engine.evaluation.classification import ClassResult
from utils.engine.evaluation.report import write_csv, write_json, write_per_class
from utils.engine.figures.pictures import mosaic, save_picture, titled
from utils.engine.figures.plots import heat

TILE = 96  # pixels of an image in pictures


def class_table(result: ClassResult, *, per_class: bool = True) -> str:
    """The numbers for the console, a row for all classes and one for each."""
    metrics = result.metrics
    lines = [f"{'Class':>22}{'Images':>11}{'top1_acc':>11}{'top5_acc':>11}"]
    lines.append(f"{'all':>22}{metrics['images']:>11}{metrics['top1']:>11.4f}{metrics['top5']:>11.4f}")
    for row in metrics["per_class"] if per_class else ():
        one, five = (f"{row[key]:>11.4f}" if row["images"] else f"{'-':>11}" for key in ("top1", "top5"))
        lines.append(f"{row['name'][:22]:>22}{row['images']:>11}{one}{five}")
    return "\n".join(lines)


def write_class_report(
    folder: str | Path, result: ClassResult, index: ClassIndex, settings: dict[str, Any], *, figures: bool = True
) -> None:
    """metrics.json, per_class.csv, predictions.csv, confusion_matrix.csv and pictures, into `folder`."""
    folder = Path(folder)
    metrics = result.metrics
    write_json(folder / "metrics.json", {**metrics, "speed_ms": result.speed_ms, "settings": settings})
    write_per_class(folder, metrics)
    header = ["image", "label", *(f"{what}{k + 1}" for k in range(result.top.shape[1]) for what in ("class", "prob"))]
    rows = []
    for i, (label, top, confidence) in enumerate(zip(result.labels, result.top, result.confidence, strict=True)):
        pairs = [v for c, p in zip(top, confidence, strict=True) for v in (result.names[c], f"{p:.4f}")]
        rows.append([index.title(i), result.names[label], *pairs])
    write_csv(folder / "predictions.csv", header, rows)
    matrix = result.confusion
    names = list(result.names)
    table = [[name, *row] for name, row in zip(names, matrix.tolist(), strict=True)]
    write_csv(folder / "confusion_matrix.csv", ["predicted \\ true", *names], table)
    if figures:
        share = matrix / np.maximum(matrix.sum(0, keepdims=True), 1)
        title, path = "share of each true class", folder / "confusion_matrix.png"
        heat(share, names, title, path, "{:.2f}", ("true class", "predicted class"))
        wrong = np.flatnonzero(~result.right)
        if len(wrong):
            sure = wrong[np.argsort(-result.confidence[wrong, 0], kind="stable")][:24]
            texts = [(names[result.labels[i]], [names[result.top[i, 0]]]) for i in sure]
            picture(index, sure, texts, folder / "wrong.jpg")


def picture(
    index: ClassIndex, images: Sequence[int] | np.ndarray, texts: Sequence[tuple[str, list[str]]], path: str | Path
) -> Path | None:
    """Images in a grid, each under its true class and above what was predicted."""
    tiles = []
    for i, (label, predicted) in zip(images, texts, strict=True):
        crop = center_crop(index.image(int(i)), TILE)
        strip = np.full((14, TILE, 3), 255, np.uint8)
        lines = [titled(strip, label[:16], 10), crop, *(titled(strip, text[:16], 10) for text in predicted)]
        tiles.append(np.concatenate(lines))
    return save_picture(mosaic(tiles, gap=6), path) if tiles else None


def draw_class_batch(batch: Batch, names: Sequence[str], path: str | Path) -> Path | None:
    """Up to 16 images of a training batch as the network gets them, with their labels."""
    tiles = []
    for image, label in zip(batch.images[:16], batch.targets[:16, 1].long().tolist(), strict=True):
        pixels = image.permute(1, 2, 0).numpy()
        gain = max(TILE // max(pixels.shape[:2]), 1)
        pixels = cv2.resize(pixels, None, fx=gain, fy=gain, interpolation=cv2.INTER_NEAREST)
        tiles.append(titled(np.ascontiguousarray(pixels), names[int(label)], 10))
    return save_picture(mosaic(tiles), path) if tiles else None
