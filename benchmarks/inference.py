"""Latency of one image on the CPU: the published layout against this project's deployment, in every backend.

The published layout is eager PyTorch as the authors' code runs it for inference: batch normalization folded, SPD as
four slices and a concatenation, contiguous memory. Runs are interleaved in rounds, so that other load on the machine
meets all candidates alike; a candidate's time is the median of its rounds' medians. The last line is JSON.

python benchmarks/inference.py --models yolov5-spd-n yolov5-spd-s --rounds 7
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from models import DetectionModel, build_model
from models.backends import FORMATS, load_predictor
from models.backends.base import Metadata
from models.backends.graph import ExportJob
from models.backends.pictures import choose
from models.backends.pytorch import PyTorchPredictor
from models.fusion import fold_batch_norms, fuse
from models.spd import SPD

Name = TypeVar("Name", str, tuple[str, str])
BASELINE = "published layout"
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


def candidates(name: str, imgsz: int, threads: int, formats: Sequence[str], folder: Path) -> dict[str, Callable]:
    """Every way to run a model, by name; the baseline first."""
    model = fresh(name)
    names = [str(i) for i in range(model.nc)]
    runs: dict[str, Callable] = {
        BASELINE: published_layout(fresh(name)),
        "PyTorch": PyTorchPredictor(model, names, imgsz=imgsz),
        "PyTorch bf16": PyTorchPredictor(model, names, imgsz=imgsz, half=True),
    }
    metadata = Metadata(tuple(names), (imgsz, imgsz), strides=tuple(model.strides), max_stride=model.max_stride)
    deployed = fuse(model)
    for fmt in formats:
        for precision in PRECISIONS.get(fmt, ("fp32",)):
            kind = "int8" if precision == "int8" else "fp32"
            path = folder / f"{name}-{kind}{FORMATS[fmt].suffix.rstrip('/')}"
            if not path.exists():
                facts = replace(metadata, precision=kind)
                calibration = choose(facts, count=2) if kind == "int8" else None
                FORMATS[fmt].load_module().export(ExportJob(deployed, facts, path, calibration=calibration))
            try:
                runs[f"{FORMATS[fmt].title} {precision}"] = load_predictor(path, half=precision == "bf16")
            except ValueError as error:
                print(f"{FORMATS[fmt].title} {precision}: {error}")
    return runs


def measure(runs: dict[Name, Callable], images: Tensor, rounds: int, calls: int) -> dict[Name, float]:
    """Milliseconds per call of each candidate, interleaved."""
    medians: dict[Name, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):  # the first round warms up
        for name, run in runs.items():
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                run(images)
                times.append(1000 * (time.perf_counter() - start))
            if round_number:
                medians[name].append(statistics.median(times))
    return {name: statistics.median(values) for name, values in medians.items()}


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
    images = torch.rand(1, 3, args.imgsz, args.imgsz, generator=torch.Generator().manual_seed(0))
    machine = {**processor(), "threads": args.threads, "torch": torch.__version__, "imgsz": args.imgsz}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    result: dict[str, Any] = {"benchmark": "inference", "machine": machine, "ms": {}, "speedup": {}, "spd_to_plain": {}}
    with working_folder(args.keep) as folder:
        for name in args.models:
            runs = candidates(name, args.imgsz, args.threads, args.formats, folder)
            plain_name = name.replace("-spd", "").replace("conv", "").replace("yolov5-", "yolov5")
            own = {(name, key): run for key, run in runs.items()}
            if not args.no_plain and plain_name != name:
                other = candidates(plain_name, args.imgsz, args.threads, args.formats, folder)
                own |= {(plain_name, key): run for key, run in other.items()}
            times = measure(own, images, args.rounds, args.calls)
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
