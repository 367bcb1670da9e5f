"""Exact deploy fusion: the network that runs, free of batch normalization, of space-to-depth and of work done twice.

SPD followed by a k x k convolution with padding p is one (scale*k) x (scale*k) convolution of stride `scale` with
padding scale*p, exactly: a Focus stem becomes a 6x6 convolution of stride 2, and SPD with C3's two 1x1 convolutions one
2x2 convolution of stride 2 for both branches. Where a Concat lies between SPD and convolution, the convolution over
concat(SPD(x), y) is split into a strided one on x plus the rest on y, summed before normalization and activation.
In the same way 1x1 convolutions over concat(Upsample(x), y) see x before it is upsampled, when it has a quarter of the
pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from models.blocks import C3, C3SPP, Concat, Conv
from models.folding import conv_like, fold_batch_norms
from models.graph import Network, Row
from models.heads import Detect
from models.spd import SPD, Scale, scale_pair

AnyNetwork = TypeVar("AnyNetwork", bound=Network)


class SplitConv2d(nn.Module):
    """One convolution over a concatenation that is never made: the sum of a convolution for each of its inputs.

    What follows a part in `after` is applied to its output before the sum.
    """

    def __init__(self, parts: Sequence[nn.Conv2d], after: Sequence[nn.Module] | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.after = nn.ModuleList(after or [nn.Identity() for _ in parts])

    def forward(self, inputs: list[Tensor]) -> Tensor:
        first, *others = (f(part(x)) for part, f, x in zip(self.parts, self.after, inputs, strict=True))
        for other in others:
            first = first + other
        return first


class MergedC3(nn.Module):
    """A C3 whose two 1x1 convolutions on the input are one; `entry` gives both branches, deep one first."""

    def __init__(self, entry: nn.Sequential, deep: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.entry = entry
        self.m = deep
        self.cv3 = last

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        deep, shallow = self.entry(x).chunk(2, 1)
        return self.cv3(torch.cat((self.m(deep), shallow), 1))


def fuse(model: AnyNetwork) -> AnyNetwork:
    """The same function as `model` in eval mode, as a new network without batch normalization and, where possible, SPD.

    `model` is not touched. What was done, and which SPD stays for what reason, is in the new network's `fusion_report`.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    report: list[str] = []
    layers = fused.model
    fold_batch_norms(layers)
    for row in fused.rows:
        _absorb_inside(layers[row.index], f"row {row.index} {row.name}", report)
    graph = _Graph(fused.rows, layers, report)
    graph.fuse()
    for index, layer in enumerate(layers):
        if index not in graph.rows:
            layers[index] = nn.Identity()
        elif isinstance(layer, C3 | C3SPP):
            layers[index] = merge_c3(layer)
    for module in layers.modules():
        act: Any = module.act if isinstance(module, Conv) else module.entry[1] if isinstance(module, MergedC3) else None
        if hasattr(act, "inplace"):  # the convolution's output is nobody else's
            act.inplace = True
    fused.rows, fused.fusion_report = list(graph.rows.values()), tuple(report)
    return fused


