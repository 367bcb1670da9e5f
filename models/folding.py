"""Batch normalization folded into the convolutions before it, and convolutions with new values."""

import torch
from torch import Tensor, nn

from models.blocks import BottleneckCSP


def fold_batch_norms(network: nn.Module) -> None:
    """Fold every batch normalization that directly follows a convolution into it, in place; arithmetic in float64."""
    for module in list(network.modules()):
        pairs = list(getattr(module, "folds", ()))
        if type(module) is nn.Sequential:
            pairs += [(str(i), str(i + 1)) for i in range(len(module) - 1)]
        for first, second in pairs:
            conv, bn = module.get_submodule(first), module.get_submodule(second)
            if type(conv) is nn.Conv2d and type(bn) is nn.BatchNorm2d:
                module.set_submodule(first, _scaled(conv, *_affine(bn)))
                module.set_submodule(second, nn.Identity())
        if isinstance(module, BottleneckCSP) and isinstance(module.bn, nn.BatchNorm2d):
            scale, shift = _affine(module.bn)
            half = module.cv3.out_channels
            module.cv3 = _scaled(module.cv3, scale[:half], shift[:half])
            module.cv2 = _scaled(module.cv2, scale[half:], shift[half:])
            module.set_submodule("bn", nn.Identity())


def _affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Eval-mode batch normalization as y = scale * x + shift, in float64."""
    assert bn.running_mean is not None and bn.running_var is not None
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.affine:
        scale = scale * bn.weight.double()
    shift = -bn.running_mean.double() * scale
    return scale, shift + bn.bias.double() if bn.affine else shift


def _scaled(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> nn.Conv2d:
    bias = shift if conv.bias is None else conv.bias.double() * scale + shift
    return conv_like(conv, conv.weight.double() * scale.view(-1, 1, 1, 1), bias)


def conv_like(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, **geometry: object) -> nn.Conv2d:
    """A convolution with these float64 values in `conv`'s type, and its geometry unless given."""
    settings = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
    settings |= geometry
    new = nn.Conv2d(
        weight.shape[1] * int(settings["groups"]),  # type: ignore[call-overload]
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        bias=bias is not None,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
        **settings,
    )
    with torch.no_grad():
        new.weight.copy_(weight)
        if bias is not None and new.bias is not None:
            new.bias.copy_(bias)
    return new.requires_grad_(False)
