"""Strided layers replaced by SPD-Conv: equal outputs for any kernel, stride, padding and size; a complete report."""

import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.spd import replace_strides, space_to_depth
from models.stride_layers import BlockConv, Squeezed, Window, lift_kernel
from utils.core.errors import UserError

VARIANTS = ("conv-spd", "spd-conv")


def same(module: nn.Module, x: Tensor, tolerance: float = 2e-6, **options: Any) -> Any:
    """Replace inside `module`, compare the outputs before and after in float64 terms of their magnitude."""
    module.eval()
    with torch.no_grad():
        expected = module(x)
        report = replace_strides(module, example=x, **options)
        found = module(x)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)
    return report


CONVS = [
    dict(kernel_size=k, stride=s, padding=p, dilation=d, groups=g)
    for k, s, p, d, g in itertools.product((1, 2, 3, 6, 7), (2, 3, 4), (0, 1, 3), (1, 2), (1, 2, 4))
    if p <= k
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_convolutions(variant: str) -> None:
    """60 draws of kernel, stride, padding, dilation, groups and odd sizes, against torch's own strided convolution."""
    for options in random.Random(0).sample(CONVS, 60):
        height, width = random.Random(str(options)).choices(range(13, 30), k=2)
        net = nn.Sequential(nn.Conv2d(4, 8, **options))
        report = same(net, torch.randn(2, 4, height, width), variant=variant)
        assert len(report.sites) == 1 and not report.skipped


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=(3, 5), stride=(2, 1), padding=(1, 2)),
        dict(kernel_size=(1, 3), stride=(1, 3), padding=(0, 1)),
        dict(kernel_size=3, stride=(3, 2), padding=0, bias=False),
        dict(kernel_size=4, stride=4, padding="valid"),
        dict(kernel_size=3, stride=2, padding=1, padding_mode="reflect"),
        dict(kernel_size=5, stride=2, padding=2, padding_mode="circular"),
        dict(kernel_size=3, stride=2, padding=1, padding_mode="replicate", groups=2),
    ],
)
def test_convolutions_of_unequal_sides_and_other_padding(variant: str, options: dict) -> None:
    same(nn.Sequential(nn.Conv2d(4, 6, **options)), torch.randn(1, 4, 17, 22), variant=variant)


