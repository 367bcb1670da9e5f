"""Run the benchmarks and keep the last line of each, with commit and hardware, for the results page.

python -m experiments.bench [NAME ...]        (what `make bench` runs; default: all that can run here)
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import ledger
from experiments.plans import ROOT, command, data_root, relative
from utils.core.config import run_cli
from utils.core.errors import UserError
from utils.core.files import atomic_write, nearest
from utils.core.log import LOGGER

RECORD = ROOT / "experiments" / "benchmarks.jsonl"
NAMES = ("train_step", "coco_cost", "inference", "loader", "loader_memory", "index", "slices")
COCO_MODELS = [f"yolov5{kind}{size}" for size in "nsml" for kind in ("", "-spd-")]
COCO_COST = "--variants bf16 --imgsz 640 --batch-size 4 --rounds 3 --steps 1"


def arguments(name: str) -> list[str] | None:
    """What a benchmark is called with; None where it needs data that is not here."""
    if name == "coco_cost":
        return ["--models", *COCO_MODELS, *COCO_COST.split()]
    if name != "slices":
        return []
    weights, data = data_root() / "weights" / "yolov5n.pt", data_root() / "coco-val200" / "coco-val200.yaml"
    if not (weights.is_file() and data.is_file()):
        return None
    return ["--weights", relative(weights), "--data", relative(data)]


def measure(name: str) -> dict[str, Any] | None:
    """The result of one benchmark with where it comes from; its table is shown while it runs."""
    args = arguments(name)
    if args is None:
        LOGGER.warning(f"{name}: skipped, needs the data sets of experiments/ (set YOLOV5_SPD_DATA)")
        return None
    program = f"benchmarks/{'train_step' if name == 'coco_cost' else name}.py"
    LOGGER.info(f"== {command(program, args)}")
    lines = []
    with subprocess.Popen([sys.executable, program, *args], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise UserError(f"{program} ended with code {process.returncode}")
    facts = {"commit": ledger.commit(), "finished": time.strftime("%Y-%m-%d %H:%M"), "hardware": ledger.hardware()}
    facts |= {"software": ledger.software(), "command": command(program, args)}
    return {**json.loads(lines[-1]), "benchmark": name, **facts}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The recorded results by benchmark."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["benchmark"]: row for row in rows}


def table(name: str, found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of one benchmark's table."""
    if name == "train_step":
        head = ["model", "layout", "images/s", "ratio", "peak MB"]
        return head, [
            [r["model"], r["variant"], f"{r['images_per_second']:.1f}", f"{r['ratio']:.2f}", f"{r['memory']:.0f}"]
            for r in found["results"]
        ]
    if name == "coco_cost":
        head = ["model", "images/s", "peak MB", "hours an epoch of COCO-2017"]
        return head, [
            [r["model"], f"{r['images_per_second']:.1f}", f"{r['memory']:.0f}", f"{r['epoch_hours']:.1f}"]
            for r in found["results"]
        ]
    if name == "inference":
        head = ["model", "backend", "ms", "times faster", "SPD : plain"]
        return head, [
            [model, backend, f"{found['ms'][model][backend]:.1f}", f"{ratio:.2f}",
             f"{found['spd_to_plain'][model][backend]:.2f}" if backend in found["spd_to_plain"][model] else "–"]
            for model, ratios in found["speedup"].items() for backend, ratio in ratios.items()
        ]  # fmt: skip
    if name == "loader":
        head = ["images", "classic, images/s", "ours, images/s", "ratio"]
        return head, [
            [kind, f"{r['classic']:.0f}", f"{r['fast']:.0f}", f"{r['ratio']:.2f}"]
            for kind, r in found["images_per_second"].items()
        ]
    if name == "loader_memory":
        head = ["MiB that a worker adds", *(f"epoch 3 / epoch 1, {kind}" for kind in found["growth"])]
        return head, [[f"{found['MiB a worker']:.0f}", *(f"{ratio:.3f}" for ratio in found["growth"].values())]]
    if name == "index":
        head = [f"{found['files']:,} label files", "seconds", "files/s"]
        return head, [[kind, f"{s:.1f}", f"{found['files'] / s:,.0f}"] for kind, s in found["seconds"].items()]
    head = ["slice", "recall at IoU 0.5", "AP50", "seconds"]
    return head, [
        [str(r["slice"] or "whole image"), f"{r['recall']:.3f}", f"{r['AP50']:.3f}", f"{r['seconds']:.0f}"]
        for r in found["rows"]
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: names of benchmarks, or nothing for all."""
    names = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(names):
        print(f"{__doc__}\nnames: {' '.join(NAMES)}")
        return 0
    for name in names:
        if name not in NAMES:
            raise UserError(f"no benchmark '{name}'{nearest(name, NAMES)}; there are {', '.join(NAMES)}")
    for name in names or NAMES:
        found = measure(name)
        if found is not None:
            with atomic_write(RECORD, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in {**read(RECORD), name: found}.values())
    return 0


if __name__ == "__main__":
    run_cli(main)
