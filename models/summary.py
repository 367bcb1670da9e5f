"""What a network costs: shapes, parameters, GFLOPs and activation memory, row by row, measured on the meta device.

Nothing is computed: torch's own FlopCounterMode counts (2 x multiply-accumulate), and what autograd would keep for the
backward pass is added up, so that large networks and images cost nothing to ask about.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

BATCH = 2  # batch normalization refuses a single value per channel; the figures are for one image


@dataclass(frozen=True)
class RowSummary:
    """One row: `saved` is the bytes that training keeps for the backward pass, for an image in float32."""

    label: str
    source: str
    shape: str
    parameters: int
    flops: float
    saved: float


@dataclass(frozen=True)
class Summary:
    """A network at one image size (height, width); `flops` and `saved` (bytes) are for one image."""

    imgsz: tuple[int, int]
    rows: tuple[RowSummary, ...]
    parameters: int
    flops: float
    saved: float

    @property
    def gflops(self) -> float:
        return self.flops / 1e9


def summarize(model: nn.Module, imgsz: int | tuple[int, int] = 640) -> Summary:
    """Measure `model` (of any task) at an image size in pixels; the model itself is not touched."""
    height, width = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
    shadow = _on_meta(model).train()
    images = torch.empty(BATCH, _input_channels(shadow), height, width, device="meta")
    parts = list(_parts(shadow))
    kept = _Kept(shadow)
    flops = [0.0] * len(parts)
    saved = [0.0] * len(parts)
    shapes = [""] * len(parts)
    handles = []
    with FlopCounterMode(display=False) as counter:
        for i, (_, _, part) in enumerate(parts):

            def before(*_: Any, i: int = i) -> None:
                flops[i] -= counter.get_total_flops()
                saved[i] -= kept.bytes

            def after(_module: nn.Module, _inputs: Any, output: Any, i: int = i) -> None:
                flops[i] += counter.get_total_flops()
                saved[i] += kept.bytes
                shapes[i] = _shape(output)

            handles += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
            shadow(images)
    total = counter.get_total_flops()
    for handle in handles:
        handle.remove()
    rows = tuple(
        RowSummary(label, source, shapes[i], count_parameters(part), flops[i] / BATCH, saved[i] / BATCH)
        for i, (label, source, part) in enumerate(parts)
    )
    return Summary((height, width), rows, count_parameters(model), total / BATCH, kept.bytes / BATCH)


def count_parameters(module: nn.Module) -> int:
    """Number of learned values; buffers such as running means are not among them."""
    return sum(p.numel() for p in module.parameters())


def gflops(model: nn.Module, imgsz: int | tuple[int, int] = 640) -> float:
    """2e-9 x multiply-accumulates of one image."""
    return summarize(model, imgsz).gflops


class _Kept:
    """Adds up the bytes that autograd saves, each storage once, parameters and buffers not counted."""

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self.storages = {_storage(t): t for t in (*model.parameters(), *model.buffers())}

    def pack(self, tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in self.storages:
            self.storages[key] = tensor  # held, so that no other storage takes its identity
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model whose tensors have shapes only."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta", dtype=torch.float32)) for p in model.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)


def _input_channels(model: nn.Module) -> int:
    cfg = getattr(model, "cfg", {})
    return int(cfg.get("ch", 3))


def _parts(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(label, source, module) of the rows of a YAML network, else of the direct children."""
    rows = getattr(model, "rows", None)
    if rows is None:
        for name, child in model.named_children():
            yield f"{name} {type(child).__name__}", "", child
        return
    for row in rows:
        repeats = f" x{row.repeats}" if row.repeats > 1 else ""
        args = ", ".join(str(a) for a in row.args) if row.name != "Detect" else f"nc {row.args[0]}"
        source = ", ".join("image" if s < 0 else str(s) for s in row.sources)
        yield f"{row.index} {row.name}{repeats} [{args}]", source, model.model[row.index]  # type: ignore[index]


def _shape(output: Any) -> str:
    if isinstance(output, Tensor):
        return "x".join(map(str, output.shape[1:]))
    return ", ".join(_shape(x) for x in output) if isinstance(output, list | tuple) else ""