def is_spd_fusible(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether SPD can be taken into this convolution: its groups must not cut across the blocks."""
    return type(conv) is nn.Conv2d and conv.groups == 1 and conv.padding_mode == "zeros" and conv.padding != "same"


def absorb_spd(conv: nn.Conv2d, scale: Scale) -> nn.Conv2d:
    """The one strided convolution that equals SPD(scale) followed by `conv`."""
    assert is_spd_fusible(conv)
    rows, columns = scale_pair(scale)
    weight = _undilated(conv.weight.double(), conv.dilation)
    out, channels, kh, kw = weight.shape
    channels //= rows * columns
    blocks = weight.reshape(out, columns, rows, channels, kh, kw)
    kernel = blocks.permute(0, 3, 4, 2, 5, 1).reshape(out, channels, rows * kh, columns * kw)
    padding = (0, 0) if conv.padding == "valid" else conv.padding
    return conv_like(
        conv,
        kernel,
        conv.bias,
        stride=(conv.stride[0] * rows, conv.stride[1] * columns),
        padding=(int(padding[0]) * rows, int(padding[1]) * columns),
        dilation=1,
    )


def _undilated(weight: Tensor, dilation: tuple[int, ...]) -> Tensor:
    """The kernel with the zeros of its dilation written out."""
    if max(dilation) == 1:
        return weight
    out, channels, kh, kw = weight.shape
    full = weight.new_zeros(out, channels, (kh - 1) * dilation[0] + 1, (kw - 1) * dilation[1] + 1)
    full[:, :, :: dilation[0], :: dilation[1]] = weight
    return full


def _absorb_inside(layer: nn.Module, where: str, report: list[str]) -> None:
    """Take the SPD inside blocks such as SPDConv and Focus, at any depth, into the convolution behind it, in place."""
    for module in layer.modules():
        for first, second in getattr(module, "spds", ()):
            spd, conv = getattr(module, first), module.get_submodule(second)
            if type(spd) is not SPD:
                continue
            if is_spd_fusible(conv):
                fused = absorb_spd(conv, spd.scale)
                module.set_submodule(second, fused)
                module.set_submodule(first, nn.Identity())
                report.append(f"{where}: its SPD into a {_describe(fused)}")
            else:
                report.append(f"{where}: its SPD stays, the convolution behind it is grouped")


def _describe(conv: nn.Conv2d) -> str:
    kernel, stride = ("x".join(map(str, v)) for v in (conv.kernel_size, conv.stride))
    return f"{kernel} convolution of stride {stride}"


def _entry_names(layer: nn.Module, position: int) -> tuple[str, ...]:
    """Names of the convolutions that alone read the layer's input number `position`; none where others read it too."""
    if type(layer) is Detect:
        return (f"m.{position}",)
    if type(layer) is nn.Conv2d:
        return ("",)
    if type(layer) is nn.Sequential and len(layer):
        return tuple(f"0.{name}" if name else "0" for name in _entry_names(layer[0], position))
    return () if getattr(layer, "add", False) else getattr(layer, "entries", ())


class _Graph:
    """The rows and layers under fusion, with the report that grows beside them."""

    def __init__(self, rows: Sequence[Row], layers: nn.Sequential, report: list[str]) -> None:
        self.rows = {row.index: row for row in rows}
        self.layers = layers
        self.report = report

    def readers(self, index: int) -> list[Row]:
        return [row for row in self.rows.values() if index in row.sources]

    def obstacle(self, reader: Row, source: int) -> str | None:
        """Why `reader` cannot take in what stands before it at `source`, or None."""
        layer = self.layers[reader.index]
        who = f"row {reader.index} {reader.name}"
        for position in (i for i, s in enumerate(reader.sources) if s == source):
            names = _entry_names(layer, position)
            if not names:
                return f"{who} does more with it than convolve"
            if not all(is_spd_fusible(_get(layer, name)) for name in names):
                return f"{who} begins with a grouped convolution"
        return None

    def concat_obstacle(self, concat: Row) -> str | None:
        """Why a Concat cannot be split over its readers, or None."""
        readers = self.readers(concat.index)
        if self.layers[concat.index].d not in (1, -3) or not readers:
            return f"row {concat.index} Concat is not over channels or is the output"
        several = next((r for r in readers if r.many), None)
        if several:
            return f"row {several.index} {several.name} reads it through a Concat"
        return next(filter(None, (self.obstacle(r, concat.index) for r in readers)), None)

    def spd_obstacle(self, spd: Row) -> str | None:
        """Why an SPD row cannot be taken into the convolutions behind it, or None."""
        readers = self.readers(spd.index)
        if not readers:
            return "it is the output"
        reasons = (self.concat_obstacle(r) if self.is_concat(r.index) else self.obstacle(r, spd.index) for r in readers)
        return next(filter(None, reasons), None)

    def can_follow(self, upsample: Row) -> bool:
        """Whether a nearest Upsample can be moved behind the convolutions that read it: all 1x1, through Concats."""
        layer: Any = self.layers[upsample.index]
        concats = self.readers(upsample.index)
        if type(layer) is not nn.Upsample or layer.mode != "nearest" or not layer.scale_factor or not concats:
            return False
        if not all(self.is_concat(c.index) and self.concat_obstacle(c) is None for c in concats):
            return False
        readers = [self.layers[r.index] for c in concats for r in self.readers(c.index)]
        return all(_is_pointwise(_get(layer, name)) for layer in readers for name in _entry_names(layer, 0))

    def is_concat(self, index: int) -> bool:
        return index in self.rows and type(self.layers[index]) is Concat

    def split(self, concat: Row) -> None:
        """Remove a Concat: its readers convolve each of its inputs by itself and add up."""
        known = {source: self.rows[source].channels for source in concat.sources if source in self.rows}
        for reader in self.readers(concat.index):
            layer = self.layers[reader.index]
            for name in _entry_names(layer, 0):
                conv = _get(layer, name)
                rest = int(conv.in_channels) - sum(known.get(s, 0) for s in concat.sources)
                widths = [known.get(s, rest) for s in concat.sources]
                self.put(reader.index, name, _split(conv, widths))
            self.rows[reader.index] = replace(reader, sources=concat.sources, many=True)
        del self.rows[concat.index]

    def absorb(self, spd: Row) -> None:
        """Remove an SPD row: every convolution behind it becomes a strided one on the SPD's input."""
        scale = _get(self.layers, f"{spd.index}").scale
        for reader in self.readers(spd.index):
            layer = self.layers[reader.index]
            for position in (i for i, s in enumerate(reader.sources) if s == spd.index):
                for name in _entry_names(layer, position):
                    entry = _get(layer, name)
                    if isinstance(entry, SplitConv2d):
                        conv = absorb_spd(_parts(entry)[position], scale)
                        entry.parts[position] = conv
                    else:
                        conv = absorb_spd(entry, scale)
                        self.put(reader.index, name, conv)
                    beside = "the others by themselves, then the sum" if isinstance(entry, SplitConv2d) else "alone"
                    what = f"row {reader.index} {reader.name}{'.' if name else ''}{name}"
                    self.report.append(f"row {spd.index} SPD into {what}: {_describe(conv)}, {beside}")
        self.bypass(spd)

    def defer(self, upsample: Row) -> None:
        """Move an Upsample row behind the parts of the split convolutions that read it."""
        for reader in self.readers(upsample.index):
            layer = self.layers[reader.index]
            for position in (i for i, s in enumerate(reader.sources) if s == upsample.index):
                for name in _entry_names(layer, position):
                    _get(layer, name).after[position] = self.layers[upsample.index]
            self.report.append(f"row {upsample.index} Upsample behind the 1x1 convolutions of row {reader.index}")
        self.bypass(upsample)

    def bypass(self, row: Row) -> None:
        """Remove a row: its readers read its source instead."""
        for reader in self.readers(row.index):
            sources = tuple(row.sources[0] if s == row.index else s for s in reader.sources)
            self.rows[reader.index] = replace(reader, sources=sources)
        del self.rows[row.index]

    def put(self, index: int, name: str, module: nn.Module) -> None:
        if name:
            self.layers[index].set_submodule(name, module)
        else:
            self.layers[index] = module

    def fuse(self) -> None:
        """Take every SPD row whose readers are all convolutions into them, upsample late; report the SPD that stay."""
        fusible = []
        for row in [r for r in self.rows.values() if type(self.layers[r.index]) is SPD]:
            obstacle = self.spd_obstacle(row)
            if obstacle:
                self.report.append(f"row {row.index} {row.name} stays: {obstacle}")
            else:
                fusible.append(row.index)
        movable = [row.index for row in self.rows.values() if self.can_follow(row)]
        gone = {*fusible, *movable}
        for concat in [r for r in self.rows.values() if self.is_concat(r.index) and gone.intersection(r.sources)]:
            self.split(concat)
        for index in fusible:
            self.absorb(self.rows[index])
        for index in movable:
            self.defer(self.rows[index])


def _get(layer: nn.Module, name: str) -> Any:
    return layer.get_submodule(name) if name else layer


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))


