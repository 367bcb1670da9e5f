"""Trained weights into a new architecture: the same function in an SPD network, and what can be kept otherwise.

`initialise` is what training calls. The source's rows are walked beside the target's; where the target has a stride-1
convolution and SPD (or SPD and a convolution) in the place of a strided convolution, the weights are rewritten so that in
eval mode the outputs stay equal. Sites where that is impossible are started as near as possible, and named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.blocks import Concat, Conv
from models.graph import IMAGE, Row
from models.heads import Detect
from models.merge import Merge, merge_site
from models.spd import SPD, SPDConv
from models.stride_layers import Window, lift_kernel
from models.weights import LoadedModel, Transfer, transfer
from models.yolo import DetectionModel


@dataclass(frozen=True)
class Initialization:
    """What `initialise` did. `exact` tells whether the target now computes what the source computes in eval mode.

    Iterating gives the lines to print.
    """

    kind: str  # "copy", "conversion" or "transfer"
    exact: bool
    lines: tuple[str, ...]
    transfer: Transfer

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)


class NotConvertible(Exception):
    """The rows of the two architectures do not correspond; the message says where."""


@dataclass(frozen=True)
class Place:
    """Where the output of a source row is in the target: its row, and for each source channel the target's channel."""

    row: int
    channels: Tensor
    width: int

    @property
    def plain(self) -> bool:
        """Whether the two maps have the same channels."""
        return self.width == len(self.channels)


@dataclass
class Plan:
    """Tensors for the target by name, with a line for every site and for every site that is not preserved."""

    state: dict[str, Tensor] = field(default_factory=dict)
    sites: list[str] = field(default_factory=list)
    approximate: list[str] = field(default_factory=list)


def initialise(model: nn.Module, loaded: LoadedModel) -> Initialization:
    """Start `model` from `loaded`: a copy, a function-preserving conversion, or a partial transfer, and a report."""
    source = loaded.model
    if not (isinstance(model, DetectionModel) and isinstance(source, DetectionModel)) or _same_rows(model, source):
        result = transfer(model, source.state_dict())
        complete = not (result.missing or result.mismatched or result.partial or result.unused)
        kind, lines, exact = "copy" if complete else "transfer", [str(result)], complete
    else:
        try:
            converted = convert_to_spd(source.state_dict(), source.cfg, model)
            return converted
        except NotConvertible as reason:
            result = transfer(model, source.state_dict())
            lines = [f"no function-preserving conversion ({reason}); {result}", *_named(result)]
            kind, exact = "transfer", False
    if isinstance(model, DetectionModel) and isinstance(source, DetectionModel) and kind == "copy":
        exact = _take_anchors(model, source, lines)
    elif kind == "transfer" and len(lines) == 1:
        lines += _named(result)
        if isinstance(model, DetectionModel) and isinstance(source, DetectionModel):
            _take_anchors(model, source, lines)
    return Initialization(kind, exact, tuple(lines), result)
