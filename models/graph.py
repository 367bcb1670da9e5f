"""YAML rows `[from, repeats, module, args]` to a graph of layers, and running it.

Rows are data: nothing in a YAML is evaluated. Strings in a row are literals, the symbols `nc` and `anchors`, or an
activation such as `nn.LeakyReLU(0.1)`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.blocks import Conv
from models.registry import ACTIVATIONS, LayerSpec, find_layer
from models.spd import SPD, scale_pair
from utils.core.errors import UserError, printable
from utils.core.files import nearest

IMAGE = -1  # the source number of the network's input
MAX_TEXT = 200  # characters of a literal or an activation
MAX_PER_PIXEL = 10_000  # values of all rows' outputs for a pixel of the image; the largest networks here have 300
# What the constructors and the forwards of layers raise where arguments or inputs do not fit.
UNFIT = (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, AssertionError)


@dataclass(frozen=True)
class Row:
    """One node of the graph: `layers[index]` applied to the outputs of `sources` (`IMAGE` for the input).

    With `many` the layer takes the list of its sources' outputs, else the only one.
    """

    index: int
    sources: tuple[int, ...]
    name: str
    args: tuple[Any, ...]
    repeats: int
    channels: int
    many: bool


class Network(nn.Module):
    """What detectors and classifiers share: layers in rows, built from a resolved configuration.

    `cfg` rebuilds the very same network. Image sizes must be multiples of `max_stride`. `fusion_report` says what a
    fused network's exact fusion did, line by line, and is empty for a network as trained.
    """

    task = ""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        self.cfg = cfg
        self.nc: int = cfg["nc"]
        self.rows, self.model = parse_rows(cfg)
        self.max_stride = 1
        self.fusion_report: tuple[str, ...] = ()

    @property
    def strides(self) -> Sequence[int]:
        """Pixels per cell of each level of a detector."""
        return ()


def check_size(sides: Sequence[int], stride: int) -> None:
    """UserError for the first side of an image that is not a multiple of the model's largest stride."""
    for side in sides:
        if side < stride or side % stride:
            low = side // stride * stride
            usable = f"sizes are {low} and {low + stride}" if low > 0 else f"size is {stride}"
            raise UserError(
                f"image size {side} is not a multiple of the model's largest stride {stride}; nearest usable {usable}"
            )


def run_rows(rows: Sequence[Row], layers: nn.Sequential, x: Tensor) -> Any:
    """The output of the last row for images [B, C, H, W]; an output is held only as long as a later row needs it."""
    last_use = {source: position for position, row in enumerate(rows) for source in row.sources}
    held: dict[int, Any] = {IMAGE: x}
    y: Any = x
    for position, row in enumerate(rows):
        inputs = [held[source] for source in row.sources]
        y = layers[row.index](inputs if row.many else inputs[0])
        held[row.index] = y
        for source in {*row.sources, row.index}:
            if last_use.get(source, -1) <= position:
                del held[source]
    return y


def parse_rows(cfg: dict[str, Any]) -> tuple[list[Row], nn.Sequential]:
    """Build the layers of `cfg["backbone"] + cfg["head"]` of a resolved configuration."""
    symbols = {key: cfg[key] for key in ("nc", "anchors") if key in cfg}
    depth, width_multiple = float(cfg.get("depth_multiple", 1.0)), float(cfg.get("width_multiple", 1.0))
    if not (0 < depth < math.inf and 0 < width_multiple < math.inf):
        raise UserError(f"depth_multiple {depth:g} and width_multiple {width_multiple:g}; expected numbers above 0")
    unscaled = head_width(symbols)

    def width(channels: int) -> int:
        return channels if channels == unscaled else math.ceil(channels * width_multiple / 8) * 8

    rows: list[Row] = []
    layers: list[nn.Module] = []
    widths: dict[int, int] = {IMAGE: cfg["ch"]}
    for index, raw in enumerate([*cfg["backbone"], *cfg["head"]]):
        where = f"row {index} {printable(raw)} of the model YAML"
        sources, repeats, spec, args = _read_row(raw, index, symbols, where)
        repeats = max(round(repeats * depth), 1) if repeats > 1 else repeats
        c_in = [widths[s] for s in sources]
        if not spec.many and len(sources) != 1:
            raise UserError(f"{where}: {spec.name} takes one input, got {len(sources)}; put a Concat row before it")
        try:
            module, c_out = _build(spec, c_in, args, repeats, width)
        except UNFIT as error:
            reason = printable(error)
            raise UserError(f"{where}: {spec.name} does not accept these arguments ({reason})") from error
        row = Row(index, sources, spec.name, tuple(args), repeats, c_out, spec.many)
        rows.append(row)
        layers.append(module)
        widths[index] = c_out
    if cfg.get("activation"):
        set_activation(nn.Sequential(*layers), str(cfg["activation"]))
    return rows, nn.Sequential(*layers)


