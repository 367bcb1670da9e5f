"""One run of a network under observation: what its layers are given, and where functions shrink maps instead."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

# Functions that can make a map smaller; whether a call did is seen from its result.
_SHRINKING = frozenset(
    ("conv2d", "max_pool2d", "_max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "lp_pool2d", "interpolate",
     "fractional_max_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "_adaptive_max_pool2d", "pixel_unshuffle")
)  # fmt: skip
_FAILURES = (
    RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError, ArithmeticError,
)  # fmt: skip


@dataclass
class Calls:
    """What `observe` saw."""

    device: torch.device
    dtype: torch.dtype
    widths: dict[nn.Module, set[int]] = field(default_factory=dict)
    outside: set[nn.Module] = field(default_factory=set)  # convolutions whose weights other layers or functions used
    functional: list[tuple[str, str]] = field(default_factory=list)
    failure: str = ""  # why the run ended early, if it did

    def was_used(self, layer: nn.Module) -> bool:
        """Whether the layer was called, or might have been in a run that ended early."""
        return layer in self.widths or bool(self.failure)

    def channels(self, layer: nn.Module) -> int | None:
        """The number of channels of a layer's input, if it was the same at every call."""
        widths = self.widths.get(layer, set())
        return next(iter(widths)) if len(widths) == 1 else None

    def why_unknown(self, layer: nn.Module) -> str:
        """Why `channels` gives None, for a report."""
        if self.widths.get(layer):
            return f"it is used with {' and '.join(map(str, sorted(self.widths[layer])))} channels"
        return self.failure or "it was not used on the example input"


class _Watch(TorchFunctionMode):
    """Notes calls of shrinking functions that no layer of its own stands for, and uses of a convolution's tensors."""

    def __init__(self, calls: Calls, stack: list[tuple[str, nn.Module]], module: nn.Module) -> None:
        super().__init__()
        self.calls, self.stack = calls, stack
        convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        self.owners = {id(p): m for m in convs for p in m.parameters(False) if not is_lazy(p)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        where, owner = self.stack[-1] if self.stack else ("", None)
        if name != "__get__":  # a look at shape, type or device
            used = {self.owners[id(t)] for t in (*args, *(kwargs or {}).values()) if id(t) in self.owners}
            self.calls.outside |= used - {owner}
        x = args[0] if args else (kwargs or {}).get("input")
        if not isinstance(x, Tensor) or x.ndim != 4:
            return result
        if name == "__getitem__":
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, slice) and (part.step or 1) > 1 for part in parts):
                self._note(where, "a slice with a step")
        elif name in _SHRINKING and not _is_judged(owner):
            y = result[0] if isinstance(result, tuple) else result
            if isinstance(y, Tensor) and y.ndim == 4 and _shrinks(x, y):
                self._note(where, f"the function {name.strip('_')}")
        return result

    def _note(self, where: str, what: str) -> None:
        entry = (where or "(the module itself)", f"{what} in its forward, not a layer")
        if entry not in self.calls.functional:
            self.calls.functional.append(entry)


_LAYERS = (
    nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.FractionalMaxPool2d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d, nn.PixelUnshuffle,
)  # fmt: skip


def _is_judged(layer: nn.Module | None) -> bool:
    """Whether the layer says by itself if it shrinks maps; Upsample to a fixed size does not."""
    return isinstance(layer, _LAYERS) or (isinstance(layer, nn.Upsample) and layer.size is None)


def _shrinks(x: Tensor, y: Tensor) -> bool:
    """Whether a map of more than one cell stays (a global mean is no stride) and a side is at most half as long."""
    small, large = y.shape[-2:], x.shape[-2:]
    return max(small) > 1 and any(2 * a <= b + 1 and b > 1 for a, b in zip(small, large, strict=True))


def observe(module: nn.Module, example: Any = None) -> Calls:
    """Run `module` once in eval mode on `example` (a tensor, or a tuple of arguments; default: a 224x224 image)."""
    given = example if isinstance(example, tuple) else (example,)
    tensors = (*module.parameters(), *(x for x in given if isinstance(x, Tensor)))
    own = next((t for t in tensors if t.is_floating_point()), torch.zeros(()))
    calls = Calls(own.device, own.dtype)
    if example is None:
        first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
        channels = first.in_channels or 3 if first is not None else 3  # 0: a lazy layer
        given = (torch.zeros(1, channels, 224, 224, device=own.device, dtype=own.dtype),)
    stack: list[tuple[str, nn.Module]] = []

    def enter(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            stack.append((name, layer))
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, Tensor) and x.ndim >= 3:
                calls.widths.setdefault(layer, set()).add(x.shape[-3])

        return hook

    def leave(layer: nn.Module, args: Any, result: Any) -> None:
        stack.pop()

    modes = {m: m.training for m in module.modules()}
    handles = []
    for name, layer in module.named_modules():
        handles += [layer.register_forward_pre_hook(enter(name), with_kwargs=True), layer.register_forward_hook(leave)]
    try:
        module.eval()
        with torch.no_grad(), _Watch(calls, stack, module):
            module(*given)
    except _FAILURES as error:
        reason = str(error).strip().split("\n")[0][:120]
        calls.failure = f"the module does not run on the example ({type(error).__name__}: {reason}); pass example="
    finally:
        for handle in handles:
            handle.remove()
        for m, training in modes.items():
            m.training = training
    return calls
