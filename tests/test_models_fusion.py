"""Exact deploy fusion: equal outputs for every SPD YAML with random statistics, and nothing of SPD left."""

from typing import Any

import pytest
import torch
from torch import nn

from models import build_model, find_cfg
from models.fusion import absorb_spd, fuse, is_spd_fusible
from models.spd import SPD, space_to_depth
from models.summary import count_parameters
from utils.core.yamls import load_yaml

DETECTORS = ["yolov5-spd-n", "yolov5-spdconv-n", "yolov5-spd-n-p2"]
LARGER = [f"yolov5-spd-{s}" for s in "smlx"] + [f"yolov5-spdconv-{s}" for s in "sml"]
CLASSIFIERS = ["resnet18-spd", "resnet18-spd-authors"]


def randomized(model: nn.Module, dtype: torch.dtype) -> Any:
    """The model in eval mode with batch normalization that does something."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.3, 2)
    return model.to(dtype).eval()


def left(model: nn.Module, *kinds: type[nn.Module]) -> int:
    return sum(isinstance(m, kinds) for m in model.modules())


@pytest.mark.parametrize("name", DETECTORS + [pytest.param(n, marks=pytest.mark.slow) for n in LARGER])
def test_detectors_stay_equal(name: str) -> None:
    """1e-8 pixels in float64 and 5e-3 in float32, without normalization or SPD; the input model is not touched."""
    for dtype, limit in ((torch.float64, 1e-8), (torch.float32, 5e-3)):
        model = randomized(build_model(name), dtype)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        rows = list(model.rows)
        fused = fuse(model)
        x = torch.rand(2, 3, 64, 96, dtype=dtype)
        with torch.no_grad():
            difference = (fused.predict(x) - model.predict(x)).abs().max()
        assert difference < limit
        assert left(fused, nn.BatchNorm2d, SPD) == 0 and not any(row.name == "nn.Upsample" for row in fused.rows)
        assert len(fused.fusion_report) >= 9 and not any("stays" in line for line in fused.fusion_report)
        assert model.rows == rows and not model.fusion_report
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert fused.cfg == model.cfg and fused.strides == model.strides


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_stay_equal(name: str) -> None:
    cfg = {**load_yaml(find_cfg(name)), "width_multiple": 0.25}
    model = randomized(build_model(cfg, nc=5), torch.float64)
    fused = fuse(model)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(fused(x), model(x), rtol=1e-10, atol=1e-10)
    assert left(fused, nn.BatchNorm2d, SPD) == 0


def test_plain_network_has_the_published_fused_size() -> None:
    """1,867,405 parameters: what YOLOv5 prints for the fused yolov5n."""
    assert count_parameters(fuse(build_model("yolov5n"))) == 1_867_405


@pytest.mark.parametrize("scale", [2, 3, (1, 2)])
@pytest.mark.parametrize(
    "conv", [{"kernel_size": 1}, {"kernel_size": 3, "padding": 1}, {"kernel_size": (1, 3), "padding": (0, 1)},
             {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2}, {"kernel_size": 2, "bias": False}],
    ids=str,
)  # fmt: skip
def test_spd_and_convolution_are_one_convolution(scale: Any, conv: dict[str, Any]) -> None:
    x = torch.rand(2, 3, 24, 36, dtype=torch.float64)
    deep = space_to_depth(x, scale)
    layer = nn.Conv2d(deep.shape[1], 5, **conv).double()
    assert torch.allclose(absorb_spd(layer, scale)(x), layer(deep), atol=1e-12)


def test_grouped_convolutions_are_not_fusible() -> None:
    assert not is_spd_fusible(nn.Conv2d(8, 8, 3, groups=2))


def build(*layers: list[Any], head: list[int]) -> Any:
    cfg = {
        "nc": 2,
        "anchors": [[8, 8, 16, 16]] * len(head),
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], *layers],
        "head": [[head, 1, "Detect", ["nc", "anchors"]]],
    }
    return randomized(build_model(cfg), torch.float64)


@pytest.mark.parametrize(
    ("layers", "head", "stays"),
    [
        ([[-1, 1, "SPD", []], [-1, 1, "nn.MaxPool2d", [3, 1, 1]]], [2], "nn.MaxPool2d"),
        ([[-1, 1, "SPD", []], [-1, 1, "DWConv", [32, 3]]], [2], "grouped"),
        ([[-1, 1, "SPD", []], [-1, 1, "Bottleneck", [32]]], [2], "Bottleneck"),
        ([[-1, 1, "SPD", []], [-1, 1, "Conv", [8, 1]], [1, 1, "nn.SiLU", []]], [2, 3], "nn.SiLU"),
        ([[-1, 1, "SPD", []], [-1, 1, "Conv", [8, 1]], [[1, 2], 1, "Concat", [1]]], [3], "through a Concat"),
        ([[-1, 1, "SPD", []]], [1], ""),
        ([[-1, 1, "SPD", []], [-1, 1, "Bottleneck", [16, False]], [1, 1, "C3", [8]]], [2, 3], ""),
        ([[-1, 1, "SPD", []], [-1, 1, "Conv", [8, 3]], [[1, 2], 1, "Concat", [1]], [-1, 1, "C3", [8]]], [4], ""),
        ([[-1, 1, "SPD", []], [[1, 1], 1, "Concat", [1]], [-1, 1, "SPPF", [8]]], [3], ""),
        ([[-1, 1, "SPD", []], [-1, 1, "BottleneckCSP", [8]]], [2], ""),
        ([[-1, 1, "SPD", [4]], [-1, 1, "GhostConv", [16, 3]]], [2], ""),
        ([[-1, 2, "SPDConv", [8, 3]]], [1], ""),
        ([[-1, 1, "SPD", []], [-1, 1, "nn.Conv2d", [8, 3, 1, 1]], [-1, 1, "C3TR", [16]]], [3], ""),
    ],
)
def test_any_graph(layers: list[Any], head: list[int], stays: str) -> None:
    """What can be fused is, what cannot stays and is named, and the outputs are equal either way."""
    model = build(*layers, head=head)
    fused = fuse(model)
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(fused.predict(x), model.predict(x), atol=1e-10)
    kept = [line for line in fused.fusion_report if "stays" in line]
    assert bool(kept) == bool(stays) == bool(left(fused, SPD)) and all(stays in line for line in kept)


UP = [-1, 1, "nn.Upsample", ["None", 2, "nearest"]]


@pytest.mark.parametrize(
    ("layers", "head", "late"),
    [
        ([[-1, 1, "Conv", [8, 3, 2]], UP, [[2, 0], 1, "Concat", [1]], [-1, 1, "C3", [8]]], [4], True),
        ([[-1, 1, "SPD", []], UP, [[0, 2], 1, "Concat", [1]], [-1, 1, "Conv", [8, 1]]], [4], True),
        ([UP, [-2, 1, "Conv", [8, 1]], [-1, 1, "SPD", []], UP, UP, [[1, -1], 1, "Concat", [1]],
          [-1, 1, "Conv", [8, 1]]], [7], True),
        ([[-1, 1, "Conv", [8, 3, 2]], UP, [[2, 0], 1, "Concat", [1]], [-1, 1, "Conv", [8, 3]]], [4], False),
        ([[-1, 1, "Conv", [8, 3, 2]], UP, [[2, 0], 1, "Concat", [1]], [-1, 1, "Conv", [8, 1, 2]]], [4], False),
        ([[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "nn.Upsample", ["None", 2, "bilinear"]], [[2, 0], 1, "Concat", [1]],
          [-1, 1, "C3", [8]]], [4], False),
        ([[-1, 1, "Conv", [8, 3, 2]], UP, [[2, 0], 1, "Concat", [1]], [-1, 1, "C3", [8]]], [2, 4], False),
        ([[-1, 1, "Conv", [8, 3, 2]], UP, [-1, 1, "Conv", [8, 1]]], [3], False),
    ],
)  # fmt: skip
def test_upsampling_late(layers: list[Any], head: list[int], late: bool) -> None:
    """Nearest upsampling moves behind the 1x1 convolutions of a concatenation, and stays anywhere else."""
    model = build(*layers, head=head)
    fused = fuse(model)
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(fused.predict(x), model.predict(x), atol=1e-10)
    assert any("Upsample behind the 1x1" in line for line in fused.fusion_report) == late


def test_fusing_twice_changes_nothing() -> None:
    once = fuse(randomized(build_model("yolov5-spd-n", nc=2), torch.float64))
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(fuse(once).predict(x), once.predict(x))


def test_memory_format_does_not_matter() -> None:
    fused = fuse(randomized(build_model("yolov5-spd-n", nc=2), torch.float32))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        plain = fused.predict(x)
        last = fused.to(memory_format=torch.channels_last).predict(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(plain, last, atol=1e-3)
