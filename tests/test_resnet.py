"""ResNet classifiers: torchvision's outputs for the plain ones, Table 3's structure and sizes for the SPD ones."""

import re

import pytest
import torch
from torch import Tensor, nn

from models import build_model, find_cfg
from models.resnet import Classifier
from models.weights import load_model, pack_model
from utils.core.checkpoint import save_checkpoint
from utils.core.errors import UserError
from utils.core.yamls import load_yaml

CFGS = ["resnet18", "resnet50", "resnet18-spd", "resnet50-spd", "resnet18-spd-authors"]


def narrow(name: str, nc: int) -> nn.Module:
    """A network of a model YAML at a quarter of its width."""
    return build_model({**load_yaml(find_cfg(name)), "width_multiple": 0.25}, nc=nc)


def renamed(name: str) -> str:
    """torchvision's name of a tensor in the place of ours (rows 2 to 5 are its layers 1 to 4)."""
    row, rest = re.match(r"model\.(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
    if row == "0":
        return rest.replace("conv.", "conv1.").replace("bn.", "bn1.")
    return rest if row == "6" else f"layer{int(row) - 1}.{rest.removeprefix('m.')}"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_plain_networks_are_torchvisions(name: str) -> None:
    """Same tensors, same outputs: the oracle's randomly filled weights, copied by name."""
    oracle = pytest.importorskip("torchvision").models.get_model(name, weights=None, num_classes=7).eval()
    for module in oracle.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    model = build_model(name, nc=7).eval()
    theirs = oracle.state_dict()
    assert sorted(map(renamed, model.state_dict())) == sorted(theirs)
    model.load_state_dict({key: theirs[renamed(key)] for key in model.state_dict()})
    x = torch.randn(2, 3, 75, 64)
    with torch.no_grad():
        assert torch.allclose(model(x), oracle(x), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet18", 11.279), ("resnet50", 23.918), ("resnet18-spd", 14.374), ("resnet18-spd-authors", 28.038)],
)
def test_parameters_with_200_classes(name: str, millions: float) -> None:
    """Plain: torchvision's counts. SPD: 14.4 M in the reading of Table 3, 28.0 M as the released code builds it."""
    count = sum(p.numel() for p in build_model(name, nc=200).parameters())
    assert round(count / 1e6, 3) == millions


@pytest.mark.parametrize("name", ["resnet18-spd", "resnet50-spd"])
def test_spd_networks_have_no_stride(name: str) -> None:
    """Four SPD layers do all of the down-sampling: no strided convolution (shortcuts included), no pooling."""
    model = narrow(name, 3)
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count("SPD") == 4 and not any("Pool" in kind for kind in kinds)
    assert all(m.stride == (1, 1) for m in model.modules() if isinstance(m, nn.Conv2d))
    assert model.max_stride == 16


def test_the_authors_shortcuts_keep_their_stride() -> None:
    model = narrow("resnet18-spd-authors", 3)
    strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    assert len(strided) == 3 and all(m.kernel_size == (1, 1) for m in strided)


@pytest.mark.parametrize("name", CFGS)
def test_forward_and_backward(name: str) -> None:
    """At a quarter of the width: right shapes for an oblong image, gradients everywhere."""
    model = narrow(name, 5)
    logits = model(torch.rand(2, 3, 32, 48))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_normalization_is_part_of_the_network(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Mean and deviation travel in the configuration, so that a checkpoint needs no preprocessing of its own."""
    model = narrow("resnet18-spd", 4).eval()
    x = torch.rand(2, 3, 32, 32)
    plain = model((x - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / 0.25)
    model.set_normalization([0.4, 0.5, 0.6], [0.25] * 3)
    assert torch.allclose(model(x), plain, atol=1e-6)
    save_checkpoint(tmp_path / "x.pt", pack_model(model, list("abcd"), 32))
    again = load_model(tmp_path / "x.pt").model
    assert isinstance(again, Classifier) and torch.equal(again(x), model(x)) and again.cfg == model.cfg


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": [0.0, 1.0, 1.0]}, "std above 0"),
        ({"mean": [0.5]}, "expected 3 numbers"),
        ({"nc": "many"}, "number of classes"),
        ({"head": []}, "no head"),
        ({"head": [[-1, 1, "ConvBNReLU", [64]]]}, "Classify as the last row"),
        ({"backbone": [[-1, 1, "BasicStge", [64]]]}, "did you mean 'BasicStage'"),
        ({"backbone": [[-1, 1, "ConvBNReLU", [64]], [-1, 1, "nn.Upsample", [None, 300, "nearest"]]]}, "enlarge less"),
        ({"ch": 10**10}, "ch is 10000000000"),
    ],
)
def test_wrong_configurations_are_refused(change: dict, message: str) -> None:
    cfg = {**load_yaml(find_cfg("resnet18")), **change}
    with pytest.raises(UserError, match=message):
        build_model(cfg)


def test_odd_sizes_are_refused_by_spd() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        narrow("resnet18-spd", 2)(torch.rand(1, 3, 33, 32))


def test_rows_can_be_written_freely() -> None:
    """A small network of one's own: SPD stem, one stage."""
    rows = [[-1, 1, "SPD", [2]], [-1, 1, "ConvBNReLU", [16, 3]], [-1, 1, "BasicStage", [16]]]
    model = build_model({"task": "classify", "nc": 3, "backbone": rows, "head": [[-1, 1, "Classify", ["nc"]]]})
    x: Tensor = torch.rand(2, 3, 8, 8)
    assert model(x).shape == (2, 3) and model.max_stride == 2
