"""Evaluation of image classifiers: top-1, top-5, per class, confusion, and the pictures that two models disagree on."""

import csv
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.core.device import loader_workers
from utils.core.dist import Dist
from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.core.hyp import Hyp
from utils.data.folder import ClassDataset, ClassIndex, build_class_index, center_crop
from utils.data.loader import Batch, EvalLoader
from utils.data.spec import DataSpec
from utils.engine.evaluation.evaluate import EvalPlan, check_classes
from utils.engine.evaluation.report import write_json
from utils.engine.figures.pictures import mosaic, save_picture, titled
from utils.engine.figures.plots import figure, save
from utils.engine.inference.classifying import TOP, classifier_side
from utils.engine.speed import Clock, Speed

TILE = 96  # pixels of an image in pictures


@dataclass(frozen=True)
class ClassResult:
    """What a classifier says about a split, image by image in the order of the index.

    `top` int64 [n, k] are the k likeliest classes (k = 5, or all where there are fewer), `confidence` float32 [n, k]
    their probabilities, `labels` int64 [n]. `loss` is the mean cross-entropy without label smoothing.
    """

    labels: np.ndarray
    top: np.ndarray
    confidence: np.ndarray
    names: tuple[str, ...]
    loss: float
    speed_ms: dict[str, float]

    @property
    def right(self) -> np.ndarray:
        """Whether the likeliest class is the label, bool [n]."""
        return self.top[:, 0] == self.labels

    @property
    def metrics(self) -> dict[str, Any]:
        """top1, top5, loss, and per class its images, top1 and top5 (NaN for a class without images)."""
        hits = self.top == self.labels[:, None]
        per_class = []
        for number, name in enumerate(self.names):
            own = hits[self.labels == number]
            one, five = (
                (float(own[:, :1].any(1).mean()), float(own.any(1).mean())) if len(own) else (math.nan, math.nan)
            )
            per_class.append({"id": number, "name": name, "images": len(own), "top1": one, "top5": five})
        return {
            "top1": float(hits[:, 0].mean()),
            "top5": float(hits.any(1).mean()),
            "loss": self.loss,
            "images": len(hits),
            "per_class": per_class,
        }

    @property
    def confusion(self) -> np.ndarray:
        """Counts int64 [nc, nc], row predicted, column true."""
        matrix = np.zeros((len(self.names),) * 2, np.int64)
        np.add.at(matrix, (self.top[:, 0], self.labels), 1)
        return matrix


def measure(network: Callable[[Tensor], Tensor], loader: Iterable[Batch], index: ClassIndex, dist: Dist) -> ClassResult:
    """Run `network` (images 0..1 -> logits) over this rank's batches; every rank gets the whole result."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    speed = Speed()
    clock = Clock(speed, dist.device)
    for batch in loader:
        clock.start()
        x = batch.images.to(dist.device, non_blocking=True).float().div_(255)
        clock.lap("pre-process")
        with torch.no_grad():
            logits = network(x).float()
        probabilities = logits.softmax(1)
        confidence, top = probabilities.topk(min(TOP, probabilities.shape[1]), 1)
        labels = batch.targets[:, 1].long().to(logits.device)
        losses = F.cross_entropy(logits, labels, reduction="none")
        parts.append((batch.indices.numpy(), top.cpu().numpy(), confidence.cpu().numpy(), losses.cpu().numpy()))
        clock.lap("inference")
        speed.images += len(x)
    gathered = dist.gather(parts)
    together = None
    if gathered is not None:
        flat = [part for rank in gathered for part in rank]
        if not flat:
            raise UserError("the validation set has no images")
        columns = [np.concatenate(column) for column in zip(*flat, strict=True)]
        order = columns[0].argsort(kind="stable")
        together = [column[order] for column in columns]
    shared = dist.broadcast(together)
    assert shared is not None  # the main rank has them
    _, top, confidence, losses = shared
    return ClassResult(index.labels, top, confidence, index.names, float(losses.mean(dtype=np.float64)), speed.ms())


def validate_classifier(
    predictor: Any,
    spec: DataSpec,
    dist: Dist,
    *,
    split: str = "val",
    imgsz: Sequence[int] = (),
    batch_size: int = 32,
    workers: int = 0,
) -> tuple[ClassResult, ClassIndex]:
    """Measure any classifying predictor (a model file of any format) on a split of a data set."""
    index = dist.main_first(lambda: build_class_index(spec, split))
    check_classes(predictor, index.names, str(spec.yaml))
    EvalPlan(batch_size=batch_size, workers=workers)  # checks them
    dataset = ClassDataset(index, classifier_side(predictor, imgsz), Hyp(), augment=False)
    workers = loader_workers(workers, batch_size)
    loader = EvalLoader(dataset, batch_size, workers=workers, rank=dist.rank, world_size=dist.world_size)  # type: ignore[arg-type]
    try:
        return measure(predictor, loader, index, dist), index
    finally:
        loader.close()


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
    _write_csv(folder / "per_class.csv", list(metrics["per_class"][0]), [r.values() for r in metrics["per_class"]])
    header = ["image", "label", *(f"{what}{k + 1}" for k in range(result.top.shape[1]) for what in ("class", "prob"))]
    rows = []
    for i, (label, top, confidence) in enumerate(zip(result.labels, result.top, result.confidence, strict=True)):
        pairs = [v for c, p in zip(top, confidence, strict=True) for v in (result.names[c], f"{p:.4f}")]
        rows.append([index.title(i), result.names[label], *pairs])
    _write_csv(folder / "predictions.csv", header, rows)
    matrix = result.confusion
    names = list(result.names)
    table = [[name, *row] for name, row in zip(names, matrix.tolist(), strict=True)]
    _write_csv(folder / "confusion_matrix.csv", ["predicted \\ true", *names], table)
    if figures:
        plot_class_confusion(matrix, names, folder / "confusion_matrix.png")
        wrong = np.flatnonzero(~result.right)
        if len(wrong):
            sure = wrong[np.argsort(-result.confidence[wrong, 0], kind="stable")][:24]
            texts = [(names[result.labels[i]], [names[result.top[i, 0]]]) for i in sure]
            picture(index, sure, texts, folder / "wrong.jpg")


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    with atomic_write(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(["" if isinstance(v, float) and math.isnan(v) else v for v in row] for row in rows)


def plot_class_confusion(matrix: np.ndarray, names: Sequence[str], path: str | Path) -> Path:
    """Share of each true class (column) that was predicted as each class (row)."""
    share = matrix / np.maximum(matrix.sum(0, keepdims=True), 1)
    side = float(np.clip(0.3 * len(names) + 3, 5, 20))
    fig, axes = figure(size=(side, side))
    axis = axes[0, 0]
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    fig.colorbar(image, ax=axis, shrink=0.8, fraction=0.03)
    axis.set(title="share of each true class", xlabel="true class", ylabel="predicted class")
    if len(names) <= 60:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    if len(names) <= 20:
        for row, column in zip(*np.nonzero(share >= 0.005), strict=True):
            shade = "white" if share[row, column] > 0.5 else "black"
            axis.text(column, row, f"{share[row, column]:.2f}", ha="center", va="center", fontsize=6, color=shade)
    return save(fig, path, dpi=120)


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


def disagreements(a: ClassResult, b: ClassResult) -> dict[str, np.ndarray]:
    """Image numbers by who is right: `both`, `only_a`, `only_b`, `neither`; the last two sorted by b's confidence."""
    if not np.array_equal(a.labels, b.labels):
        raise UserError("the two results are of different images; measure both models on the same split")
    sure = np.argsort(-b.confidence[:, 0], kind="stable")
    return {
        "both": np.flatnonzero(a.right & b.right),
        "only_a": np.flatnonzero(a.right & ~b.right),
        "only_b": sure[(~a.right & b.right)[sure]],
        "neither": sure[(~a.right & ~b.right)[sure]],
    }


