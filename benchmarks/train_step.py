"""Images a second of a training step: forward, loss, backward, optimizer, against the plain eager layout in one run.

    python benchmarks/train_step.py [--models yolov5-spd-n yolov5-spd-s] [--imgsz 320] [--batch-size 8] [--rounds 9]

`plain` is what the published code does: contiguous maps, float32, SPD as four slices and a concatenation. Against it
stand this project's layout (channels_last) in float32 and under bfloat16 autocast. Rounds alternate between them, so
that a busy machine disturbs all alike; the medians are reported. First all take the same steps from the same weights,
and the largest relative difference of their losses is shown. Peak memory is measured in a process of its own for each.
`epoch, h` is what COCO-2017's 118,287 training images take at this rate, loading and validation left out.
The last line is the result as JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import build_model  # noqa: E402
from models.spd import SPD  # noqa: E402
from models.yolo import DetectionModel  # noqa: E402
from utils.core.hyp import Hyp  # noqa: E402
from utils.ops.loss import DetectionLoss  # noqa: E402

VARIANTS = ("plain", "fp32", "bf16")
BOXES_PER_IMAGE = 8
MEGABYTE = 1e6
COCO_IMAGES = 118_287  # of train2017


@dataclass(frozen=True)
class Result:
    """Of one variant of one network; `ratio` is its images/s over those of the first variant, `memory` peak MB."""

    model: str
    variant: str
    images_per_second: float
    ratio: float
    loss_difference: float
    memory: float
    epoch_hours: float


class SliceAndCat(nn.Module):
    """SPD of scale 2 as published: four strided slices, concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., r::2, c::2] for c in (0, 1) for r in (0, 1)], 1)


def build(name: str, variant: str, device: torch.device) -> DetectionModel:
    """The network in the layout of the variant, always from the same weights."""
    torch.manual_seed(0)
    model = build_model(name).train().to(device)
    assert isinstance(model, DetectionModel)
    if variant != "plain":
        return model.to(memory_format=torch.channels_last)
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, SPD):
                parent.add_module(child_name, SliceAndCat())
    return model


def draw_batch(batch: int, imgsz: int, nc: int, seed: int) -> tuple[Tensor, Tensor]:
    """Smooth random images and small boxes, [B, 3, H, W] and [M, 6] (image, class, cx, cy, w, h)."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, imgsz // 8, imgsz // 8, generator=rng)
    images = nn.functional.interpolate(coarse, size=(imgsz, imgsz), mode="bilinear")
    count = batch * BOXES_PER_IMAGE
    image = torch.arange(batch).repeat_interleave(BOXES_PER_IMAGE)[:, None].float()
    classes = torch.randint(0, nc, (count, 1), generator=rng).float()
    centers = torch.rand(count, 2, generator=rng) * 0.8 + 0.1
    sizes = torch.rand(count, 2, generator=rng) * 0.1 + 0.02
    return images, torch.cat((image, classes, centers, sizes), 1)


def stepper(name: str, variant: str, batch: int, imgsz: int, device: torch.device) -> Callable[[int], float]:
    """A function that takes one training step on batch number `i` and gives its loss."""
    model = build(name, variant, device)
    loss_of = DetectionLoss(model.anchors, model.strides, model.nc, Hyp(), imgsz)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9, nesterov=True)
    layout = torch.contiguous_format if variant == "plain" else torch.channels_last
    batches = [draw_batch(batch, imgsz, model.nc, seed) for seed in range(2)]
    ready = [(images.to(device).contiguous(memory_format=layout), targets.to(device)) for images, targets in batches]

    def step(i: int) -> float:
        images, targets = ready[i % len(ready)]
        with torch.autocast(device.type, torch.bfloat16, enabled=variant == "bf16"):
            maps = model(images)
        loss = sum(loss_of(maps, targets).values(), torch.zeros((), device=device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def compare(
    name: str, variants: Sequence[str], batch: int, imgsz: int, rounds: int, steps: int, device: torch.device
) -> list[Result]:
    """Variants of one network, in alternation; the first is what the others are compared with."""
    first = variants[0]
    run = {variant: stepper(name, variant, batch, imgsz, device) for variant in variants}
    losses = {variant: [run[variant](i) for i in range(steps)] for variant in variants}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for i in range(rounds):
        for variant in variants:
            start = time.perf_counter()
            run[variant](i)
            times[variant].append(time.perf_counter() - start)
    speed = {variant: batch / statistics.median(times[variant]) for variant in variants}
    return [
        Result(
            model=name,
            variant=variant,
            images_per_second=speed[variant],
            ratio=speed[variant] / speed[first],
            loss_difference=max(abs(a - b) / abs(b) for a, b in zip(losses[variant], losses[first], strict=True)),
            memory=memory_of(name, variant, batch, imgsz, device),
            epoch_hours=COCO_IMAGES / speed[variant] / 3600,
        )
        for variant in variants
    ]


def memory_of(name: str, variant: str, batch: int, imgsz: int, device: torch.device) -> float:
    """Peak MB of two steps, in a fresh process: of the GPU, or resident beyond what the libraries take."""
    size = [f"--batch-size={batch}", f"--imgsz={imgsz}", f"--device={device}", f"--threads={torch.get_num_threads()}"]
    command = [sys.executable, __file__, "--models", name, "--memory", variant, *size]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_memory(name: str, variant: str, batch: int, imgsz: int, device: torch.device) -> float:
    """The same, measured in this process."""
    before = peak_resident()
    step = stepper(name, variant, batch, imgsz, device)
    for i in range(2):
        step(i)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / MEGABYTE
    return (peak_resident() - before) / MEGABYTE


def peak_resident() -> float:
    """Largest resident size so far of this process, in bytes (of Linux; `ru_maxrss` would begin with the parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("error: no VmHWM in /proc/self/status; peak memory can be measured on Linux only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["yolov5-spd-n", "yolov5-spd-s"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each variant")
    parser.add_argument("--steps", type=int, default=10, help="steps over which the losses are compared")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", choices=VARIANTS, help="print one variant's peak MB and end")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.memory:
        print(peak_memory(args.models[0], args.memory, args.batch_size, args.imgsz, device))
        return
    results = []
    print(f"{'model':16}{'variant':10}{'images/s':>10}{'ratio':>8}{'loss diff':>12}{'peak MB':>10}{'epoch, h':>10}")
    for name in args.models:
        for r in compare(name, args.variants, args.batch_size, args.imgsz, args.rounds, args.steps, device):
            row = f"{r.model:16}{r.variant:10}{r.images_per_second:10.1f}{r.ratio:8.2f}"
            print(f"{row}{r.loss_difference:12.1e}{r.memory:10.0f}{r.epoch_hours:10.2f}", flush=True)
            results.append({key: round(v, 6) if isinstance(v, float) else v for key, v in asdict(r).items()})
    settings = {"imgsz": args.imgsz, "batch_size": args.batch_size, "threads": args.threads, "device": args.device}
    print(json.dumps({"benchmark": "train_step", **settings, "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
