"""What an evaluation leaves behind: the table and the speed line, metrics.json, per_class.csv, and its figures."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.files import atomic_write
from utils.engine.evaluation.coco_eval import TABLE
from utils.engine.evaluation.validate import EvalResult
from utils.engine.figures.plots import plot_confusion, plot_curves
from utils.ops.boxes import xyxy_to_cxcywh

NAME_WIDTH = 22
MANY_CLASSES = 50


def table(metrics: Mapping[str, Any], *, per_class: bool = True) -> str:
    """The numbers as text: header, row `all`, and a row per class that has objects or is asked for."""
    extra = [key for key in metrics if key.startswith("AP") and key not in TABLE and key != "AP"]
    columns = [*TABLE, *extra]
    lines = [f"{'Class':>{NAME_WIDTH}}{'Images':>9}{'Instances':>11}" + "".join(f"{c:>9}" for c in columns)]
    rows = [{**metrics, "name": "all"}]
    if per_class and len(metrics["per_class"]) > 1:
        rows += [row for row in metrics["per_class"] if row["instances"]]
    for row in rows:
        name = str(row["name"])
        name = name if len(name) < NAME_WIDTH else name[: NAME_WIDTH - 2] + "…"
        numbers = "".join(f"{shown(row.get(c)):>9}" for c in columns)
        lines.append(f"{name:>{NAME_WIDTH}}{row['images']:>9}{row['instances']:>11}{numbers}")
    return "\n".join(lines)


def summary(metrics: Mapping[str, Any], pr_iou: float) -> str:
    """What the table has no column for: where P and R are read, F1, and the average recalls."""
    recalls = ", ".join(f"{key} {shown(value)}" for key, value in metrics.items() if key.startswith("AR"))
    where = f"confidence {metrics['confidence']:.3f} and IoU {pr_iou:g}"
    return f"F1 {shown(metrics['F1'])} at {where}, where P and R are read too; {recalls}"


def shown(value: float | None, digits: int = 3) -> str:
    """A number for people; `-` where there was nothing to measure."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def plain(value: Any) -> Any:
    """NaN and infinity as None, tuples as lists, numpy numbers as Python's: what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as strict JSON."""
    with atomic_write(path, "w") as file:
        json.dump(plain(value), file, indent=1, allow_nan=False, ensure_ascii=False)
        file.write("\n")
    return Path(path)


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> Path:
    """A table; cells without a value (None, NaN) are empty."""
    with atomic_write(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(plain(list(row)) for row in rows)
    return Path(path)


def write_metrics(folder: str | Path, result: EvalResult, settings: Mapping[str, Any]) -> Path:
    """metrics.json: all numbers (null where undefined), the speed, and the settings that gave them."""
    content = {**result.metrics, "speed_ms": result.speed_ms}
    if result.loss:
        content["loss"] = result.loss
    return write_json(Path(folder) / "metrics.json", {**content, "settings": settings})


def write_per_class(folder: str | Path, metrics: Mapping[str, Any]) -> Path:
    """per_class.csv: a row per class, empty cells where undefined."""
    rows = metrics["per_class"]
    header = list(rows[0]) if rows else ["id", "name"]
    return write_csv(Path(folder) / "per_class.csv", header, ([row[key] for key in header] for row in rows))


def write_confusion(folder: str | Path, matrix: np.ndarray, names: Sequence[str]) -> Path:
    """confusion_matrix.csv: the counts [nc + 1, nc + 1], row predicted, column true, `background` last."""
    labels = [*names, "background"]
    rows = ([label, *row] for label, row in zip(labels, matrix.tolist(), strict=True))
    return write_csv(Path(folder) / "confusion_matrix.csv", ["predicted \\ true", *labels], rows)


def write_report(
    folder: str | Path, result: EvalResult, settings: Mapping[str, Any], names: Sequence[str], *, figures: bool = True
) -> None:
    """Everything but the pictures of batches, into `folder`."""
    write_metrics(folder, result, settings)
    if not result.metrics:
        return
    write_per_class(folder, result.metrics)
    if result.confusion is not None:
        write_confusion(folder, result.confusion, names)
    if figures and result.curves is not None and result.confusion is not None:
        key = f"AP{100 * result.curves.iou:g}"
        plot_curves(result.curves, names, [row.get(key, math.nan) for row in result.metrics["per_class"]], folder)
        note = ""
        if "confusion_conf" in settings:
            note = f" (confidence from {settings['confusion_conf']:g}, IoU from {settings['confusion_iou']:g})"
        plot_confusion(result.confusion, names, folder, note)


def write_rows(
    folder: str | Path, rows: np.ndarray, stems: Sequence[str], shapes: np.ndarray, *, with_conf: bool
) -> Path:
    """A text file per image with detections: `class cx cy w h [confidence]`, normalized, as YOLO labels are.

    rows: [k, 7] image number, x1, y1, x2, y2 in source pixels, confidence, class; shapes: [n, 2] height and width.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for image, stem in enumerate(stems):
        mine = rows[rows[:, 0] == image]
        if not len(mine):
            (folder / f"{stem}.txt").unlink(missing_ok=True)  # of an earlier run into the same folder
            continue
        height, width = (float(v) for v in shapes[image])
        boxes = xyxy_to_cxcywh(mine[:, 1:5].astype(np.float64)) / np.array([width, height, width, height])
        lines = []
        for (cx, cy, w, h), conf, cls in zip(boxes, mine[:, 5], mine[:, 6], strict=True):
            extra = f" {conf:g}" if with_conf else ""
            lines.append(f"{int(cls)} {cx:g} {cy:g} {w:g} {h:g}{extra}\n")
        (folder / f"{stem}.txt").write_text("".join(lines), encoding="utf-8")
    return folder
