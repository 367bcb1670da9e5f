"""The record of what was run: CSV files to which each finished run is appended at once, and never changed."""

import csv
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.plans import ROOT
from utils.core.errors import UserError

RESULTS = ROOT / "experiments" / "results.csv"
DIFFERENCES = ROOT / "experiments" / "differences.csv"
METRICS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "precision", "recall", "f1", "top1", "top5")
IN_METRICS_JSON = {"precision": "P", "recall": "R", "f1": "F1"}  # the others are called the same
RESULT_COLUMNS = (
    "experiment", "run", "model", "seed", "imgsz", "epochs", *METRICS, "parameters", "gflops", "train_minutes",
    "commit", "finished", "hardware", "software", "command",
)  # fmt: skip
DIFFERENCE_COLUMNS = (
    "experiment", "a", "b", "seed", "metric", "a_value", "b_value", "difference", "low", "high", "commit", "finished",
)  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    """All rows of a CSV; none when it does not exist yet."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, columns: tuple[str, ...], row: Mapping[str, Any]) -> None:
    """Add a row and flush it to the disk; a file of other columns is refused rather than mixed."""
    new = not path.is_file() or path.stat().st_size == 0
    if not new:
        with open(path, newline="", encoding="utf-8") as file:
            head = next(csv.reader(file), [])
        if tuple(head) != columns:
            raise UserError(f"{path} has other columns than this version writes; move it away or convert it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({key: shown(value) for key, value in row.items()})
        file.flush()
        os.fsync(file.fileno())


def shown(value: Any) -> str:
    """Numbers with six significant digits; an undefined one is empty."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return str(value)


WRITTEN = ("experiments/*.csv", "experiments/*.jsonl", "docs", "README.md")  # by the experiments themselves


def commit() -> str:
    """The commit of the working tree, with + where it has changes beside the record and the pages made from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "--short=10", "HEAD")
    changed = git("status", "--porcelain", "--", ".", *(f":!{path}" for path in WRITTEN))
    return f"{head}{'+' if changed else ''}" if head else "unknown"


def hardware(device: str = "") -> str:
    """What a run with this --device ran on: the GPU, else processor and cores."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


def software() -> str:
    """What the numbers may depend on."""
    import torch

    return f"Python {platform.python_version()}, torch {torch.__version__}"
