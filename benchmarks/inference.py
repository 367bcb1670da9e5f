"""Latency of one image on the CPU: the published layout against this project's deployment, in every backend.

The published layout is eager PyTorch as the authors' code runs it for inference: batch normalization folded, SPD as
four slices and a concatenation, contiguous memory. Each candidate has a process of its own, as in use, so that none
lives in the memory that another has touched. They take turns in rounds, so that other load on the machine meets all
alike; a candidate's time is the median of its rounds' medians. The last line is JSON.

python benchmarks/inference.py --models yolov5-spd-n yolov5-spd-s --rounds 7
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from models import DetectionModel, build_model
from models.backends import FORMATS, load_predictor
from models.backends.base import Metadata
from models.backends.graph import ExportJob
from models.backends.pictures import choose
from models.backends.pytorch import PyTorchPredictor
from models.folding import fold_batch_norms
from models.fusion import fuse
from models.spd import SPD
from utils.core.device import select_device

BASELINE = "published layout"
IN_PYTORCH = {BASELINE: False, "PyTorch": False, "PyTorch bf16": True}  # title -> in half precision
PRECISIONS = {"onnx": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8")}


class SlicedSPD(nn.Module):
    """SPD as the authors run it: four strided slices in their block order, concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)


def published_layout(model: DetectionModel) -> Callable[[Tensor], Tensor]:
    """Folds batch normalization, replaces SPD by slices and keeps memory contiguous."""
    model = model.eval().requires_grad_(False)
    fold_batch_norms(model)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, SPD):
                setattr(module, name, SlicedSPD())

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        return model.predict(images)

    return run


def fresh(name: str, seed: int = 0) -> DetectionModel:
    """A network with random weights and plausible statistics; latency does not depend on their values."""
    torch.manual_seed(seed)
    model = build_model(name)
    assert isinstance(model, DetectionModel)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@dataclass(frozen=True)
class Candidate:
    """One way to run a model: the baseline, a checkpoint in PyTorch (no `path`), or an exported file."""

    model: str
    title: str
    imgsz: int
    threads: int
    half: bool = False
    path: Path | None = None

    def open(self) -> Callable[[Tensor], Any]:
        """What maps images to predictions, in this process."""
        torch.set_num_threads(self.threads)
        model = fresh(self.model)
        if self.title == BASELINE:
            return published_layout(model)
        device = select_device("cpu")
        if self.path is not None:
            return load_predictor(self.path, device=device, half=self.half)
        names = [str(i) for i in range(model.nc)]
        return PyTorchPredictor(model, names, imgsz=self.imgsz, device=device, half=self.half)


def candidates(name: str, imgsz: int, threads: int, formats: Sequence[str], folder: Path) -> list[Candidate]:
    """Every way to run a model, the baseline first; exports the files that are not in `folder` yet."""
    model = fresh(name)
    names = tuple(str(i) for i in range(model.nc))
    ways = [Candidate(name, title, imgsz, threads, half) for title, half in IN_PYTORCH.items()]
    metadata = Metadata(names, (imgsz, imgsz), strides=tuple(model.strides), max_stride=model.max_stride)
    deployed = fuse(model)
    for fmt in formats:
        for precision in PRECISIONS.get(fmt, ("fp32",)):
            kind = "int8" if precision == "int8" else "fp32"
            path = folder / f"{name}-{kind}{FORMATS[fmt].suffix.rstrip('/')}"
            if not path.exists():
                facts = replace(metadata, precision=kind)
                calibration = choose(facts, count=2) if kind == "int8" else None
                FORMATS[fmt].load_module().export(ExportJob(deployed, facts, path, calibration=calibration))
            title = f"{FORMATS[fmt].title} {precision}"
            ways.append(Candidate(name, title, imgsz, threads, precision == "bf16", path))
    return ways


