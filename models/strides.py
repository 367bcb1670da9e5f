"""SPD-Conv in any network: strided convolutions and pooling of a torch module, replaced where they stand.

`replace_strides` finds the sites, swaps each for a layer of `models.stride_layers`, and reports every site and
everything that it left alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from models.stride_layers import BlockConv, BlockMean, DenseMax, Pair, Squeezed, Window, lift_kernel
from models.trace import Calls, observe
from utils.core.errors import UserError

INITS = ("preserve", "fresh")
VARIANTS = ("conv-spd", "spd-conv")


@dataclass(frozen=True)
class Site:
    """One layer replaced: where, what it was and is, and its parameters before and after."""

    name: str
    was: str
    now: str
    before: int
    after: int


@dataclass(frozen=True)
class Report:
    """What `replace_strides` did: the `sites` replaced, and (name, reason) of everything `skipped`."""

    sites: tuple[Site, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    parameters: int = 0  # of the whole module, after
    added: int = 0

    def __str__(self) -> str:
        width = max((len(site.name) for site in self.sites), default=0)
        lines = [f"{s.name:<{width}}  {s.was} -> {s.now}, {s.before} -> {s.after} parameters" for s in self.sites]
        lines += [f"not converted: {name}: {reason}" for name, reason in self.skipped]
        share = self.added / max(self.parameters - self.added, 1)
        lines.append(
            f"{len(self.sites)} sites converted, {len(self.skipped)} not; {self.added:+d} parameters ({share:+.1%})"
        )
        return "\n".join(lines)


def replace_strides(
    module: nn.Module,
    init: str = "preserve",
    pooling: bool = True,
    variant: str = "conv-spd",
    *,
    example: Any = None,
) -> Report:
    """Replace, in place, every strided convolution and pooling layer of `module` by its SPD-Conv form.

    `init="preserve"` keeps the function: outputs stay equal up to float rounding. `init="fresh"` puts newly
    initialized SPD-Conv layers there. `variant="conv-spd"` runs the layer at stride 1, then SPD and a 1x1 convolution
    that starts on block (0, 0); `"spd-conv"` runs SPD, then one convolution over the blocks, which costs less. Average
    pooling, and all pooling of a fresh start, becomes SPD and a convolution in both.

    Only exact types are replaced: nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d. Pooling layers do not say how many channels
    they see, so the module is run once on `example` (a tensor, or a tuple of positional arguments; default: one image
    of 224x224), which also finds down-sampling by function calls. What is left alone is listed with its reason.
    """
    for given, choices in ((init, INITS), (variant, VARIANTS)):
        if given not in choices:
            raise UserError(f"replace_strides got {given!r}; expected {' or '.join(choices)}")
    if any(isinstance(layer, torch.jit.ScriptModule) for layer in module.modules()):
        raise UserError("the module is compiled by TorchScript; replace the strides of the module that it was made of")
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        raise UserError("the module is on the meta device and has no values; replace the strides once it has weights")
    calls, shared = observe(module, example), _shared(module)
    if any(is_lazy(p) for p in module.parameters()):
        raise UserError(f"the module has lazy layers without sizes yet, and {calls.failure or 'some were not used'}")
    before = sum(p.numel() for p in module.parameters())
    sites, skipped, swaps = [], [], {}
    for name, layer in module.named_modules():
        if not name and _is_site(layer):
            raise UserError(f"the module is a {type(layer).__name__} itself; wrap it in nn.Sequential to replace it")
        reason = (shared.get(layer) if _is_site(layer) else "") or _obstacle(layer, calls, pooling)
        if reason:
            skipped.append((name, reason))
        elif type(layer) in _MAKERS and _is_site(layer) and (pooling or isinstance(layer, nn.Conv2d)):
            new = _MAKERS[type(layer)](layer, calls.channels(layer), init, variant)
            _adopt(new, layer, calls)
            swaps[layer] = new
            sites.append(Site(name, _describe(layer), _describe(new), _count(layer), _count(new)))
    for parent in list(module.modules()):
        for key, child in parent._modules.items():
            if child in swaps:
                parent._modules[key] = swaps[child]
    skipped += calls.functional
    after = sum(p.numel() for p in module.parameters())
    return Report(tuple(sites), tuple(skipped), after, after - before)


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _window(layer: nn.Module) -> Window:
    """The window of a convolution or pooling layer."""
    padding, stride = layer.padding, layer.stride if layer.stride is not None else layer.kernel_size
    return Window(
        _pair(layer.kernel_size),
        _pair(stride),
        (0, 0) if isinstance(padding, str) else _pair(padding),
        _pair(getattr(layer, "dilation", 1)),
        bool(getattr(layer, "ceil_mode", False)),
    )


def _strides(layer: nn.Module) -> bool:
    stride = getattr(layer, "stride", None)
    stride = getattr(layer, "kernel_size", 1) if stride is None else stride
    return max(stride) > 1 if isinstance(stride, (tuple, list)) else isinstance(stride, int) and stride > 1


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d,
    nn.FractionalMaxPool2d, nn.FractionalMaxPool3d,
)  # fmt: skip
_ADAPTIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def _is_site(layer: nn.Module) -> bool:
    return isinstance(layer, (*_CONVS, *_POOLS)) and (_strides(layer) or "Fractional" in type(layer).__name__)


def _obstacle(layer: nn.Module, calls: Calls, pooling: bool) -> str:
    """Why a down-sampling layer stays as it is; empty for a layer that can be replaced or does not down-sample."""
    if isinstance(layer, _ADAPTIVE):
        size = layer.output_size if isinstance(layer.output_size, tuple) else (layer.output_size,) * 2
        return f"{type(layer).__name__} to a fixed size has no stride" if pooling and set(size) != {1} else ""
    if isinstance(layer, nn.PixelUnshuffle) and layer.downscale_factor > 1:
        return "PixelUnshuffle is SPD already, in another order of channels"
    if isinstance(layer, nn.Upsample) and layer.scale_factor is not None and _least(layer.scale_factor) < 1:
        return f"Upsample by {layer.scale_factor} has no SPD form"
    if not _is_site(layer) or (not pooling and isinstance(layer, _POOLS)):
        return ""
    kind = type(layer)
    if kind not in _MAKERS:
        base = next(base.__name__ for base in (*_CONVS, *_POOLS) if isinstance(layer, base))
        if kind not in (*_CONVS, *_POOLS):
            return f"{kind.__name__}, a subclass of {base}, may compute something else"
        return f"{base} has no SPD form" if "2d" in base else f"{base} is not two-dimensional"
    if any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)):
        return "it has hooks (such as weight normalization)"
    if "forward" in vars(layer):
        return "its forward was exchanged, it may compute something else"
    if layer in calls.outside:
        return "its weight is used outside of its own forward"
    if not calls.was_used(layer):
        return calls.why_unknown(layer)
    if isinstance(layer, nn.MaxPool2d) and layer.return_indices:
        return "return_indices=True"
    if isinstance(layer, _POOLS) and calls.channels(layer) is None:
        return f"its number of channels is unknown: {calls.why_unknown(layer)}"
    return ""


def _least(value: float | tuple[float, ...]) -> float:
    return min(value) if isinstance(value, tuple) else value


def _shared(module: nn.Module) -> dict[nn.Module, str]:
    """Layers that hold a parameter of another layer, each with the reason why it stays; a copy would untie them."""
    holders: dict[nn.Parameter, list[tuple[nn.Module, str, str]]] = {}
    for name, layer in module.named_modules():
        for key, parameter in layer._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append((layer, key, f"{name}.{key}" if name else key))
    reasons: dict[nn.Module, str] = {}
    for group in holders.values():
        for layer, key, own in group:
            others = [path for _, _, path in group if path != own]
            if others:
                reasons[layer] = f"its {key} is shared with {' and '.join(others)}"
    return reasons


def _count(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


def _by(pair: Pair) -> str:
    return f"{pair[0]}x{pair[1]}"


def _describe(layer: nn.Module) -> str:
    if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
        window = _window(layer)
        groups = f" groups {layer.groups}" if isinstance(layer, nn.Conv2d) and layer.groups > 1 else ""
        return f"{type(layer).__name__} {_by(window.kernel)}/{_by(window.stride)}{groups}"
    if isinstance(layer, Squeezed):
        inner = layer.layer
        kind = "max" if isinstance(inner, DenseMax) else "conv"
        kernel = inner.window.kernel if isinstance(inner, DenseMax) else _pair(inner.kernel_size)
        return f"{kind} {_by(kernel)}, SPD {_by(layer.window.stride)}, conv 1x1"
    assert isinstance(layer, BlockConv)
    return f"SPD {_by(layer.window.stride)}, conv {_by(_pair(layer.conv.kernel_size))}"


def _conv(layer: nn.Conv2d, channels: int | None, init: str, variant: str) -> nn.Module:
    window, keep, bias = _window(layer), init == "preserve", layer.bias is not None
    c_in, c_out, groups, mode = layer.in_channels, layer.out_channels, layer.groups, layer.padding_mode
    if variant == "spd-conv":
        new = BlockConv(c_in, c_out, window, groups, bias, odd=not keep, pad_mode=mode if keep else "zeros")
        conv, weight = new.conv, lift_kernel(layer.weight.data, new.window) if keep else None
    else:
        padding = layer.padding if isinstance(layer.padding, str) else window.padding
        conv = nn.Conv2d(c_in, c_out, window.kernel, 1, padding, window.dilation, groups, bias, mode)
        new, weight = Squeezed(conv, c_out, window, groups), layer.weight.data.clone()
        if keep:
            new.start_on_first_block()
    if keep and weight is not None:
        conv.weight.data = weight
        if layer.bias is not None and conv.bias is not None:
            conv.bias.data = layer.bias.data.clone()
    return new


def _fresh_pool(layer: nn.Module, channels: int) -> nn.Module:
    return BlockConv(channels, channels, _window(layer), odd=True)


def _max_pool(layer: nn.MaxPool2d, channels: int | None, init: str, variant: str) -> nn.Module:
    assert channels is not None
    if init == "fresh":
        return _fresh_pool(layer, channels)
    new = Squeezed(DenseMax(_window(layer)), channels, _window(layer))
    new.start_on_first_block()
    return new


def _avg_pool(layer: nn.AvgPool2d, channels: int | None, init: str, variant: str) -> nn.Module:
    assert channels is not None
    if init == "fresh":
        return _fresh_pool(layer, channels)
    window = _window(layer)
    uneven = window.ceil or (max(window.padding) > 0 and not layer.count_include_pad)
    if uneven and not layer.divisor_override:
        new = BlockMean(channels, window, layer.count_include_pad)
    else:
        new = BlockConv(channels, channels, window, bias=False)
    share = 1 / (layer.divisor_override or math.prod(window.kernel))
    diagonal = torch.eye(channels, dtype=torch.float64)[:, :, None, None].expand(-1, -1, *window.kernel) * share
    new.conv.weight.data = lift_kernel(diagonal, window)
    return new


_MAKERS: dict[type[nn.Module], Any] = {nn.Conv2d: _conv, nn.MaxPool2d: _max_pool, nn.AvgPool2d: _avg_pool}


def _adopt(new: nn.Module, old: nn.Module, calls: Calls) -> None:
    """Give the new layer the mode, device, dtype and (for convolutions) the frozen state of the old one."""
    own = next(old.parameters(), None)
    device, dtype = (own.device, own.dtype) if own is not None else (calls.device, calls.dtype)
    new.to(device=device, dtype=dtype)
    new.train(old.training)
    if own is not None:
        new.requires_grad_(own.requires_grad)
    if isinstance(old, nn.Conv2d) and old.bias is not None:
        bias = new.get_parameter("layer.bias" if isinstance(new, Squeezed) else "conv.bias")
        bias.requires_grad_(old.bias.requires_grad)
