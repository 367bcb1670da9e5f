"""Run the benchmarks and keep the last line of each, with commit and hardware, for the results page.

python -m experiments.bench [NAME ...]        (what `make bench` runs; default: all that can run here)
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import ledger
from experiments.bench_tables import TABLES
from experiments.plans import ROOT, command, data_root, relative
from utils.core.config import run_cli
from utils.core.errors import UserError
from utils.core.files import atomic_write, nearest
from utils.core.log import LOGGER

RECORD = ROOT / "experiments" / "benchmarks.jsonl"
COCO_MODELS = [f"yolov5{kind}{size}" for size in "nsml" for kind in ("", "-spd-")]
COCO_COST = "--variants bf16 --imgsz 640 --batch-size 4 --rounds 3 --steps 1"


def program(name: str) -> str:
    """The file of a benchmark; `coco_cost` is `train_step` with other arguments."""
    return f"benchmarks/{'train_step' if name == 'coco_cost' else name}.py"


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
    LOGGER.info(f"== {command(program(name), args)}")
    lines, commit = [], ledger.commit()
    with subprocess.Popen(
        [sys.executable, program(name), *args], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise UserError(f"{program(name)} ended with code {process.returncode}")
    device = "" if name == "slices" else "cpu"  # the others run on the CPU unless told otherwise
    facts = {"commit": commit, "finished": time.strftime("%Y-%m-%d %H:%M"), "hardware": ledger.hardware(device)}
    facts |= {"software": ledger.software(), "command": command(program(name), args)}
    return {**json.loads(lines[-1]), "benchmark": name, **facts}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The recorded results by benchmark."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["benchmark"]: row for row in rows}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: names of benchmarks, or nothing for all."""
    names = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(names):
        print(f"{__doc__}\nnames: {' '.join(TABLES)}")
        return 0
    for name in names:
        if name not in TABLES:
            raise UserError(f"no benchmark '{name}'{nearest(name, TABLES)}; there are {', '.join(TABLES)}")
    for name in names or TABLES:
        found = measure(name)
        if found is not None:
            with atomic_write(RECORD, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in {**read(RECORD), name: found}.values())
    return 0


if __name__ == "__main__":
    run_cli(main)