def serve(pipe: Connection, candidate: Candidate) -> None:
    """Of a candidate's process: open it, say what is wrong or None, answer each number of calls by their median."""
    images = torch.rand(1, 3, candidate.imgsz, candidate.imgsz, generator=torch.Generator().manual_seed(0))
    try:
        run = candidate.open()
    except ValueError as error:
        return pipe.send(str(error))
    pipe.send(None)
    while calls := pipe.recv():
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            run(images)
            times.append(1000 * (time.perf_counter() - start))
        pipe.send(statistics.median(times))


def measure(ways: Sequence[Candidate], rounds: int, calls: int) -> dict[tuple[str, str], float]:
    """Milliseconds per call by (model, title); a candidate that this machine cannot run is named and left out."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[tuple[str, str], Connection] = {}
    for way in ways:
        pipes[way.model, way.title], other = context.Pipe()
        context.Process(target=serve, args=(other, way), daemon=True).start()
        other.close()
    for (model, title), problem in [(key, pipe.recv()) for key, pipe in pipes.items()]:
        if problem is not None:
            print(f"{title}: {problem}")
            del pipes[model, title]
    medians: dict[tuple[str, str], list[float]] = {}
    for round_number in range(rounds + 1):  # the first round warms up
        for key, pipe in pipes.items():
            pipe.send(calls)
            median = pipe.recv()
            if round_number:
                medians.setdefault(key, []).append(median)
    for pipe in pipes.values():
        pipe.send(0)
    return {key: statistics.median(values) for key, values in medians.items()}


def table(name: str, times: dict[str, float], plain: dict[str, float]) -> str:
    """One model's rows: time, speed-up over the published layout, and SPD : plain YOLOv5 of the same size."""
    lines = [f"{name:<22}{'ms':>8}{'x faster':>10}{'SPD : plain':>16}"]
    for run, ms in times.items():
        ratio = f"{ms:.1f} : {plain[run]:.1f} = {ms / plain[run]:.2f}" if run in plain else ""
        lines.append(f"{run:<22}{ms:>8.1f}{times[BASELINE] / ms:>10.2f}{ratio:>24}")
    return "\n".join(lines)


@contextmanager
def working_folder(keep: str) -> Iterator[Path]:
    """The given folder, or a temporary one."""
    if keep:
        Path(keep).mkdir(parents=True, exist_ok=True)
        yield Path(keep)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def processor() -> dict[str, Any]:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    return {"cpu": fields.get("model name", "unknown"), "avx512_bf16": "avx512_bf16" in fields.get("flags", "")}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["yolov5-spd-n", "yolov5-spd-s"])
    parser.add_argument("--formats", nargs="*", default=["torch_export", "torchscript", "onnx", "openvino"])
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=5, help="runs of a candidate in each round")
    parser.add_argument("--no-plain", action="store_true", help="leave out plain YOLOv5 of the same size")
    parser.add_argument("--keep", default="", help="folder for the exported files; they are reused")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    machine = {**processor(), "threads": args.threads, "torch": torch.__version__, "imgsz": args.imgsz}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    result: dict[str, Any] = {"benchmark": "inference", "machine": machine, "ms": {}, "speedup": {}, "spd_to_plain": {}}
    with working_folder(args.keep) as folder:
        for name in args.models:
            ways = candidates(name, args.imgsz, args.threads, args.formats, folder)
            plain_name = name.replace("-spd", "").replace("conv", "").replace("yolov5-", "yolov5")
            if not args.no_plain and plain_name != name:
                ways += candidates(plain_name, args.imgsz, args.threads, args.formats, folder)
            times = measure(ways, args.rounds, args.calls)
            ms, plain = ({key: t for (n, key), t in times.items() if n == which} for which in (name, plain_name))
            plain = plain if plain_name != name else {}
            print(table(name, ms, plain), flush=True)
            result["ms"][name], result["ms"][plain_name] = ms, plain
            result["speedup"][name] = {key: ms[BASELINE] / value for key, value in ms.items()}
            result["spd_to_plain"][name] = {key: ms[key] / value for key, value in plain.items()}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
