"""What a hyper-parameter search needs beside its sampler: the space, a trial as a training run, and the picture."""

import csv
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.core.errors import UserError
from utils.core.files import nearest
from utils.core.hyp import HYP_KEYS
from utils.core.interrupts import StopRequest
from utils.core.yamls import load_yaml
from utils.ops.metrics import fitness

POLL_SECONDS = 0.2  # between two looks at a training run
AP50, AP = "metrics/mAP_0.5", "metrics/mAP_0.5:0.95"


@dataclass(frozen=True)
class Range:
    """One searched hyper-parameter: either `values`, or low to high with `steps` points when used as a grid."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    steps: int = 5
    values: tuple[float, ...] = ()

    def grid(self) -> list[float]:
        """The values of the random grid."""
        if self.values:
            return list(self.values)
        parts = [i / (self.steps - 1) for i in range(self.steps)]
        if self.log:
            return [_tidy(self.low * (self.high / self.low) ** part) for part in parts]
        return [_tidy(self.low + (self.high - self.low) * part) for part in parts]


def _tidy(value: float) -> float:
    return float(f"{value:.4g}")


def load_space(path: str | Path) -> dict[str, Range]:
    """Read a space YAML: `key: [values]` or `key: {low: , high: , log: , steps: }`."""
    space = {}
    for key, entry in load_yaml(path).items():
        if key not in HYP_KEYS:
            raise UserError(f"{path}: unknown hyper-parameter '{key}'{nearest(str(key), HYP_KEYS)}")
        space[key] = _range(f"{path}: {key}", entry)
    if not space:
        raise UserError(f"{path}: no hyper-parameter to search; expected lines such as lr0: {{low: 0.001, high: 0.1}}")
    return space


def _range(where: str, entry: Any) -> Range:
    numbers = entry if isinstance(entry, list) else list(entry.values()) if isinstance(entry, dict) else None
    if not numbers or not all(isinstance(number, (int, float)) for number in numbers):
        raise UserError(f"{where} is {entry!r}; expected a list of numbers, or low and high")
    if isinstance(entry, list):
        return Range(values=tuple(float(value) for value in entry))
    unknown = set(entry) - {"low", "high", "log", "steps"}
    if unknown or not {"low", "high"} <= set(entry):
        raise UserError(f"{where} has the keys {', '.join(map(str, entry))}; expected low, high, and maybe log, steps")
    found = Range(float(entry["low"]), float(entry["high"]), bool(entry.get("log")), int(entry.get("steps", 5)))
    if not found.low < found.high or found.steps < 2 or (found.log and found.low <= 0):
        raise UserError(f"{where}: expected low < high (above 0 with log) and at least 2 steps, got {entry}")
    return found


def epoch_values(results: Path, metric: str) -> list[float]:
    """The metric of each finished epoch in a results.csv; `fitness` is 0.1 AP50 + 0.9 AP, or top-1 of a classifier."""
    if not results.is_file():
        return []
    with open(results, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    values = []
    for row in rows:
        if metric == "fitness" and row.get(AP):
            value = fitness(float(row[AP50]), float(row[AP]))
        elif metric == "fitness":
            value = float(row.get("metrics/accuracy_top1") or "nan")
        elif f"metrics/{metric}" in row:
            value = float(row[f"metrics/{metric}"] or "nan")
        else:
            have = [name.removeprefix("metrics/") for name in row if name.startswith("metrics/")]
            raise UserError(f"--metric {metric} is not in {results}; expected fitness, {', '.join(have)}")
        values.append(value if math.isfinite(value) else 0.0)
    return values


class TrainingRun:
    """A training run as a child process that can be watched epoch by epoch and ended early."""

    def __init__(self, command: Sequence[str], folder: Path, metric: str) -> None:
        self.folder, self.metric = folder, metric
        folder.mkdir(parents=True, exist_ok=True)
        self.log = open(folder / "train.log", "ab")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            list(command), stdout=self.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )

    def epochs(self, stop: StopRequest) -> Iterator[tuple[int, float]]:
        """(epoch, metric) as epochs finish, until the process ends; KeyboardInterrupt when a stop is requested."""
        seen = 0
        while True:
            stop.check()
            ended = self.process.poll() is not None
            values = epoch_values(self.folder / "results.csv", self.metric)
            yield from enumerate(values[seen:], start=seen)
            seen = max(seen, len(values))
            if ended:
                return
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """End the process and its children: first politely, which lets it write a checkpoint."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                pass
            finally:  # an impatient second interrupt too
                if self.process.poll() is None:
                    os.killpg(self.process.pid, signal.SIGKILL)
                    self.process.wait()
        self.log.close()

    def problem(self) -> str:
        """The last line of the log when the run has failed, else an empty string."""
        if self.process.returncode in (0, None):
            return ""
        lines = (self.folder / "train.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self.process.returncode}"


def plot_parallel(
    rows: Sequence[tuple[Mapping[str, float], float]], names: Sequence[str], metric: str, path: Path
) -> None:
    """Parallel coordinates: one line per trial over its hyper-parameters to its metric, the best ones bright."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    axes = [*names, metric]
    columns = [[float(params[name]) for params, _ in rows] for name in names] + [[value for _, value in rows]]
    heights = [_scaled(column) for column in columns]
    figure = Figure(figsize=(1.6 + 1.25 * len(axes), 4.8), layout="constrained")
    plot = figure.add_subplot()
    order = sorted(range(len(rows)), key=lambda i: rows[i][1])
    lines = [[(x, heights[x][i]) for x in range(len(axes))] for i in order]
    bundle = LineCollection(lines, cmap="viridis", linewidths=[0.8 + 1.6 * heights[-1][i] for i in order], alpha=0.85)
    bundle.set_array([rows[i][1] for i in order])
    plot.add_collection(bundle)
    for x, column in enumerate(columns):
        plot.axvline(x, color="0.6", linewidth=0.8, zorder=0)
        for y, value in ((0.0, min(column)), (1.0, max(column))):
            plot.annotate(f"{value:.3g}", (x, y), (3, -11 if y == 0 else 4), textcoords="offset points", fontsize=8)
    plot.set(xlim=(-0.2, len(axes) - 0.6), ylim=(-0.08, 1.08), yticks=[], xticks=range(len(axes)))
    plot.set_xticklabels(axes, rotation=20, ha="right")
    plot.spines[:].set_visible(False)
    figure.colorbar(bundle, ax=plot, label=metric, pad=0.02)
    figure.savefig(path, dpi=130)


def _scaled(column: Sequence[float]) -> list[float]:
    """0 to 1, on a logarithmic scale where the values span more than a factor of 20."""
    low, high = min(column), max(column)
    if low > 0 and high / low > 20:
        return _scaled([math.log(value) for value in column])
    return [(value - low) / (high - low) if high > low else 0.5 for value in column]
