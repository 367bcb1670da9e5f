"""A neck site that cannot be preserved, started as near as possible.

The source has a strided convolution whose output is concatenated with a lateral map and read by 1x1 convolutions. The
target reads SPD of the input and the lateral map by one convolution with fewer channels than the concatenation had, and
with a further BatchNorm and activation. Of what the readers used, the target keeps the part with most energy: single
channels of the strided convolution, which need their own activation, and linear combinations of lateral channels, which
pass the activation where it is linear. Means of what is lost go into the readers' BatchNorm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.blocks import BN_EPS, Conv

SHIFT = 8.0  # standard deviations above zero, where SiLU(z + SHIFT) is z + SHIFT to 3e-3
NEARLY_LINEAR = (nn.SiLU, nn.ReLU, nn.LeakyReLU, nn.Hardswish, nn.GELU, nn.Mish)  # at large inputs


@dataclass(frozen=True)
class Site:
    """The source's side: the strided convolution, the lateral map's layer, and the tensors of the reader."""

    down: Conv
    lateral: nn.Module
    kernel: Tensor  # of the strided convolution, over SPD blocks
    down_first: bool  # in the concatenation
    reader: Mapping[str, Tensor]
    reading: tuple[str, ...]  # names of the reader's 1x1 weights


@dataclass(frozen=True)
class Merged:
    """Tensors for the target's convolution and its reader, and the share of the readers' input energy that is kept."""

    conv: dict[str, Tensor]
    reader: dict[str, Tensor]
    kept: float


def merge_rows(site: Site, conv: Conv) -> Merged:
    """The target's `conv` and reader for a site."""
    n_own = len(site.kernel)
    weights = torch.cat([site.reader[key].flatten(1) for key in site.reading])
    n_side = weights.shape[1] - n_own
    parts = weights.split((n_own, n_side) if site.down_first else (n_side, n_own), 1)
    own, lateral = parts if site.down_first else parts[::-1]
    gains = torch.cat([_gain(site.reader, _norm(key)) for key in site.reading])
    moments = (output_moments(site.down, n_own), output_moments(site.lateral, n_side))
    choice = choose_channels(own, lateral, gains, moments, conv.conv.out_channels)
    reader = dict(site.reader)
    sizes = [len(site.reader[key]) for key in site.reading]
    for key, new, lack in zip(site.reading, choice.readers.split(sizes), choice.bias.split(sizes), strict=True):
        mean = f"{_norm(key)}.running_mean"
        reader[key] = new[:, :, None, None].float()
        reader[mean] = (site.reader[mean].double() - lack).float()
    return Merged(_conv_state(site, choice, conv), reader, choice.kept)


def _norm(weight: str) -> str:
    """The BatchNorm behind a convolution of a Conv."""
    return weight.replace(".conv.weight", ".bn")


def _gain(state: Mapping[str, Tensor], norm: str) -> Tensor:
    """How strongly a BatchNorm passes on each channel."""
    gain = state[f"{norm}.weight"].abs() / (state[f"{norm}.running_var"] + BN_EPS).sqrt()
    return gain.clamp(min=1e-6)


def _conv_state(site: Site, choice: Choice, conv: Conv) -> dict[str, Tensor]:
    """The kept channels of the strided convolution with their BatchNorm, then the combinations, shifted by SHIFT."""
    weight = torch.zeros(conv.conv.weight.shape, dtype=torch.float64)
    count, blocks, n_side = len(choice.own), site.kernel.shape[1], choice.basis.shape[1]
    first, second = slice(0, blocks), slice(blocks, None)
    if not site.down_first:
        first, second = slice(n_side, None), slice(0, n_side)
    weight[:count, first] = site.kernel[choice.own].double()
    weight[count:, second, weight.shape[2] // 2, weight.shape[3] // 2] = choice.basis
    state = {"conv.weight": weight.float(), "bn.num_batches_tracked": site.down.bn.num_batches_tracked}
    rest = {"weight": 1.0, "bias": SHIFT, "running_mean": choice.offsets, "running_var": 1 - conv.bn.eps}
    for key, value in rest.items():
        kept = site.down.state_dict()[f"bn.{key}"][choice.own]
        more = torch.zeros(len(weight) - count, dtype=torch.float64) + value
        state[f"bn.{key}"] = torch.cat((kept.double(), more)).float()
    return state


@dataclass(frozen=True)
class Choice:
    """`K` kept channels: first `own` of the strided convolution, then `basis` [r, lateral] with zero-mean outputs."""

    own: Tensor  # indices of channels of the strided convolution
    basis: Tensor  # [r, lateral channels], each row a combination of unit variance
    offsets: Tensor  # [r], the means of the combinations
    readers: Tensor  # [M, K], the new weights of the reading convolutions
    bias: Tensor  # [M], what the readers' outputs lack
    kept: float  # share of the energy


def output_moments(layer: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each output channel of a Conv, from its BatchNorm; (0, 1) for other layers.

    Before the activation a channel has about the mean `bias` and the deviation |weight| of its BatchNorm.
    """
    if not isinstance(layer, Conv):
        return torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
    z = torch.linspace(-6, 6, 241, dtype=torch.float64)
    weights = torch.exp(-z.square() / 2)
    weights /= weights.sum()
    mean, deviation = layer.bn.bias.detach().double(), layer.bn.weight.detach().double().abs()
    y = layer.act(mean[:, None] + deviation[:, None] * z)
    first = y @ weights
    return first, ((y - first[:, None]).square() @ weights).clamp(min=1e-12).sqrt()


def choose_channels(
    own: Tensor, lateral: Tensor, gains: Tensor, moments: tuple[tuple[Tensor, Tensor], ...], width: int
) -> Choice:
    """Choose `width` channels for readers `own` [M, c] and `lateral` [M, d] of the strided and the lateral channels.

    `gains` [M] is how much each reader's output counts; `moments` are those of the two groups of channels.
    """
    (own_mean, own_std), (lateral_mean, lateral_std) = moments
    own, lateral, gains = own.double(), lateral.double(), gains.double()
    energy = ((gains[:, None] * own * own_std) ** 2).sum(0)
    u, s, v = torch.linalg.svd(gains[:, None] * lateral * lateral_std, full_matrices=False)
    ranked = torch.cat((energy, s.square())).argsort(descending=True)[:width]
    single = ranked[ranked < len(energy)].sort().values
    combined = (ranked[ranked >= len(energy)] - len(energy)).sort().values
    basis = v[combined] / lateral_std
    loadings = u[:, combined] * s[combined] / gains[:, None]
    dropped = torch.ones(len(energy), dtype=torch.bool)
    dropped[single] = False
    bias = own[:, dropped] @ own_mean[dropped] + lateral @ lateral_mean - SHIFT * loadings.sum(1)
    total = energy.sum() + s.square().sum()
    kept = (energy[single].sum() + s[combined].square().sum()) / total
    return Choice(single, basis, basis @ lateral_mean, torch.cat((own[:, single], loadings), 1), bias, float(kept))
