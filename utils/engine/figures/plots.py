"""Figures: training curves, label statistics, precision-recall curves, confusion matrices. Drawn without a display."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.files import atomic_write
from utils.engine.figures.draw import color_of
from utils.ops.metrics import RECALLS, Curves

SIZE_TICKS = (2, 4, 8, 16, 32, 96, 256)
MAX_LEGEND = 20
MAX_TICKS = 60
WITH_BACKGROUND = ("true class (background: there is no object)", "predicted class (background: missed)")


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 6)) -> tuple[Any, Any]:
    """A matplotlib figure of its own (no global state, no display) and its array of axes [rows, columns]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns, squeeze=False)


def save(fig: Any, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure, whole or not at all. Dollar signs in names are what they are, not formulas."""
    from matplotlib.text import Text

    for text in fig.findobj(Text):
        if "$" in text.get_text() and "mathdefault" not in text.get_text():  # that is how axes write powers of ten
            text.set_parse_math(False)
    path = Path(path)
    with atomic_write(path) as file:
        fig.savefig(file, dpi=dpi, format=path.suffix.lstrip("."))
    return path


def legend_text(name: str) -> str:
    """The name as a legend shows it: matplotlib leaves out what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


def colors(n: int) -> list[tuple[float, ...]]:
    """The class colors of the pictures as RGB 0..1."""
    return [tuple(channel / 255 for channel in color_of(i)) for i in range(n)]


def plot_results(csv_path: str | Path, path: str | Path | None = None) -> Path:
    """`results.csv` as a grid of curves over the epochs -> results.png beside it. The learning rates share a panel."""
    from matplotlib.ticker import MaxNLocator

    csv_path = Path(csv_path)
    with open(csv_path, newline="", encoding="utf-8") as file:
        rows = [{k.strip(): v for k, v in row.items() if k} for row in csv.DictReader(file)]
    panels: dict[str, list[str]] = {}
    for name in rows[0] if rows else {}:
        if name != "epoch":
            panels.setdefault("x/lr" if name.startswith("x/lr") else name, []).append(name)
    epochs = [_number(row["epoch"]) for row in rows]
    columns = min(5, max(len(panels), 1))
    lines = max(-(-len(panels) // columns), 1)
    fig, axes = figure(lines, columns, (2.6 * columns, 2.1 * lines))
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            values = np.array([_number(row[name]) for row in rows])
            axis.plot(epochs, values, marker="." if len(rows) < 60 else None, linewidth=1.5, label=name)
        axis.set_title(title, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=6)
    return save(fig, path or csv_path.with_suffix(".png"))


def _number(text: str | None) -> float:
    """A cell as float; an empty or odd one is NaN and leaves a gap."""
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def plot_labels(cls: np.ndarray, boxes: np.ndarray, shapes: np.ndarray, names: Sequence[str], path: str | Path) -> Path:
    """Label statistics -> labels.jpg: objects per class, sizes, where they lie, and their outlines.

    cls: int[m]; boxes: float[m, 4] xyxy in source pixels; shapes: [m, 2] height and width of each box's image.
    """
    fig, axes = figure(2, 2, (11, 10))
    counts = np.bincount(np.asarray(cls, int), minlength=len(names))
    axes[0, 0].bar(range(len(counts)), counts, color=colors(len(counts)))
    axes[0, 0].set(title=f"{len(cls)} objects in {len(names)} classes", ylabel="objects")
    _class_ticks(axes[0, 0], names, "x")
    hw = np.maximum(np.asarray(shapes, np.float64).reshape(-1, 2), 1)
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    side = np.sqrt(np.maximum(width * height, 1e-6))
    axes[0, 1].hist(np.clip(side, 1, 2048), bins=np.geomspace(1, 2048, 67).tolist(), color="tab:blue")
    axes[0, 1].set(
        title="size: square root of the area", xlabel="pixels of the image file", ylabel="objects", xscale="log"
    )
    axes[0, 1].set_xticks(SIZE_TICKS, [str(t) for t in SIZE_TICKS])
    for edge in (32, 96):
        axes[0, 1].axvline(edge, color="tab:red", linewidth=1, linestyle="--")
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2 / hw[:, 1], (boxes[:, 1] + boxes[:, 3]) / 2 / hw[:, 0]
    axes[1, 0].hist2d(x, y, bins=50, range=[[0, 1], [0, 1]], cmap="Blues")
    axes[1, 0].invert_yaxis()
    axes[1, 0].set(title="centers", xlabel="x / image width", ylabel="y / image height")
    axes[1, 1].scatter(np.maximum(width, 0.5), np.maximum(height, 0.5), s=4, alpha=0.3, color="tab:blue", linewidths=0)
    largest = max(float(np.max(boxes, initial=1.0)), 10.0)
    limits = {"xlim": (0.4, largest), "ylim": (0.4, largest), "xscale": "log", "yscale": "log"}
    axes[1, 1].set(title="width and height", xlabel="width, px", ylabel="height, px", **limits)
    return save(fig, path, dpi=110)


def _class_ticks(axis: Any, names: Sequence[str], which: str) -> None:
    """Class names as ticks where they can be read."""
    if len(names) <= MAX_TICKS:
        size = 8 if len(names) <= 30 else 6
        setter = axis.set_xticks if which == "x" else axis.set_yticks
        setter(range(len(names)), list(names), rotation=90 if which == "x" and len(names) > 6 else 0, fontsize=size)


def plot_curves(curves: Curves, names: Sequence[str], ap: Sequence[float], folder: str | Path) -> list[Path]:
    """PR_curve.png, F1_curve.png, P_curve.png, R_curve.png; `ap` per class at the curves' IoU."""
    folder = Path(folder)
    at = f"{curves.confidence[curves.best]:.3f}"
    mean_ap = float(np.nanmean(ap)) if np.isfinite(ap).any() else float("nan")
    label = f"all classes, AP{100 * curves.iou:g} {mean_ap:.3f}"
    paths = [_curve(RECALLS, curves.pr, names, ("Recall", "Precision"), label, folder / "PR_curve.png", values=ap)]
    for letter, name, table in (
        ("F1", "F1", curves.f1),
        ("P", "Precision", curves.precision),
        ("R", "Recall", curves.recall),
    ):
        mean = _column_mean(table)
        value = mean[curves.best] if len(mean) else float("nan")
        text = f"all classes, {value:.3f} at {at}"
        paths.append(
            _curve(curves.confidence, table, names, ("Confidence", name), text, folder / f"{letter}_curve.png")
        )
    return paths


def _column_mean(table: np.ndarray) -> np.ndarray:
    """Mean over the classes of every column, NaN where no class is defined."""
    defined = np.isfinite(table)
    count = defined.sum(0)
    total = np.where(defined, table, 0.0).sum(0)
    return np.divide(total, count, out=np.full(table.shape[1], np.nan), where=count > 0)


def _curve(
    x: np.ndarray,
    table: np.ndarray,
    names: Sequence[str],
    axes_names: tuple[str, str],
    label: str,
    path: Path,
    values: Sequence[float] | None = None,
) -> Path:
    """One line per class and a bold one for their mean."""
    fig, axes = figure(size=(9, 6))
    axis = axes[0, 0]
    present = [c for c in range(len(table)) if np.isfinite(table[c]).any()]
    shades = colors(len(names))
    for c in present:
        few = len(present) <= MAX_LEGEND
        text = names[c] if values is None else f"{names[c]} {values[c]:.3f}"
        color, text = (shades[c], legend_text(text)) if few else ("0.85", None)
        axis.plot(x, table[c], linewidth=1, color=color, label=text)
    axis.plot(x, _column_mean(table), linewidth=3, color="tab:blue", label=label)
    axis.set(xlabel=axes_names[0], ylabel=axes_names[1], xlim=(0, 1), ylim=(0, 1.01))
    axis.grid(alpha=0.3)
    axis.legend(loc="best", fontsize=8)
    return save(fig, path)


def plot_confusion(matrix: np.ndarray, names: Sequence[str], folder: str | Path, note: str = "") -> list[Path]:
    """Confusion counts [nc + 1, nc + 1] (row predicted, column true) -> a picture of the counts, one of the shares.

    The normalized picture divides each column by the number of its objects; the column `background` (detections on
    nothing) is divided by the number of false positives, so that its entries say of which classes they are.
    """
    folder = Path(folder)
    labels = [*names, "background"]
    total = matrix.sum(0, keepdims=True)
    share = np.divide(matrix, total, out=np.zeros(matrix.shape), where=total > 0)
    return [
        heat(matrix, labels, "counts" + note, folder / "confusion_matrix.png", "{:.0f}", WITH_BACKGROUND),
        heat(
            share,
            labels,
            "share of each column" + note,
            folder / "confusion_matrix_normalized.png",
            "{:.2f}",
            WITH_BACKGROUND,
        ),
    ]


def heat(
    values: np.ndarray, labels: Sequence[str], title: str, path: Path, form: str, axis_labels: tuple[str, str]
) -> Path:
    """A labeled matrix, row against column; numbers are written where there is room for them."""
    n = len(labels)
    side = float(np.clip(0.45 * n + 3, 6, 22))
    fig, axes = figure(size=(side, side))
    axis = axes[0, 0]
    shown = np.where(values > 0, values, np.nan)
    image = axis.imshow(shown, cmap="Blues", vmin=0)
    fig.colorbar(image, ax=axis, shrink=0.8, fraction=0.03)
    axis.set(title=title, xlabel=axis_labels[0], ylabel=axis_labels[1])
    size = 8 if n <= 30 else 5
    axis.set_xticks(range(n), labels, rotation=90, fontsize=size)
    axis.set_yticks(range(n), labels, fontsize=size)
    if n <= 31:
        half = np.nanmax(shown) / 2 if np.isfinite(shown).any() else 0
        for row, column in zip(*np.nonzero(values), strict=True):
            value = values[row, column]
            shade = "white" if value > half else "black"
            axis.text(column, row, form.format(value), ha="center", va="center", fontsize=7, color=shade)
    return save(fig, path, dpi=120)
