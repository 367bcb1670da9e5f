"""The picture of a data check: class counts, box sizes before and after resizing, and where the boxes lie."""

from pathlib import Path
from typing import Any

import numpy as np

from utils.core.files import atomic_write
from utils.data.check import EDGES, SHOWN_CLASSES, object_sizes
from utils.data.index import LabelIndex
from utils.data.problems import spelled_out


def draw_check(path: str | Path, indices: dict[str, LabelIndex], imgsz: int) -> None:
    """Write the picture as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 10), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _classes(axes[0, 0], indices)
    _sizes(axes[0, 1], indices, imgsz)
    split, index = next(iter(indices.items()))
    _centers(axes[1, 0], split, index)
    _shapes(axes[1, 1], split, index, imgsz)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _classes(axis: Any, indices: dict[str, LabelIndex]) -> None:
    names = [spelled_out(name)[:30].replace("$", r"\$") for name in next(iter(indices.values())).names[:SHOWN_CLASSES]]
    width = 0.8 / len(indices)
    for k, (split, index) in enumerate(indices.items()):
        counts = np.bincount(index.cls[~index.crowd], minlength=index.nc)[: len(names)]
        axis.bar(np.arange(len(names)) + (k + 0.5) * width - 0.4, counts, width, label=split)
    if len(names) <= 30:
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    else:
        axis.set_xlabel("class number")
    axis.set_ylabel("boxes")
    axis.set_title("class balance")
    axis.legend()


def _sizes(axis: Any, indices: dict[str, LabelIndex], imgsz: int) -> None:
    for k, (split, index) in enumerate(indices.items()):
        pairs = zip(("original", f"at {imgsz} px"), object_sizes(index, imgsz), ("--", "-"), strict=True)
        for label, sizes, style in pairs:
            size = np.sqrt(sizes.astype(np.float64).prod(1)).clip(0.5, 4096)
            axis.hist(
                size, np.geomspace(0.5, 4096, 53), histtype="step", ls=style, color=f"C{k}", label=f"{split}, {label}"
            )
    for edge in EDGES[1:4]:
        axis.axvline(edge, color="0.7", lw=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks([4**k for k in range(7)], [str(4**k) for k in range(7)])
    axis.set_xlabel("square root of box area, px (gray: 2, 4, 8)")
    axis.set_title("box sizes")
    axis.legend(fontsize=8)


def _centers(axis: Any, split: str, index: LabelIndex) -> None:
    keep = ~index.crowd
    centers = (index.boxes[keep, :2] + index.boxes[keep, 2:]) / 2 / index.shapes[index.image_of_box[keep]][:, ::-1]
    axis.hist2d(centers[:, 0], centers[:, 1], bins=50, range=((0, 1), (0, 1)), cmap="magma")
    axis.invert_yaxis()
    axis.set_title(f"centers of the boxes, {split}")
    axis.set_xlabel("x, share of the width")
    axis.set_ylabel("y, share of the height")


def _shapes(axis: Any, split: str, index: LabelIndex, imgsz: int) -> None:
    _, sizes = object_sizes(index, imgsz)
    logs = np.log2(sizes.clip(0.5, imgsz))
    top = np.log2(imgsz)
    axis.hist2d(logs[:, 0], logs[:, 1], bins=50, range=((-1, top), (-1, top)), cmap="magma")
    ticks = range(0, int(top) + 1, 2)
    axis.set_xticks(ticks, [str(2**t) for t in ticks])
    axis.set_yticks(ticks, [str(2**t) for t in ticks])
    axis.set_title(f"width and height at {imgsz} px, {split}")
    axis.set_xlabel("width, px")
    axis.set_ylabel("height, px")
