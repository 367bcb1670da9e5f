"""What networks cost beside each other: images a second in training, peak memory, and latency of one image.

    python benchmarks/costs.py [--models yolov5n yolov5-spd-n ...] [--imgsz 160 256] [--batch-size 8] [--rounds 9]

At each size all networks take turns, so that other load on the machine meets all alike; medians are reported. Training
is a step in this project's layout (forward, loss, backward, optimizer); inference is the deployed network in PyTorch
(BatchNorm and SPD folded), decoding included, NMS not. The last line is the result as JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.train_step import memory_of, stepper  # noqa: E402
from models import build_model  # noqa: E402
from models.backends.pytorch import PyTorchPredictor  # noqa: E402
from models.yolo import DetectionModel  # noqa: E402

MODELS = ("yolov5n", "yolov5-spd-n", "yolov5n-matched", "yolov5-spdconv-n", "yolov5n-p2")
SIZES = (160, 224, 256, 320, 352)
HEAD = ("model", "imgsz", "training images/s", "training peak MB", "inference ms")


def predictor(name: str, imgsz: int, device: torch.device) -> Callable[[int], Any]:
    """A function that runs the deployed network on one image."""
    model = build_model(name).eval()
    assert isinstance(model, DetectionModel)
    run = PyTorchPredictor(model, [str(i) for i in range(model.nc)], imgsz=imgsz, device=device)
    images = torch.rand(1, 3, imgsz, imgsz, generator=torch.Generator().manual_seed(0))
    return lambda _: run(images)


def medians(calls: Mapping[str, Callable[[int], Any]], rounds: int, repeats: int) -> dict[str, float]:
    """Seconds of each call, the median of all; the calls take turns, and a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            for i in range(repeats):
                start = time.perf_counter()
                call(i)
                if number:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--imgsz", type=int, nargs="+", default=SIZES)
    parser.add_argument("--batch-size", type=int, default=8, help="of the training step")
    parser.add_argument("--variant", choices=("fp32", "bf16"), default="bf16", help="precision of the training step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=5, help="images of a network in each round of the latency")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, batch = torch.device("cpu"), args.batch_size
    print(("{:18}" + "{:>20}" * 4).format(*HEAD))
    rows = []
    for size in args.imgsz:
        steps = {name: stepper(name, args.variant, batch, size, device) for name in args.models}
        training = medians(steps, args.rounds, 1)
        del steps
        latency = medians({name: predictor(name, size, device) for name in args.models}, args.rounds, args.calls)
        for name in args.models:
            memory = memory_of(name, args.variant, batch, size, device)
            row = (name, size, round(batch / training[name], 3), round(memory, 1), round(1000 * latency[name], 3))
            print("{:18}{:20}{:20.1f}{:20.0f}{:20.1f}".format(*row), flush=True)
            rows.append(dict(zip(("model", "imgsz", "images_per_second", "memory", "ms"), row, strict=True)))
    settings = {"batch_size": batch, "variant": args.variant, "threads": args.threads, "torch": torch.__version__}
    print(json.dumps({"benchmark": "costs", **settings, "rows": rows}))


if __name__ == "__main__":
    main()