@pytest.mark.parametrize("kind", [nn.MaxPool2d, nn.AvgPool2d])
def test_pooling(kind: type[nn.Module]) -> None:
    """All windows with padding up to half of the kernel, ceil_mode, and sizes that leave a rest."""
    for k, s, ceil, size in itertools.product((1, 2, 3, 5), (2, 3), (False, True), (7, 8, 9, 10)):
        for padding in {0, k // 2}:
            extra: dict[str, Any] = {"dilation": 2} if kind is nn.MaxPool2d and size == 9 and k == 3 else {}
            pool = kind(k, s, padding, ceil_mode=ceil, **extra)
            same(nn.Sequential(pool), torch.randn(1, 3, size, size + 1) - 5)


@pytest.mark.parametrize("options", [dict(count_include_pad=False), dict(divisor_override=3), dict(ceil_mode=True)])
def test_average_pooling_divisors(options: dict) -> None:
    for size in (8, 9, 10):
        same(nn.Sequential(nn.AvgPool2d(3, 2, 1, **options)), torch.randn(2, 3, size, 11))


def test_pooling_with_unequal_sides() -> None:
    same(nn.Sequential(nn.MaxPool2d((2, 3), (1, 2), (0, 1))), torch.randn(1, 2, 9, 12))
    same(nn.Sequential(nn.AvgPool2d((2, 1))), torch.randn(1, 2, 9, 12))


def test_lifted_kernel_is_a_strided_convolution_without_stride() -> None:
    """The mathematics, apart from any layer: conv(SPD(x), lifted) on a padded input, tap by tap."""
    weight, x = torch.randn(5, 3, 6, 6), torch.randn(2, 3, 16, 16)
    lifted = lift_kernel(weight, Window((6, 6), (2, 2), (2, 2)))
    assert lifted.shape == (5, 12, 3, 3) and int((lifted != 0).sum()) == weight.numel()
    expected = F.conv2d(x, weight, stride=2, padding=2)
    assert torch.allclose(F.conv2d(space_to_depth(x), lifted, padding=1), expected, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_flow_into_the_new_blocks(variant: str) -> None:
    """Preserved at the start, trainable after: blocks that begin at zero receive gradients."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.MaxPool2d(2))
    replace_strides(net, variant=variant)
    net(torch.randn(2, 3, 16, 16)).square().sum().backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
    kernel = (net[0].conv if variant == "spd-conv" else net[0].squeeze).weight
    assert bool((kernel.grad[kernel == 0] != 0).any())


def test_grouped_convolutions_keep_their_groups() -> None:
    for variant in VARIANTS:
        net = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8))
        replace_strides(net, variant=variant)
        assert {m.groups for m in net.modules() if isinstance(m, nn.Conv2d)} == {8}


@pytest.mark.parametrize("variant", VARIANTS)
def test_fresh(variant: str) -> None:
    """A fresh start has new weights, odd kernels around the old receptive field, and the same output sizes."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.AvgPool2d(2))
    x = torch.randn(1, 3, 65, 90)
    before = net(x)
    replace_strides(net, init="fresh", variant=variant)
    after = net(x)
    assert after.shape == before.shape and not torch.allclose(after, before)
    assert isinstance(net[1], BlockConv) and isinstance(net[3], BlockConv)
    assert net[1].conv.kernel_size == (3, 3) and net[3].conv.kernel_size == (1, 1)
    assert isinstance(net[0], Squeezed if variant == "conv-spd" else BlockConv)
    assert not any(max(m.stride) > 1 for m in net.modules() if isinstance(m, nn.Conv2d))


class Odd(nn.Conv2d):
    """A subclass, which may compute anything."""


class Mixed(nn.Module):
    """Down-samples in every way that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Conv2d(3, 4, 3, 2, 1)
        self.odd = Odd(4, 4, 3, 2, 1)
        self.indexed = nn.MaxPool2d(2, return_indices=True)
        self.idle = nn.MaxPool2d(2)
        self.shared = nn.AvgPool2d(2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 2, 2))
        self.line = nn.Conv1d(4, 4, 2, 2)
        self.fixed = nn.AdaptiveAvgPool2d(2)
        self.mean = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.indexed(self.odd(self.good(x)))[0]
        self.shared(x[:, :2])
        x = self.shared(x)
        x = F.max_pool2d(self.normed(x), 2)
        x = x[..., ::2, :]
        return self.mean(self.fixed(x)) + self.line(x.flatten(2)).mean()


def test_everything_left_alone_is_listed() -> None:
    report = replace_strides(Mixed())
    reasons = dict(report.skipped)
    assert [site.name for site in report.sites] == ["good"]
    assert "subclass of Conv2d" in reasons["odd"] and "subclass" in reasons["normed"]
    assert "return_indices" in reasons["indexed"] and "not used" in reasons["idle"]
    assert "2 and 4 channels" in reasons["shared"] and "not two-dimensional" in reasons["line"]
    assert "fixed size" in reasons["fixed"] and "mean" not in reasons
    assert [reason for _, reason in report.skipped if "not a layer" in reason] == [
        "the function max_pool2d in its forward, not a layer",
        "a slice with a step in its forward, not a layer",
    ]
    assert "1 sites converted" in str(report) and "not converted: odd" in str(report)


def test_pooling_can_stay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2))
    report = replace_strides(net, pooling=False)
    assert len(report.sites) == 1 and not report.skipped and isinstance(net[1], nn.MaxPool2d)


def test_shared_layers_are_replaced_everywhere() -> None:
    conv = nn.Conv2d(3, 3, 3, 2, 1)
    net = nn.Sequential(conv, nn.Sequential(conv))
    same(net, torch.randn(1, 3, 21, 21))
    assert net[0] is net[1][0] and net[0] is not conv


def test_mode_dtype_and_frozen_state_are_kept() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.MaxPool2d(2)).double().train()
    net[0].requires_grad_(False)
    report = replace_strides(net)
    assert net.training and net[0].training and {p.dtype for p in net.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in net[0].parameters()) and net[1].squeeze.weight.requires_grad
    assert report.added == sum(site.after - site.before for site in report.sites)
    assert report.parameters == sum(p.numel() for p in net.parameters())


def test_a_frozen_bias_beside_a_free_weight() -> None:
    for variant in VARIANTS:
        net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1))
        net[0].bias.requires_grad_(False)
        replace_strides(net, variant=variant)
        assert [name for name, p in net.named_parameters() if not p.requires_grad] == [
            f"0.{'layer' if variant == 'conv-spd' else 'conv'}.bias"
        ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_without_a_batch(variant: str) -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, groups=2), nn.MaxPool2d(2), nn.AvgPool2d(2))
    same(net, torch.randn(4, 33, 30), variant=variant)


def test_double_precision_is_kept() -> None:
    for options in (dict(), dict(count_include_pad=False), dict(ceil_mode=True), dict(divisor_override=7)):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.AvgPool2d(3, 2, 1, **options)).double()
        same(net, torch.randn(1, 3, 21, 22, dtype=torch.float64), tolerance=1e-14)


def test_a_module_without_parameters_takes_the_type_of_the_example() -> None:
    for pool in (nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1, ceil_mode=True)):
        same(nn.Sequential(pool), torch.randn(1, 3, 21, 22, dtype=torch.float64), tolerance=1e-14)


def test_lazy_layers_take_their_sizes_from_the_example() -> None:
    net = nn.Sequential(nn.LazyConv2d(4, 3, 2, 1), nn.LazyConv2d(4, 3, 2, 1))
    assert len(replace_strides(net, example=torch.randn(1, 5, 16, 16)).sites) == 2 and net[0].layer.in_channels == 5
    assert len(replace_strides(nn.Sequential(nn.LazyConv2d(4, 3, 2, 1))).sites) == 1
    with pytest.raises(UserError, match="lazy layers without sizes.*pass example="):
        replace_strides(nn.Sequential(nn.Linear(3, 4), nn.LazyConv2d(4, 3, 2, 1)))


def test_layers_that_do_more_than_their_type_says() -> None:
    """Hooks of the backward pass, and a forward that was exchanged on the object, would be lost."""
    hooked, exchanged = nn.Conv2d(3, 3, 3, 2, 1), nn.Conv2d(3, 3, 3, 2, 1)
    hooked.register_full_backward_hook(lambda *_: None)
    exchanged.forward = lambda x: 2 * nn.Conv2d.forward(exchanged, x)
    report = replace_strides(nn.Sequential(hooked, exchanged, nn.LPPool2d(2, 2)))
    assert dict(report.skipped) == {
        "0": "it has hooks (such as weight normalization)",
        "1": "its forward was exchanged, it may compute something else",
        "2": "LPPool2d has no SPD form",
    }


def test_functions_called_with_keywords_are_seen() -> None:
    class Keyword(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(input=x, kernel_size=2)

    assert [reason for _, reason in replace_strides(Keyword()).skipped] == [
        "the function max_pool2d in its forward, not a layer"
    ]


class Functional(nn.Module):
    """Uses a layer's weight in a function, on request beside the layer itself."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.conv, self.both = nn.Conv2d(3, 4, 3, 2, 1), both

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.conv.weight, self.conv.bias, self.conv.stride, self.conv.padding)
        return y + self.conv(input=x) if self.both else y


@pytest.mark.parametrize("both", [False, True])
def test_weights_used_by_functions_stay(both: bool) -> None:
    net = Functional(both)
    report = same(net, torch.randn(1, 3, 9, 9))
    assert not report.sites and report.skipped == (
        ("conv", "its weight is used outside of its own forward"),
        ("(the module itself)", "the function conv2d in its forward, not a layer"),
    )


def test_convolutions_without_use_stay() -> None:
    """As pooling does; a layer that is called by keyword is in use."""

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(input=x.to(next(self.parameters()).dtype))

    report = replace_strides(Idle())
    assert [site.name for site in report.sites] == ["used"]
    assert report.skipped == (("idle", "it was not used on the example input"),)


def test_tied_weights_stay_tied() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 2, 1))
    net[2].weight = net[1].weight
    report = same(net, torch.randn(1, 3, 17, 17))
    assert [site.name for site in report.sites] == ["0"] and net[2].weight is net[1].weight
    assert report.skipped == (("2", "its weight is shared with 1.weight"),)


