"""Beyond one number: how long an image takes (`--task speed`) and how AP follows the image size (`--task study`)."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.files import atomic_write
from utils.engine.evaluation.report import plain, shown
from utils.engine.figures.plots import figure, legend_text, save
from utils.engine.inference.predict import Detector
from utils.engine.speed import STAGES

PERCENTILES = (50, 90, 95, 99)
STUDY_COLUMNS = ("model", "imgsz", "AP", "AP50", "AP_S", "AP_M", "AP_L", *STAGES)


def latency(detector: Detector, images: Sequence[np.ndarray], *, warm_up: int = 10, runs: int = 100) -> dict[str, Any]:
    """Milliseconds of single images through `detector`, stage by stage: mean, min and PERCENTILES over `runs`.

    The images are decoded beforehand; pre-processing is letterbox, conversion and the way to the device.
    """
    assert images, "latency needs at least one image"
    for i in range(warm_up):
        detector([images[i % len(images)]])
    laps = []
    for i in range(runs):
        before = dict(detector.speed.seconds)
        detector([images[i % len(images)]])
        laps.append([detector.speed.seconds[stage] - before.get(stage, 0.0) for stage in STAGES])
    table = 1000 * np.array(laps)
    columns = {**dict(zip(STAGES, table.T, strict=True)), "total": table.sum(1)}
    result: dict[str, Any] = {name: _spread(values) for name, values in columns.items()}
    return {**result, "runs": runs, "warm_up": warm_up, "shape": list(detector.speed.shape)}


def _spread(values: np.ndarray) -> dict[str, float]:
    numbers = {"mean": float(values.mean()), "min": float(values.min())}
    return numbers | {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}


def latency_table(result: Mapping[str, Any]) -> str:
    """The latency as text, in ms per image."""
    keys = ["mean", "min", *(f"p{p}" for p in PERCENTILES)]
    lines = [f"{'ms per image':>14}" + "".join(f"{key:>9}" for key in keys)]
    for stage in (*STAGES, "total"):
        lines.append(f"{stage:>14}" + "".join(f"{result[stage][key]:>9.2f}" for key in keys))
    lines.append(
        f"batch 1 at shape {tuple(result['shape'])}, {result['runs']} runs after {result['warm_up']} to warm up"
    )
    return "\n".join(lines)


def study_row(model: str, imgsz: int, metrics: Mapping[str, Any], speed_ms: Mapping[str, float]) -> dict[str, Any]:
    """One measurement of a study."""
    numbers = {**metrics, **speed_ms}
    return {"model": model, "imgsz": imgsz, **{key: numbers.get(key) for key in STUDY_COLUMNS[2:]}}


def write_study(rows: Iterable[Mapping[str, Any]], folder: str | Path, *, figures: bool = True) -> list[Path]:
    """study.csv and study.png: AP and AP_S over the image size and over the time per image, a line per model."""
    rows = list(rows)
    folder = Path(folder)
    with atomic_write(folder / "study.csv", "w") as file:
        writer = csv.DictWriter(file, STUDY_COLUMNS)
        writer.writeheader()
        writer.writerows(plain(rows))
    if not figures:
        return [folder / "study.csv"]
    fig, axes = figure(1, 2, (12, 5))
    models = list(dict.fromkeys(row["model"] for row in rows))
    for number, model in enumerate(models):
        mine = [row for row in rows if row["model"] == model]
        color = f"C{number}"
        sizes = [row["imgsz"] for row in mine]
        times = [sum(row[stage] for stage in STAGES) for row in mine]
        for key, style, marker in (("AP", "-", "o"), ("AP_S", "--", "s")):
            values = [row[key] for row in mine]
            for axis, x in ((axes[0, 0], sizes), (axes[0, 1], times)):
                axis.plot(x, values, linestyle=style, marker=marker, color=color, label=legend_text(f"{model} {key}"))
    axes[0, 0].set(xlabel="image size, px", ylabel="AP, AP_S")
    axes[0, 1].set(xlabel="ms per image (pre-process, inference, NMS)", ylabel="AP, AP_S", xscale="log")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    return [folder / "study.csv", save(fig, folder / "study.png")]


def study_line(row: Mapping[str, Any]) -> str:
    """One measurement as text."""
    numbers = ", ".join(f"{key} {shown(row[key])}" for key in ("AP", "AP50", "AP_S", "AP_M", "AP_L"))
    total = sum(row[stage] for stage in STAGES)
    return f"{row['model']} at {row['imgsz']}: {numbers}, {total:.1f} ms per image"
