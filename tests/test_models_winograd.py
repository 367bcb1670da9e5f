"""Winograd's convolution against PyTorch's, and which convolutions it takes the place of."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from models import build_model, winograd
from models.backends.pytorch import PyTorchPredictor
from models.winograd import WinogradConv2d, use_winograd


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (1, 1), (13, 22), (40, 3)])
def test_equals_convolution(height: int, width: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding in float64 and to 1e-5 in float32, at sizes that tiles and blocks of tiles do not divide."""
    monkeypatch.setattr(winograd, "TILES", 12)
    monkeypatch.setattr(winograd, "MIN_TILES", 1)
    conv = nn.Conv2d(5, 7, 3, 1, 1, bias=bias).double().requires_grad_(False)
    x = torch.randn(3, 5, height, width, dtype=torch.float64)
    assert torch.allclose(WinogradConv2d(conv)(x), conv(x), rtol=0, atol=1e-12)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        single = x.float().contiguous(memory_format=memory_format)
        assert torch.allclose(WinogradConv2d(conv.float())(single), conv(single), rtol=0, atol=2e-5)
        conv.double()


def test_bfloat16_rounds_a_few_times_more_often() -> None:
    """On maps like those behind SiLU: below 1.5 % of the spread, where a direct convolution has a fifth of that."""
    conv = nn.Conv2d(128, 128, 3, 1, 1).requires_grad_(False)
    x = functional.silu(torch.randn(1, 128, 40, 40)).bfloat16()
    exact = conv(x.float())
    fast = WinogradConv2d(conv).bfloat16()
    assert fast.kernel.dtype == torch.bfloat16
    assert (fast(x).float() - exact).std() < 0.015 * exact.std()


def test_small_maps_go_to_the_convolution_itself() -> None:
    conv = nn.Conv2d(128, 128, 3, 1, 1).requires_grad_(False)
    x = torch.randn(2, 128, 12, 12)
    assert torch.equal(WinogradConv2d(conv)(x), conv(x))


def test_an_image_does_not_depend_on_its_batch() -> None:
    conv = WinogradConv2d(nn.Conv2d(128, 128, 3, 1, 1).requires_grad_(False))
    x = torch.randn(4, 128, 20, 20)
    assert torch.equal(conv(x)[2:3], conv(x[2:3]))


@pytest.mark.parametrize(
    ("conv", "taken"),
    [
        (nn.Conv2d(128, 128, 3, 1, 1), True),
        (nn.Conv2d(128, 256, 3, 1, 1, bias=False), True),
        (nn.Conv2d(64, 128, 3, 1, 1), False),
        (nn.Conv2d(128, 128, 3, 2, 1), False),
        (nn.Conv2d(128, 128, 3, 1, 0), False),
        (nn.Conv2d(128, 128, 3, 1, "same"), False),
        (nn.Conv2d(128, 128, 3, 1, 1, groups=2), False),
        (nn.Conv2d(128, 128, 3, 1, 1, dilation=2), False),
        (nn.Conv2d(128, 128, 3, 1, 1, padding_mode="reflect"), False),
        (nn.Conv2d(128, 128, 1), False),
    ],
    ids=str,
)
def test_only_what_gains_is_replaced(conv: nn.Conv2d, taken: bool) -> None:
    network = nn.Sequential(conv)
    use_winograd(network)
    assert isinstance(network[0], WinogradConv2d) == taken


@pytest.mark.parametrize(("half", "fuse", "taken"), [(False, True, True), (True, True, True), (False, False, False)])
def test_the_predictor_uses_it(half: bool, fuse: bool, taken: bool) -> None:
    """On the CPU, as long as fusion is not refused; in float32 the boxes are the same to a thousandth of a pixel."""
    model = build_model("yolov5-spd-n", nc=2).eval()
    predictor = PyTorchPredictor(model, ["a", "b"], imgsz=320, half=half, fuse=fuse)
    assert any(isinstance(m, WinogradConv2d) for m in predictor.network.modules()) == taken
    images = torch.rand(2, 3, 320, 320)
    reference = PyTorchPredictor(model, ["a", "b"], imgsz=320, fuse=False).infer(images)
    assert half or (predictor.infer(images) - reference).abs().max() < 1e-3
