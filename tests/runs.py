"""A small training run: its options, and what it ends with."""

from pathlib import Path
from typing import Any

import torch

from utils.core.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SMALL: dict[str, Any] = {
    "cfg": "yolov5n", "epochs": 2, "imgsz": 64, "batch_size": 8, "device": "cpu", "workers": 0, "noplots": True
}  # fmt: skip
HYP = ["nominal_batch=16", "warmup_epochs=0"]


def final(folder):
    """Every tensor that a finished run ends with."""
    last = load_checkpoint(folder / "weights" / "last.pt")
    return {
        **{f"ema.{k}": v for k, v in last["state"].items()},
        **{f"raw.{k}": v for k, v in last["train"]["raw"].items()},
    }


def same(a, b):
    a, b = final(a), final(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