def _split(conv: nn.Conv2d, widths: Sequence[int]) -> SplitConv2d:
    """The convolution over a concatenation as one for each input; the bias goes with the first."""
    weights = conv.weight.split(list(widths), 1)
    return SplitConv2d([conv_like(conv, w, conv.bias if i == 0 else None) for i, w in enumerate(weights)])


def merge_c3(block: C3 | C3SPP) -> nn.Module:
    """A C3 of any kind with its two input convolutions as one, where their activations are the same."""
    first, second = block.cv1, block.cv2
    if not isinstance(first.bn, nn.Identity) or repr(first.act) != repr(second.act):
        return block
    one, other = _parts(first.conv), _parts(second.conv)
    stacked = [_stack(a, b) for a, b in zip(one, other, strict=True)]
    split = first.conv if isinstance(first.conv, SplitConv2d) else None
    entry = nn.Sequential(SplitConv2d(stacked, [*split.after]) if split else stacked[0], first.act)
    return MergedC3(entry, block.m, block.cv3)


def _parts(conv: nn.Module) -> list[Any]:
    """The convolutions of a `SplitConv2d`, or the convolution itself."""
    return list(conv.parts) if isinstance(conv, SplitConv2d) else [conv]


def _stack(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """Two convolutions of the same input as one with the outputs of both."""
    bias = None
    if first.bias is not None and second.bias is not None:
        bias = torch.cat((first.bias, second.bias))
    return conv_like(first, torch.cat((first.weight, second.weight)), bias)
