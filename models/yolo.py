"""The detector: a graph of YAML rows that ends in `Detect`.

`forward` always gives the raw maps, `decode` turns them into boxes; neither depends on the training mode. Strides,
anchors and the class count are plain values that losses and post-processing receive as data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.graph import Network, measure_strides, read_channels, run_rows
from models.heads import Detect
from utils.core.errors import UserError, printable
from utils.core.log import LOGGER

REQUIRED_KEYS = ("backbone", "head")
KNOWN_KEYS = (
    "nc", "ch", "depth_multiple", "width_multiple", "anchors", "anchors_from_data", "activation", "backbone", "head",
    "names", "task",
)  # fmt: skip

MAX_ANCHORS = 100  # of a cell, where a YAML gives only their count


class DetectionModel(Network):
    """A YOLOv5-family detector built from a resolved configuration.

    `cfg` holds the class count and the anchors, too; `strides` are those of the head's levels and `max_stride` that of
    the coarsest map inside.
    """

    task = "detect"

    def __init__(self, cfg: dict[str, Any], nc: int | None = None, ch: int = 3, anchors: Any = None) -> None:
        super().__init__(resolve(cfg, nc, ch, anchors))
        head = self.model[-1]
        if not isinstance(head, Detect):
            raise UserError(f"the model YAML ends in {self.rows[-1].name}; expected Detect as the last row")
        self.nc = head.nc
        self._place_strides(head)

    def _place_strides(self, head: Detect) -> None:
        strides, self.max_stride = measure_strides(self.rows, self.model, self.cfg["ch"])
        pixels = head.anchors
        area = pixels.prod(-1).mean(-1)
        if (area[-1] - area[0]) * (strides[-1] - strides[0]) < 0:
            head.anchors = pixels.flip(0)
        if self.cfg["anchors_from_data"]:
            head.anchors = torch.tensor(default_anchors(strides, head.per_cell)).view(len(strides), -1, 2)
        head.set_strides(strides)
        self.cfg["anchors"] = self.anchors.flatten(1).tolist()

    @property
    def head(self) -> Detect:
        head = self.model[-1]
        assert isinstance(head, Detect)
        return head

    @property
    def strides(self) -> list[int]:
        """Pixels per cell of each level."""
        return self.head.strides

    @property
    def anchors(self) -> Tensor:
        """Anchor sizes [levels, anchors, 2] in pixels."""
        head = self.head
        return head.anchors * torch.tensor(head.strides, device=head.anchors.device, dtype=head.anchors.dtype).view(
            -1, 1, 1
        )

    def set_anchors(self, pixels: Tensor) -> None:
        """Replace the anchors, [levels, anchors, 2] in pixels; the configuration follows."""
        head = self.head
        if pixels.shape != head.anchors.shape:
            raise ValueError(f"anchors have shape {list(pixels.shape)}; expected {list(head.anchors.shape)}")
        strides = torch.tensor(head.strides, dtype=torch.float64).view(-1, 1, 1)
        head.anchors.copy_(pixels.detach().cpu().double() / strides)
        self.cfg = {**self.cfg, "anchors": self.anchors.flatten(1).tolist(), "anchors_from_data": False}

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, ch, H, W] in 0..1 -> raw maps, each [B, anchors, H/stride, W/stride, 5 + nc]."""
        return run_rows(self.rows, self.model, images)

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Raw maps -> [B, N, 5 + nc]: cx, cy, w, h in network pixels, objectness and class probabilities."""
        return self.head.decode(maps)

    def predict(self, images: Tensor) -> Tensor:
        """`decode(forward(images))`."""
        return self.decode(self(images))


def resolve(cfg: dict[str, Any], nc: int | None, ch: int, anchors: Any) -> dict[str, Any]:
    """A copy of the configuration with every value in its place: nc, ch, multiples and anchors as lists in pixels."""
    missing = [key for key in REQUIRED_KEYS if not cfg.get(key)]
    if missing:
        raise UserError(
            f"the model YAML has no {' and no '.join(missing)}; expected rows [from, repeats, module, args]"
        )
    unknown = [str(key) for key in cfg if key not in KNOWN_KEYS]
    if unknown:
        LOGGER.warning(f"model YAML: unknown keys are not used: {printable(', '.join(unknown))}")
    out = {key: copy.deepcopy(cfg[key]) for key in KNOWN_KEYS if key in cfg}
    out["nc"] = cfg.get("nc") if nc is None else nc
    if not isinstance(out["nc"], int) or out["nc"] < 1:
        given = printable(out["nc"])
        raise UserError(f"number of classes is {given}; expected an integer of at least 1 in the YAML or as nc=")
    out["ch"] = read_channels(cfg.get("ch", ch))
    out["depth_multiple"] = float(cfg.get("depth_multiple", 1.0))
    out["width_multiple"] = float(cfg.get("width_multiple", 1.0))
    levels = _levels(out)
    given = cfg.get("anchors") if anchors is None else anchors
    out["anchors"], count = read_anchors(given, levels)
    out["anchors_from_data"] = count or (anchors is None and bool(cfg.get("anchors_from_data", False)))
    return out


def _levels(cfg: dict[str, Any]) -> int:
    last = cfg["head"][-1]
    if not isinstance(last, list | tuple) or len(last) != 4 or last[2] != "Detect":
        end = printable(last)
        raise UserError(f"the model YAML ends in {end}; expected a row [[levels], 1, Detect, [nc, anchors]]")
    return len(last[0]) if isinstance(last[0], list | tuple) else 1


def read_anchors(value: Any, levels: int) -> tuple[list[list[float]], bool]:
    """Anchors in pixels as a list per level, and whether they were given as a count only.

    A count gives placeholders that the model replaces by `default_anchors` once its strides are known.
    """
    if isinstance(value, Tensor):
        value = value.reshape(len(value), -1).tolist()
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= MAX_ANCHORS:
        return [[1.0] * (2 * round(value))] * levels, True
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(
            f"anchors is {printable(value)}; expected a count up to {MAX_ANCHORS}, or a list of w,h pairs in pixels for"
            " each level"
        )
    flat = [[float(v) for v in _flatten(level)] for level in value]
    if len(flat) != levels or len({len(level) for level in flat}) != 1 or len(flat[0]) % 2:
        raise UserError(f"anchors have {[len(x) for x in flat]} numbers a level; expected {levels} levels of w,h pairs")
    if not all(0 < v < math.inf for level in flat for v in level):
        raise UserError(f"anchors are {printable(flat)}; expected widths and heights above 0 in pixels")
    return flat, False


def _flatten(value: Any) -> list[Any]:
    return [x for v in value for x in (_flatten(v) if isinstance(v, list | tuple) else [v])]


def default_anchors(strides: Sequence[int], per_cell: int) -> list[list[float]]:
    """Starting anchors in pixels where a YAML gives only a count: squares of 1.5 to 6 cells, evenly in logarithm."""
    steps = [0.5] if per_cell == 1 else [i / (per_cell - 1) for i in range(per_cell)]
    return [[s * 1.5 * 4.0**t for t in steps for _ in range(2)] for s in strides]