def head_width(symbols: dict[str, Any]) -> int | None:
    """Channels of a Detect convolution; a row of just this width is not scaled, as in YOLOv5."""
    if "anchors" not in symbols:
        return None
    return len(symbols["anchors"][0]) // 2 * (symbols["nc"] + 5)


def _read_row(
    raw: Any, index: int, symbols: dict[str, Any], where: str
) -> tuple[tuple[int, ...], int, LayerSpec, list[Any]]:
    if not isinstance(raw, list | tuple) or len(raw) != 4:
        raise UserError(f"{where}: expected [from, repeats, module, args]")
    origin, repeats, name, args = raw
    if not isinstance(repeats, int) or repeats < 1:
        raise UserError(f"{where}: repeats is {printable(repeats)}; expected an integer of at least 1")
    sources = []
    for source in origin if isinstance(origin, list | tuple) else [origin]:
        if not isinstance(source, int):
            raise UserError(f"{where}: from is {printable(source)}; expected row numbers")
        absolute = index + source if source < 0 else source
        if absolute >= index or absolute < IMAGE:
            raise UserError(f"{where}: from {source} is no earlier row; expected {-index - 1}..{index - 1}")
        sources.append(absolute)
    args = [read_argument(a, symbols) for a in (args if isinstance(args, list | tuple) else [args])]
    return tuple(sources), repeats, find_layer(name), args


def _build(spec: LayerSpec, c_in: list[int], args: list[Any], repeats: int, width: Any) -> tuple[nn.Module, int]:
    if spec.head:
        return spec.make(*args, c_in), 0
    if spec.out_channels is None:
        if not args or not isinstance(args[0], int) or args[0] < 1:
            raise ValueError(f"the first argument is the number of channels, got {args[:1]}")
        c_out = width(args[0])
        full: list[Any] = [c_in[0], c_out, *args[1:]]
        if spec.repeats:
            full.insert(2, repeats)
            repeats = 1
    else:
        c_out = spec.out_channels(c_in if spec.many else c_in[0], *args)
        full = [c_in[0], *args] if spec.needs_input_width else args
    modules = [spec.make(*full) for _ in range(repeats)]
    return (modules[0] if repeats == 1 else nn.Sequential(*modules)), c_out


def read_argument(value: Any, symbols: dict[str, Any]) -> Any:
    """A row's argument as a value: symbols, Python literals in strings, activations; other strings stay as they are."""
    if isinstance(value, list | tuple):
        return [read_argument(v, symbols) for v in value]
    if not isinstance(value, str):
        return value
    if value in symbols:
        return symbols[value]
    if len(value) > MAX_TEXT:
        raise UserError(f"an argument in the model YAML has {len(value)} characters; expected at most {MAX_TEXT}")
    if value.startswith(("nn.", "torch.nn.")):
        return parse_activation(value)
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two where the parser's stack overflows
        return value