def test_layers_that_resample_are_listed() -> None:
    net = nn.Sequential(
        nn.Upsample(scale_factor=0.75), nn.Upsample(scale_factor=(2.0, 0.5)), nn.Upsample(scale_factor=2.0),
        nn.PixelUnshuffle(2), nn.Upsample(size=(8, 8)), nn.Upsample(size=(20, 20)),
    )  # fmt: skip
    assert dict(replace_strides(net).skipped) == {
        "0": "Upsample by 0.75 has no SPD form",
        "1": "Upsample by (2.0, 0.5) has no SPD form",
        "3": "PixelUnshuffle is SPD already, in another order of channels",
        "4": "the function interpolate in its forward, not a layer",
    }


def test_a_module_that_does_not_run_on_an_image() -> None:
    """Without a run, convolutions are replaced and pooling is listed; with the right example both are replaced."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 2, 2), nn.MaxPool2d(2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.pool(self.conv(a) + self.conv(b))

    report = replace_strides(Two())
    assert [s.name for s in report.sites] == ["conv"] and "pass example=" in dict(report.skipped)["pool"]
    assert len(replace_strides(Two(), example=(torch.randn(1, 3, 8, 8),) * 2).sites) == 2


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(UserError, match="wrap it"):
        replace_strides(nn.Conv2d(3, 3, 2, 2))
    with pytest.raises(UserError, match="TorchScript"):
        replace_strides(torch.jit.trace(nn.Sequential(nn.Conv2d(3, 3, 2, 2)), torch.zeros(1, 3, 4, 4)))
    with pytest.raises(UserError, match="meta device"):
        replace_strides(nn.Sequential(nn.Conv2d(3, 3, 2, 2, device="meta")))
    with pytest.raises(UserError, match="preserve or fresh"):
        replace_strides(nn.Sequential(), init="kept")
    with pytest.raises(UserError, match="conv-spd or spd-conv"):
        replace_strides(nn.Sequential(), variant="spd")


@pytest.mark.slow
def test_the_result_exports() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, ceil_mode=True)).eval()
    replace_strides(net)
    x = torch.randn(1, 3, 61, 35)
    assert torch.allclose(torch.export.export(net, (x,)).module()(x), net(x), atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_result_exports_with_open_sides(variant: str) -> None:
    """One program for all image sizes, as of the original network; values are moved only, so outputs are equal."""
    net = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, groups=2), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 4, 5, (3, 2), 2)).eval()
    replace_strides(net, variant=variant)
    sides = {axis: torch.export.Dim(name, min=32, max=512) for axis, name in ((2, "height"), (3, "width"))}
    program = torch.export.export(net, (torch.randn(1, 4, 61, 35),), dynamic_shapes=(sides,)).module()
    for size in ((61, 35), (64, 50)):
        x = torch.randn(1, 4, *size)
        assert torch.equal(program(x), net(x))


def with_statistics(model: nn.Module) -> nn.Module:
    """BatchNorm statistics that are not trivial, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_torchvision_classifiers(name: str, variant: str) -> None:
    models = pytest.importorskip("torchvision").models
    model = with_statistics(models.get_model(name, weights=None, num_classes=10))
    report = same(model, torch.randn(1, 3, 75, 98), variant=variant)
    assert report.sites and not report.skipped
    remaining = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d)) and m.stride not in (1, (1, 1))]
    assert not remaining


