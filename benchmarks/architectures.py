"""`replace_strides` on the architectures of torchvision and timm: sites, parameters, and the largest output difference.

    python benchmarks/architectures.py [--models resnet18 dla34]

Each network has random weights and random BatchNorm statistics; its outputs (of a detector: the backbone's maps) on one
image of an odd size are compared before and after, in float32, for both variants. A difference is divided by the
largest output. The last line is the result as JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.spd import replace_strides  # noqa: E402

VARIANTS = ("conv-spd", "spd-conv")
LIMIT = 1e-5  # more than this is a failure, exit code 1
TORCHVISION = (
    "resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf",
    "densenet121", "convnext_tiny", "vgg11_bn", "squeezenet1_1", "googlenet", "shufflenet_v2_x1_0",
)  # fmt: skip
DETECTORS = ("retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn", "ssd300_vgg16")
TIMM = ("dla34", "resnet10t", "regnetx_002", "mobilenetv3_small_050", "convnext_atto")
SIZES = {"ssd300_vgg16": (300, 300), "dla34": (96, 128)}  # what these take; the others: an odd size
ODD = (97, 130)


def build(name: str) -> nn.Module:
    """The network in evaluation mode, with BatchNorm statistics as after training."""
    torch.manual_seed(0)
    if name in TIMM:
        import timm

        model = timm.create_model(name, pretrained=False)
    elif name in DETECTORS:
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    else:
        extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        model = torchvision.models.get_model(name, weights=None, **extra)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    return model.eval()


@torch.no_grad()
def outputs(name: str, model: Any, image: Tensor) -> list[Tensor]:
    """What is compared: class scores, or the maps that a detector's boxes are made of."""
    found = model.backbone(image) if name in DETECTORS else model(image)
    return list(found.values()) if isinstance(found, dict) else [found]


def convert(name: str, variant: str) -> dict[str, Any]:
    """Replaces what can be replaced in one network and compares its outputs."""
    model, size = build(name), SIZES.get(name, ODD)
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    before = outputs(name, model, image)
    report = replace_strides(model, variant=variant, example=image)
    pairs = zip(outputs(name, model, image), before, strict=True)
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return {
        "model": name,
        "imgsz": list(size),
        "sites": len(report.sites),
        "skipped": [f"{where}: {reason}" for where, reason in report.skipped],
        "parameters": report.parameters - report.added,
        "added": report.added,
        "difference": difference,
    }


def main(argv: Sequence[str] | None = None) -> int:
    names = (*TORCHVISION, *DETECTORS, *TIMM)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    args = parser.parse_args(argv)
    head = "".join(f"{f'added, {variant}':>20}{'difference':>12}" for variant in VARIANTS)
    print(f"{'network':26}{'sites':>6}{'left':>6}{'parameters':>13}{head}")
    rows = []
    for name in args.models:
        found = {variant: convert(name, variant) for variant in VARIANTS}
        row = found[VARIANTS[0]]
        cells = "".join(f"{found[v]['added']:>20,}{found[v]['difference']:>12.0e}" for v in VARIANTS)
        print(f"{name:26}{row['sites']:>6}{len(row['skipped']):>6}{row['parameters']:>13,}{cells}", flush=True)
        changes = {v: {key: found[v][key] for key in ("added", "difference")} for v in VARIANTS}
        rows.append({key: row[key] for key in ("model", "imgsz", "sites", "skipped", "parameters")} | changes)
    print(json.dumps({"benchmark": "architectures", "rows": rows}))
    return int(any(row[variant]["difference"] > LIMIT for row in rows for variant in VARIANTS))


if __name__ == "__main__":
    sys.exit(main())