def parse_activation(text: str) -> nn.Module:
    """`nn.LeakyReLU(0.1)`, `nn.ReLU()` or `ReLU` as a module; only literals are read, nothing is evaluated."""
    problem = UserError(
        f"activation '{printable(text)}' is not understood; expected a call with literals such as nn.LeakyReLU(0.1)"
        f" of one of {', '.join(ACTIVATIONS)}"
    )
    if len(text) > MAX_TEXT:
        raise problem
    try:
        node: ast.expr = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else None
        name = ast.unparse(call.func if call else node).removeprefix("torch.").removeprefix("nn.")
        args = [ast.literal_eval(a) for a in call.args] if call else []
        named = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords} if call else {}
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise problem from error
    if name not in ACTIVATIONS:
        hint = nearest(name, ACTIVATIONS)
        raise UserError(f"unknown activation '{printable(text)}'{hint}; known: {', '.join(ACTIVATIONS)}")
    try:
        return ACTIVATIONS[name](*args, **named)
    except UNFIT as error:
        raise problem from error


def set_activation(module: nn.Module, text: str) -> None:
    """Give every Conv that uses the model's activation the one named in `text`."""
    parse_activation(text)
    for conv in module.modules():
        if isinstance(conv, Conv) and conv.uses_default_act:
            conv.act = parse_activation(text)


def probe(rows: Sequence[Row], layers: nn.Sequential, ch: int, size: int) -> list[Any]:
    """The outputs of all rows for an empty batch of square images: their shapes cost neither memory nor arithmetic.

    In eval mode and without gradients; a row that is impossible, or beyond all measure, is a UserError.
    """
    modes = {module: module.training for module in layers.modules()}
    layers.eval()
    outputs: dict[int, Any] = {IMAGE: torch.zeros(0, ch, size, size)}
    left = MAX_PER_PIXEL * size * size
    try:
        with torch.no_grad():
            for row in rows:
                inputs = [outputs[s] for s in row.sources]
                try:
                    y = outputs[row.index] = layers[row.index](inputs if row.many else inputs[0])
                except UNFIT as error:
                    shapes = printable(", ".join(str(list(x.shape[1:])) for x in inputs))
                    reason = printable(str(error).split("\n")[0])
                    raise UserError(f"row {row.index} ({row.name}) cannot take inputs {shapes}: {reason}") from error
                if row is rows[-1]:
                    break
                if not isinstance(y, Tensor) or y.ndim != 4 or 0 in y.shape[1:]:
                    raise UserError(f"row {row.index} ({row.name}) gives no map to the rows behind it; put it last")
                left -= math.prod(y.shape[1:])
                if left < 0:
                    raise UserError(
                        f"row {row.index} ({row.name}) makes a map of {list(y.shape[1:])} of an image of {size}x{size};"
                        f" expected at most {MAX_PER_PIXEL} values for a pixel in all rows; enlarge less"
                    )
    finally:
        for module, training in modes.items():
            module.training = training
    return [outputs[row.index] for row in rows]


def smallest_fit(rows: Sequence[Row], layers: nn.Sequential, ch: int) -> tuple[int, list[Any]]:
    """(size, outputs of all rows) of the smallest image whose coarsest map has at least 2 cells, 512 at most.

    Odd factors of SPD scales are part of the size.
    """
    scales = [math.lcm(*scale_pair(m.scale)) for m in layers.modules() if isinstance(m, SPD)]
    odd = math.prod(scale // (scale & -scale) for scale in scales)
    largest = 512 * odd
    for size in (64 * odd, 128 * odd, 256 * odd):
        try:
            outputs = probe(rows, layers, ch, size)
        except UserError:
            continue
        if min(y.shape[2] for y in outputs[:-1]) >= 2:
            return size, outputs
    return largest, probe(rows, layers, ch, largest)


def measure_strides(rows: Sequence[Row], layers: nn.Sequential, ch: int) -> tuple[list[int], int]:
    """(strides of the last row's maps, largest stride inside)."""
    size, outputs = smallest_fit(rows, layers, ch)
    return [size // raw.shape[2] for raw in outputs[-1]], max(size // y.shape[2] for y in outputs[:-1])


def read_channels(value: Any) -> int:
    """The `ch` of a configuration."""
    if not isinstance(value, int) or not 1 <= value <= 10_000:
        raise UserError(f"ch is {printable(value)}; expected the number of image channels, 1 to 10000")
    return value