CLASSIFIERS = [
    "resnet50", "resnext50_32x4d", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf", "densenet121",
    "convnext_tiny", "vgg11_bn", "googlenet", "shufflenet_v2_x0_5", "mnasnet0_5",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_more_torchvision_classifiers(name: str, variant: str) -> None:
    models = pytest.importorskip("torchvision").models
    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = with_statistics(models.get_model(name, weights=None, **extra))
    assert same(model, torch.randn(1, 3, 149, 182), 1e-5, variant=variant).sites


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn", "ssd300_vgg16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_torchvision_detectors(name: str, variant: str) -> None:
    """The raw outputs that the boxes are made of stay equal: backbone features, class scores and box offsets."""
    detection = pytest.importorskip("torchvision").models.detection
    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=5).eval()
    x = torch.rand(1, 3, 321, 350)
    with torch.no_grad():
        expected = model.backbone(x)
        report = replace_strides(model, variant=variant, example=torch.rand(1, 3, 320, 320))
        found = model.backbone(x)
    assert len(report.sites) >= 5
    for key in expected:
        scale = expected[key].abs().max().clamp(min=1e-3)
        assert (found[key] - expected[key]).abs().max() <= 1e-5 * scale, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet10t", "regnetx_002", "mobilenetv3_small_050", "convnext_atto", "dla34"])
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = with_statistics(timm.create_model(name, pretrained=False))
    assert same(model, torch.randn(1, 3, 160, 192), 1e-5, variant="spd-conv").sites
