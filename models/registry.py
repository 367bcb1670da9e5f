"""The layer registry: name, constructor and channel rule of every YAML layer in one place.

A model YAML names layers; `@layer(...)` says how such a row becomes a module. A layer is added by decorating one class,
and an unknown name is answered with the nearest known one.

What deploy fusion may know of a layer stands on its class, too: `folds`, pairs of sub-modules (convolution, batch
normalization directly behind it); `entries`, the convolutions that alone read the layer's input (unless its `add` is
true); `spds`, pairs (SPD, convolution that alone reads it). A layer without them is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from utils.core.errors import UserError, printable
from utils.core.files import nearest

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class LayerSpec:
    """How a YAML row `[from, repeats, name, args]` becomes a module.

    With `out_channels` None the first argument of the row is the output width, subject to `width_multiple`, and the
    constructor receives (c_in, c_out, *rest). Otherwise the constructor receives the row's arguments as they are and
    `out_channels(c_in, *args)` gives the width; `c_in` is a list when the layer takes `many` inputs.
    """

    name: str
    make: Callable[..., nn.Module]
    out_channels: Callable[..., int] | None = None
    repeats: bool = False  # the constructor takes the repeat count after (c_in, c_out)
    many: bool = False  # the layer takes a list of inputs
    needs_input_width: bool = False  # the constructor takes c_in before the row's arguments
    head: bool = False  # the constructor takes the list of input widths after the row's arguments


LAYERS: dict[str, LayerSpec] = {}


def register(spec: LayerSpec) -> None:
    """Enter a layer; a name that is taken is a programmer error."""
    assert spec.name not in LAYERS, f"layer {spec.name!r} is registered twice"
    LAYERS[spec.name] = spec


def layer(name: str | None = None, **rule: Any) -> Callable[[type[Module]], type[Module]]:
    """Class decorator: register the class under its own (or the given) name with the fields of `LayerSpec` as rule."""

    def enter(cls: type[Module]) -> type[Module]:
        register(LayerSpec(name or cls.__name__, cls, **rule))
        return cls

    return enter


def find_layer(name: object) -> LayerSpec:
    """The layer of that name (`nn.X` and `torch.nn.X` are the same), or an error that suggests a near name."""
    key = printable(name).removeprefix("torch.")
    if key not in LAYERS:
        raise UserError(f"unknown layer {key!r} in the model YAML{nearest(key, LAYERS)}; known: {', '.join(LAYERS)}")
    return LAYERS[key]


def _same(c_in: int, *_: Any) -> int:
    return c_in


ACTIVATIONS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        nn.SiLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Mish, nn.GELU,
        nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Identity,
    )
}  # fmt: skip


def _batch_norm(c_in: int, eps: float = 1e-3, momentum: float = 0.03) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(c_in, eps=eps, momentum=momentum)


for _name, _make in ACTIVATIONS.items():
    register(LayerSpec(f"nn.{_name}", _make, out_channels=_same))
for _torch_layer in (nn.Upsample, nn.MaxPool2d, nn.AvgPool2d, nn.ZeroPad2d):
    register(LayerSpec(f"nn.{_torch_layer.__name__}", _torch_layer, out_channels=_same))
register(LayerSpec("nn.BatchNorm2d", _batch_norm, out_channels=_same, needs_input_width=True))
register(LayerSpec("nn.Conv2d", nn.Conv2d))
register(LayerSpec("nn.ConvTranspose2d", nn.ConvTranspose2d))
