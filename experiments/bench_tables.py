"""The recorded results of the benchmarks as tables: one function a benchmark, each -> (head, lines)."""

from collections.abc import Callable, Mapping
from typing import Any

Table = tuple[list[str], list[list[str]]]
Found = Mapping[str, Any]


def train_step(found: Found) -> Table:
    head = ["model", "layout", "images/s", "ratio", "peak MB"]
    return head, [
        [r["model"], r["variant"], f"{r['images_per_second']:.1f}", f"{r['ratio']:.2f}", f"{r['memory']:.0f}"]
        for r in found["results"]
    ]


def coco_cost(found: Found) -> Table:
    head = ["model", "images/s", "peak MB", "hours an epoch of COCO-2017"]
    return head, [
        [r["model"], f"{r['images_per_second']:.1f}", f"{r['memory']:.0f}", f"{r['epoch_hours']:.1f}"]
        for r in found["results"]
    ]


def costs(found: Found) -> Table:
    head = ["model", "imgsz", "training images/s", "training peak MB", "ms/image"]
    return head, [
        [r["model"], str(r["imgsz"]), f"{r['images_per_second']:.1f}", f"{r['memory']:.0f}", f"{r['ms']:.1f}"]
        for r in found["rows"]
    ]


def inference(found: Found) -> Table:
    head = ["model", "backend", "ms", "times faster", "SPD : plain"]
    return head, [
        [
            model,
            backend,
            f"{found['ms'][model][backend]:.1f}",
            f"{ratio:.2f}",
            f"{found['spd_to_plain'][model][backend]:.2f}" if backend in found["spd_to_plain"][model] else "–",
        ]
        for model, ratios in found["speedup"].items()
        for backend, ratio in ratios.items()
    ]


def loader(found: Found) -> Table:
    head = ["images", "classic, images/s", "ours, images/s", "ratio"]
    return head, [
        [kind, f"{r['classic']:.0f}", f"{r['fast']:.0f}", f"{r['ratio']:.2f}"]
        for kind, r in found["images_per_second"].items()
    ]


def loader_memory(found: Found) -> Table:
    head = ["MiB that a worker adds", *(f"epoch 3 / epoch 1, {kind}" for kind in found["growth"])]
    return head, [[f"{found['MiB a worker']:.0f}", *(f"{ratio:.3f}" for ratio in found["growth"].values())]]


def index(found: Found) -> Table:
    head = [f"{found['files']:,} label files", "seconds", "files/s"]
    return head, [[kind, f"{s:.1f}", f"{found['files'] / s:,.0f}"] for kind, s in found["seconds"].items()]


def slices(found: Found) -> Table:
    head = ["slice", "recall at IoU 0.5", "AP50", "seconds"]
    return head, [
        [str(r["slice"] or "whole image"), f"{r['recall']:.3f}", f"{r['AP50']:.3f}", f"{r['seconds']:.0f}"]
        for r in found["rows"]
    ]


def architectures(found: Found) -> Table:
    head = ["network", "image", "sites", "left alone", "parameters"]
    head += ["added by conv-spd", "difference", "added by spd-conv", "difference"]
    lines = []
    for r in found["rows"]:
        cells = [r["model"], "x".join(map(str, r["imgsz"])), str(r["sites"]), "; ".join(r["skipped"]) or "–"]
        cells.append(f"{r['parameters'] / 1e6:.2f} M")
        for variant in ("conv-spd", "spd-conv"):
            cells += [f"{r[variant]['added'] / 1e6:+.2f} M", f"{r[variant]['difference']:.0e}"]
        lines.append(cells)
    return head, lines


TABLES: dict[str, Callable[[Found], Table]] = {
    f.__name__: f
    for f in (train_step, coco_cost, costs, inference, loader, loader_memory, index, slices, architectures)
}  # by the name of the benchmark
