"""Two detectors walked row by row: the target's tensors such that it computes what the source computes.

Each rule recognizes a few rows of both networks, notes the target's tensors, and remembers in which channels of which
target row the output of a source row is to be found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.blocks import Concat, Conv
from models.graph import IMAGE
from models.heads import Detect
from models.merge import NEARLY_LINEAR, Site, merge_rows
from models.registry import ACTIVATIONS
from models.space import scale_pair
from models.spd import SPD, SPDConv
from models.stride_layers import Window, lift_kernel
from models.yolo import DetectionModel

CHANNEL_WISE = (nn.Upsample, nn.MaxPool2d, nn.AvgPool2d, nn.ZeroPad2d, *ACTIVATIONS.values())


class NotConvertible(Exception):
    """The rows of the two architectures do not correspond; the message says where."""


@dataclass(frozen=True)
class Place:
    """Where the output of a source row is in the target: its row, and the target's channel of each source channel."""

    row: int
    channels: Tensor
    width: int

    @property
    def plain(self) -> bool:
        """Whether the two maps have the same channels."""
        return self.width == len(self.channels)


@dataclass
class Plan:
    """Tensors for the target by name, a line for every site, and how many rows of both networks correspond.

    `stopped` says why the walk ended early, if it did; what is planned then holds for the rows before.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    sites: list[str] = field(default_factory=list)
    approximate: list[str] = field(default_factory=list)
    source_rows: int = 0
    target_rows: int = 0
    stopped: str = ""


class _Walk:
    """Walks the rows of both networks in step; each rule takes one or more rows of either."""

    def __init__(self, source: DetectionModel, target: DetectionModel) -> None:
        self.source, self.target, self.plan = source, target, Plan()
        channels = torch.arange(source.cfg["ch"])
        self.places: dict[int, Place] = {IMAGE: Place(IMAGE, channels, len(channels))}

    def run(self) -> Plan:
        """The tensors for the target, as far as the rows correspond."""
        plan = self.plan
        try:
            self._walk()
        except NotConvertible as reason:
            plan.stopped = str(reason)
            done = [f"model.{j}." for j in range(plan.target_rows)]
            plan.state = {key: tensor for key, tensor in plan.state.items() if key.startswith(tuple(done))}
        return plan

    def _walk(self) -> None:
        if self.source.cfg["ch"] != self.target.cfg["ch"]:
            raise NotConvertible(f"{self.source.cfg['ch']} and {self.target.cfg['ch']} image channels")
        i = j = 0
        while i < len(self.source.rows) and j < len(self.target.rows):
            for rule in (self._same, self._block_conv, self._conv_then_spd, self._merge, self._spd_then_conv):
                taken = rule(i, j)
                if taken:
                    break
            else:
                raise NotConvertible(f"{self._name(self.source, i)} and {self._name(self.target, j)} do not correspond")
            i, j = i + taken[0], j + taken[1]
            self.plan.source_rows, self.plan.target_rows = i, j
        if i < len(self.source.rows) or j < len(self.target.rows):
            raise NotConvertible(f"rows are left over from row {i} of the source and row {j} of the target on")

    @staticmethod
    def _name(model: DetectionModel, row: int) -> str:
        return f"row {row} ({model.rows[row].name})"

    @staticmethod
    def _layer(model: DetectionModel, row: int) -> nn.Module | None:
        return model.model[row] if row < len(model.rows) else None

    def _inputs(self, i: int) -> list[Place]:
        sources = self.source.rows[i].sources
        if any(s not in self.places for s in sources):
            raise NotConvertible(f"{self._name(self.source, i)} reads a map that the target does not have")
        return [self.places[s] for s in sources]

    def _fed_alike(self, i: int, j: int) -> bool:
        return [place.row for place in self._inputs(i)] == list(self.target.rows[j].sources)

    def _put(self, i: int, row: int, width: int | None = None) -> None:
        channels = torch.arange(self.source.rows[i].channels)
        self.places[i] = Place(row, channels, len(channels) if width is None else width)

    def _same(self, i: int, j: int) -> tuple[int, int] | None:
        """A row of the same kind: its tensors, spread over the channels of its input."""
        a, b = self.source.model[i], self.target.model[j]
        if type(a) is not type(b) or not self._fed_alike(i, j):
            return None
        inputs = self._inputs(i)
        if (
            isinstance(a, Conv)
            and isinstance(b, Conv)
            and (a.conv.stride, a.conv.kernel_size) != (b.conv.stride, b.conv.kernel_size)
        ):
            return None
        if isinstance(a, Concat):
            starts = torch.tensor([0, *(p.width for p in inputs)]).cumsum(0)
            channels = torch.cat([p.channels + start for p, start in zip(inputs, starts, strict=False)])
            self.places[i] = Place(j, channels, int(starts[-1]))
        elif isinstance(a, CHANNEL_WISE):
            self.places[i] = Place(j, inputs[0].channels, inputs[0].width)
        else:
            if isinstance(a, Detect) and not all(place.plain for place in inputs):
                raise NotConvertible("the head reads SPD blocks")
            self._copy(i, j, inputs[0])
            self._put(i, j)
        return 1, 1

    def _copy(self, i: int, j: int, place: Place, to: str = "") -> None:
        """Tensors of row `i` for row `j`; those that read the input are spread over the channels of `place`."""
        own = self.target.model[j].state_dict()
        head, spread = isinstance(self.source.model[i], Detect), False
        for name, tensor in self.source.model[i].state_dict().items():
            wanted = own.get(to + name)
            if wanted is None:
                raise NotConvertible(f"{self._name(self.target, j)} has no tensor {to + name}")
            if tensor.shape != wanted.shape and not head:
                tensor, spread = self._spread(tensor, wanted, place, self._name(self.source, i)), True
            self.plan.state[f"model.{j}.{to}{name}"] = tensor
        if not place.plain and not spread:
            raise NotConvertible(f"{self._name(self.source, i)} does not read its input by a convolution")

    @staticmethod
    def _spread(tensor: Tensor, wanted: Tensor, place: Place, name: str) -> Tensor:
        fits = tensor.ndim == 4 and (len(tensor), *tensor.shape[2:]) == (len(wanted), *wanted.shape[2:])
        if not fits or (tensor.shape[1], wanted.shape[1]) != (len(place.channels), place.width):
            raise NotConvertible(f"{name} has weights of {list(tensor.shape)}, the target {list(wanted.shape)}")
        spread = torch.zeros_like(wanted, device=tensor.device)
        spread[:, place.channels] = tensor
        return spread

    def _strided(self, i: int) -> tuple[Conv, Window] | None:
        """The row as an ungrouped strided Conv, with its window."""
        layer = self._layer(self.source, i)
        if not isinstance(layer, Conv) or max(layer.conv.stride) == 1 or layer.conv.groups > 1:
            return None
        conv = layer.conv
        return layer, Window(_two(conv.kernel_size), _two(conv.stride), _two(conv.padding), _two(conv.dilation))

    def _lifted(self, i: int, layer: Conv, window: Window, wanted: Tensor) -> Tensor:
        """The kernel over SPD blocks in the size of the target's, placed around its center."""
        kernel = lift_kernel(layer.conv.weight.detach(), window, odd=True)
        spare = [(w - k) for w, k in zip(wanted.shape[2:], kernel.shape[2:], strict=True)]
        if kernel.shape[:2] != wanted.shape[:2] or min(spare) < 0 or any(x % 2 for x in spare):
            raise NotConvertible(f"{self._name(self.source, i)} does not fit {list(wanted.shape)}")
        h, w = (x // 2 for x in spare)
        return nn.functional.pad(kernel, (w, w, h, h))

    def _block_conv(self, i: int, j: int) -> tuple[int, int] | None:
        """Strided Conv -> SPDConv or Focus."""
        found, layer = self._strided(i), self._layer(self.target, j)
        if not found or not isinstance(layer, SPDConv) or scale_pair(layer.spd.scale) != found[1].stride:
            return None
        if not self._fed_alike(i, j) or not self._inputs(i)[0].plain:
            return None
        self._lift_into(i, j, "conv.", layer.conv)
        self.plan.sites.append(f"{self._name(self.source, i)} -> {self._name(self.target, j)}")
        self._put(i, j)
        return 1, 1

    def _lift_into(self, i: int, j: int, prefix: str, conv: Conv) -> None:
        found = self._strided(i)
        assert found is not None
        if max(conv.conv.stride) > 1 or type(conv.act) is not type(found[0].act):
            raise NotConvertible(f"{self._name(self.target, j)} strides, or has another activation")
        for name, tensor in found[0].state_dict().items():
            self.plan.state[f"model.{j}.{prefix}{name}"] = tensor
        self.plan.state[f"model.{j}.{prefix}conv.weight"] = self._lifted(i, *found, conv.conv.weight)

    def _conv_then_spd(self, i: int, j: int) -> tuple[int, int] | None:
        """Strided Conv -> the same Conv at stride 1, SPD: its outputs are block (0, 0)."""
        found, conv, spd = self._strided(i), self._layer(self.target, j), self._layer(self.target, j + 1)
        if not found or type(conv) is not Conv or not isinstance(spd, SPD) or max(conv.conv.stride) > 1:
            return None
        layer, window = found
        same = all(getattr(conv.conv, k) == getattr(layer.conv, k) for k in ("kernel_size", "padding", "dilation"))
        sides = zip(window.padding, window.dilation, window.kernel, strict=True)
        keeps_size = all(2 * p == d * (k - 1) for p, d, k in sides)
        if not same or not keeps_size or scale_pair(spd.scale) != window.stride or not self._fed_alike(i, j):
            return None
        if self.target.rows[j + 1].sources != (j,) or type(conv.act) is not type(layer.act):
            return None
        self._copy(i, j, self._inputs(i)[0])
        rows, columns = window.stride
        self._put(i, j + 1, self.source.rows[i].channels * rows * columns)
        self.plan.sites.append(f"{self._name(self.source, i)} -> rows {j}-{j + 1} (Conv, SPD)")
        return 1, 2

    def _spd_then_conv(self, i: int, j: int) -> tuple[int, int] | None:
        """Strided Conv -> SPD, Conv: the kernel over the four blocks."""
        found, spd, conv = self._strided(i), self._layer(self.target, j), self._layer(self.target, j + 1)
        if not found or not isinstance(spd, SPD) or type(conv) is not Conv or not self._fed_alike(i, j):
            return None
        if scale_pair(spd.scale) != found[1].stride or self.target.rows[j + 1].sources != (j,):
            return None
        if not self._inputs(i)[0].plain:
            return None
        self._lift_into(i, j + 1, "", conv)
        self.plan.sites.append(f"{self._name(self.source, i)} -> rows {j}-{j + 1} (SPD, Conv)")
        self._put(i, j + 1)
        return 1, 2

    def _merge(self, i: int, j: int) -> tuple[int, int] | None:
        """Strided Conv, Concat, reader -> SPD, Concat, Conv, reader: not preserved (see models.merge)."""
        found = self._strided(i)
        kinds = [type(self._layer(self.target, j + k)) for k in range(4)]
        source = [type(self._layer(self.source, i + k)) for k in range(3)]
        if not found or kinds[:3] != [SPD, Concat, Conv] or source[1:2] != [Concat] or source[2] is not kinds[3]:
            return None
        wide, joint = self.source.rows[i + 1].sources, self.target.rows[j + 1].sources
        if len(wide) != 2 or i not in wide or j not in joint or not self._fed_alike(i, j):
            return None
        side = wide[1 - wide.index(i)]
        order = [j if s == i else self.places[s].row for s in wide if s == i or s in self.places]
        if order != list(joint) or not all(p.plain for p in (self._inputs(i)[0], self.places[side])):
            return None
        if self.source.rows[i + 2].sources != (i + 1,) or self.target.rows[j + 3].sources != (j + 2,):
            return None
        self._merge_rows(i, j, side, wide.index(i) == 0)
        self._put(i + 2, j + 3)
        return 3, 4

    def _merge_rows(self, i: int, j: int, side: int, down_first: bool) -> None:
        found, conv = self._strided(i), self.target.model[j + 2]
        assert found is not None and isinstance(conv, Conv)
        name = self._name(self.source, i + 2)
        if not isinstance(conv.act, NEARLY_LINEAR):
            raise NotConvertible(f"{self._name(self.target, j + 2)} has an activation that is not linear anywhere")
        reader = self.source.model[i + 2].state_dict()
        own = self.target.model[j + 3].state_dict()
        reading = [key for key, tensor in reader.items() if own[key].shape != tensor.shape]
        joint = self.source.rows[i].channels + self.source.rows[side].channels
        for key in reading:
            norm = key.replace(".conv.weight", ".bn.running_mean")
            if norm not in reader or reader[key].shape[1:] != (joint, 1, 1):
                raise NotConvertible(f"{name} reads by {key}, which is no 1x1 convolution with BatchNorm")
        if not reading:
            raise NotConvertible(f"{name} does not read the Concat")
        blocks = math.prod(found[1].stride) * self.source.rows[self.source.rows[i].sources[0]].channels
        down, lateral = found[0], self.source.model[side]
        kernel = self._lifted(i, *found, torch.empty(down.conv.out_channels, blocks, *conv.conv.weight.shape[2:]))
        merged = merge_rows(Site(down, lateral, kernel, down_first, reader, tuple(reading)), conv)
        for row, state in ((j + 2, merged.conv), (j + 3, merged.reader)):
            self.plan.state.update({f"model.{row}.{key}": tensor for key, tensor in state.items()})
        self.plan.approximate.append(
            f"rows {i}-{i + 2} -> rows {j}-{j + 3}: {joint} channels become {conv.conv.out_channels}, and the lateral"
            f" map passes a further BatchNorm and activation ({merged.kept:.0%} of the readers' input energy kept)"
        )


def _two(value: Sequence[int] | Any) -> tuple[int, int]:
    return int(value[0]), int(value[1])


def plan_rows(source: DetectionModel, target: DetectionModel) -> Plan:
    """The tensors with which `target` computes what `source` computes, for all rows up to `Plan.stopped`."""
    return _Walk(source, target).run()
