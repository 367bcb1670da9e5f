"""The figures of the results page, in the paper's manner."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, str]
SPD_COLOR, PLAIN_COLOR = "tab:green", "tab:gray"


def numbers(rows: Sequence[Row], column: str) -> list[float]:
    """The values of a column that are there."""
    return [float(row[column]) for row in rows if row.get(column)]


def main_metric(rows: Sequence[Row]) -> str:
    """What the figures show: AP_S, else AP, else top-1."""
    return next((m for m in ("AP_S", "AP", "top1") if numbers(rows, m)), "AP")


def _axes(width: float, count: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.4), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _color(name: str) -> str:
    return SPD_COLOR if "spd" in name else PLAIN_COLOR


def _short(name: str) -> str:
    return name.replace("yolov5", "v5")


def bars(runs: Mapping[str, Sequence[Row]], path: Path) -> Path:
    """Bars of AP_S (or top-1) by run, with a dot per seed: the paper's Fig. 1."""
    metric = main_metric([row for rows in runs.values() for row in rows])
    figure, (plot,) = _axes(max(4.0, 1.1 * len(runs) + 1))
    for x, (name, rows) in enumerate(runs.items()):
        values = numbers(rows, metric)
        plot.bar(x, statistics.fmean(values), color=_color(name), width=0.65)
        plot.scatter([x] * len(values), values, color="black", s=10, zorder=3)
    plot.set_xticks(range(len(runs)), [_short(name) for name in runs], rotation=20, ha="right", fontsize=8)
    plot.set_ylabel(metric)
    figure.savefig(path, dpi=120)
    return path


def accuracy_against(costs: Mapping[str, Mapping[str, float]], runs: Mapping[str, Sequence[Row]], path: Path) -> Path:
    """The same metric against what a run costs; one plot for each cost: {"GFLOPs": {run: value}}."""
    metric = main_metric([row for rows in runs.values() for row in rows])
    figure, plots = _axes(4.2 * len(costs), len(costs))
    for plot, (label, values) in zip(plots, costs.items(), strict=True):
        for name, value in values.items():
            place = value, statistics.fmean(numbers(runs[name], metric))
            plot.scatter(*place, color=_color(name), s=36)
            plot.annotate(_short(name), place, (4, 4), textcoords="offset points", fontsize=7)
        plot.set(xlabel=label, ylabel=metric)
        plot.margins(0.2)
        plot.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path