def sign_test(one: int, other: int) -> float:
    """Two-sided exact p-value of `one` against `other` images that only one of two models gets right (McNemar)."""
    n, low = one + other, min(one, other)
    tail = sum(math.comb(n, k) for k in range(low + 1))
    return min(1.0, float(2 * tail / 2**n)) if n else 1.0


def compare_classes(
    results: tuple[ClassResult, ClassResult],
    labels: Sequence[str],
    index: ClassIndex,
    folder: str | Path,
    most: int = 8,
) -> dict[str, Any]:
    """Two classifiers on the same images: accuracies, who is right where, and the paper's Fig. 7 both ways.

    The pictures show images that one model gets wrong and the other right, with the label above and both predictions
    below; those that the right (for `neither`: the second) model is surest of come first.
    """
    a, b = results
    found = disagreements(a, b)
    found["only_a"] = found["only_a"][np.argsort(-a.confidence[found["only_a"], 0], kind="stable")]
    pictures = []
    for key in ("only_a", "only_b"):
        chosen = found[key][:most]
        lines = [
            (a.names[a.labels[i]], [f"A: {a.names[a.top[i, 0]]}", f"B: {b.names[b.top[i, 0]]}"])
            for i in chosen.tolist()
        ]
        path = picture(index, chosen, lines, Path(folder) / f"{key}_right.jpg")
        pictures += [path.name] if path else []
    counts = {key: len(images) for key, images in found.items()}
    return {
        "A": {"name": labels[0], **a.metrics},
        "B": {"name": labels[1], **b.metrics},
        "images": counts,
        "p_value": sign_test(counts["only_a"], counts["only_b"]),
        "pictures": pictures,
    }


def comparison_lines(content: dict[str, Any]) -> str:
    """The console's table of `compare_classes`; of two paths, what follows the folders that they share."""
    sides = [content["A"], content["B"]]
    shared = os.path.commonprefix([side["name"] for side in sides]).rfind("/") + 1
    names = [f"{letter}: {side['name'][shared:]}" for letter, side in zip("AB", sides, strict=True)]
    width = max(22, *map(len, names))
    rows = [f"{'':>{width}}{'top1_acc':>11}{'top5_acc':>11}"]
    rows += [f"{n:>{width}}{s['top1']:>11.4f}{s['top5']:>11.4f}" for n, s in zip(names, sides, strict=True)]
    n = content["images"]
    rows.append(
        f"both right {n['both']}, only A {n['only_a']}, only B {n['only_b']}, neither {n['neither']}; "
        f"p = {content['p_value']:.3g} that the two single counts differ by chance (exact sign test)"
    )
    return "\n".join(rows)
