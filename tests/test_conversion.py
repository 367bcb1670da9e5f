"""Trained weights in another architecture: equal functions where the conversion says so, and a report of the rest."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import convert
from models import build_model, find_cfg
from models.conversion import Initialization, convert_to_spd, initialise
from models.merge import output_moments
from models.weights import LoadedModel, load_model, pack_model
from models.yolo import DetectionModel
from utils.core.checkpoint import save_checkpoint
from utils.core.errors import UserError
from utils.core.yamls import dump_yaml, load_yaml


def network(cfg: str, nc: int = 4, **changes: Any) -> DetectionModel:
    """A narrow network of a model YAML with BatchNorm statistics that are not trivial, in eval mode."""
    model = build_model({**load_yaml(find_cfg(cfg)), "width_multiple": 0.125, **changes}, nc=nc)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def start(source: DetectionModel, target: nn.Module) -> Initialization:
    return initialise(target, LoadedModel(source, [f"n{i}" for i in range(source.nc)], {}))


def image(height: int = 96, width: int = 64) -> Tensor:
    return torch.rand(1, 3, height, width)


def assert_equal_outputs(a: DetectionModel, b: DetectionModel, x: Tensor) -> None:
    with torch.no_grad():
        for p, q in zip(a(x), b(x), strict=True):
            assert (p - q).abs().max() <= 2e-5 * p.abs().max()


@pytest.mark.parametrize(
    ("source", "target", "sites"), [("yolov5n", "yolov5-spd-n", 7), ("yolov5n-p2", "yolov5-spd-n-p2", 8)]
)
def test_conversion_preserves_the_function(source: str, target: str, sites: int) -> None:
    """Raw outputs of the two networks agree to float rounding, in every pixel, for several image shapes."""
    a = network(source, anchors=load_yaml(find_cfg("yolov5n"))["anchors"]) if "p2" not in source else network(source)
    b = network(target)
    report = start(a, b)
    assert report.kind == "conversion" and f"of {sites} sites" in report.lines[0]
    assert report.exact == ("p2" not in source or torch.equal(a.anchors, b.anchors))
    for shape in ((96, 64), (64, 160)):
        assert_equal_outputs(a, b, image(*shape))
    assert any("training mode" in line for line in report)


def test_the_new_blocks_start_at_zero_and_learn() -> None:
    """C3's 1x1 kernels take the old weights on block (0, 0) and zeros elsewhere; those zeros receive gradients."""
    a, b = network("yolov5n"), network("yolov5-spd-n")
    start(a, b)
    kernel, old = b.model[3].cv1.conv.weight, a.model[2].cv1.conv.weight
    channels = old.shape[1]
    assert torch.equal(kernel[:, :channels], old) and not kernel[:, channels:].any()
    sum(m.square().mean() for m in b(image())).backward()
    assert kernel.grad is not None and bool((kernel.grad[:, channels:] != 0).any())


def test_spdconv_keeps_stem_and_backbone_and_names_the_rest() -> None:
    """Features of the backbone and the finest level are equal; the two neck sites are reported as not preserved."""
    a, b = network("yolov5n"), network("yolov5-spdconv-n")
    report = start(a, b)
    assert report.kind == "conversion" and not report.exact and "of 5 sites" in report.lines[0]
    assert sum("not preserved" in line for line in report) == 2
    features: dict[str, dict[int, Tensor]] = {"a": {}, "b": {}}
    for key, model, rows in (("a", a, (0, 2, 4, 6, 9, 17)), ("b", b, (0, 3, 6, 9, 13, 21))):
        for number, row in enumerate(rows):
            model.model[row].register_forward_hook(
                lambda m, i, out, key=key, number=number: features[key].__setitem__(number, out)
            )
    x = image()
    with torch.no_grad():
        p, q = a(x), b(x)
    for number, value in features["a"].items():
        assert torch.allclose(value, features["b"][number], atol=2e-5 * float(value.abs().max()))
    assert torch.allclose(p[0], q[0], atol=1e-4)


def test_a_merge_is_much_nearer_than_nothing() -> None:
    """The two coarse levels correlate with the source's; with the neck's readers left at random they would not."""
    a, b = network("yolov5n"), network("yolov5-spdconv-n")
    start(a, b)
    with torch.no_grad():
        x = image()
        for p, q in list(zip(a(x), b(x), strict=True))[1:]:
            assert torch.corrcoef(torch.stack((p.flatten(), q.flatten())))[0, 1] > 0.5


def test_moments_of_an_activation() -> None:
    """Mean and deviation of SiLU of a normal variable, against a large sample."""
    conv = network("yolov5n").model[1]
    mean, deviation = output_moments(conv, conv.conv.out_channels)
    sample = torch.randn(200_000, 1, dtype=torch.float64) * conv.bn.weight.double().abs() + conv.bn.bias.double()
    y = torch.nn.functional.silu(sample.detach())
    assert torch.allclose(mean, y.mean(0), atol=0.01) and torch.allclose(deviation, y.std(0), atol=0.01)


def test_equal_architectures_are_copied() -> None:
    a, b = network("yolov5-spd-n"), network("yolov5-spd-n")
    report = start(a, b)
    assert report.kind == "copy" and report.exact
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("target", ["yolov5n", "yolov5-spd-n"])
def test_other_classes_keep_boxes_and_objectness(target: str) -> None:
    """With another class count the body and the first five outputs of each anchor carry over; the report says so."""
    a, b = network("yolov5n", nc=4), network(target, nc=7)
    before = b.head.m[0].bias.detach().clone()
    report = start(a, b)
    assert not report.exact and report.transfer.partial and not report.transfer.missing
    assert any("copied in part: model." in line for line in report)
    x = image()
    with torch.no_grad():
        for p, q in zip(a(x), b(x), strict=True):
            assert torch.allclose(p[..., :5], q[..., :5], atol=2e-5 * float(p.abs().max()))
    assert torch.equal(b.head.m[0].bias.view(3, -1)[:, 5:], before.view(3, -1)[:, 5:])


def test_anchors_go_with_the_head() -> None:
    a, b = network("yolov5n"), network("yolov5-spd-n")
    sizes = torch.arange(18.0).view(3, 3, 2) * 3 + 5
    a.set_anchors(sizes)
    report = start(a, b)
    assert report.exact and torch.allclose(b.anchors, sizes) and any(line.startswith("anchors") for line in report)


def output_of(network: DetectionModel, row: int, x: torch.Tensor) -> torch.Tensor:
    """What a row gives in evaluation mode."""
    seen: list[torch.Tensor] = []
    hook = network.model[row].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        network.eval()(x)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(("target", "last", "sites"), [("yolov5-spd-n-p2", 21, 5), ("yolov5n-p2", 17, 0)])
def test_rows_before_the_first_that_differs_are_kept(target: str, last: int, sites: int) -> None:
    """A P2 head on a network without: rows 0-17 of the source compute what they did; all behind stays as it was."""
    a, b = network("yolov5n"), network(target)
    before = {key: tensor.clone() for key, tensor in b.state_dict().items()}
    report = start(a, b)
    assert report.kind == "transfer" and not report.exact
    assert "no function-preserving conversion: row 18 (Conv)" in report.lines[0]
    assert f"preserved exactly: rows 0-17 of the source in rows 0-{last}" in report.lines[1]
    assert (f"{sites} sites converted" in report.lines[1]) == bool(sites)
    assert report.lines[2].startswith(f"started new: rows {last + 1}, ")
    x = image()
    features = [output_of(m, row, x) for m, row in ((a, 17), (b, last))]
    assert torch.allclose(*features, atol=2e-5 * float(features[0].abs().max()))
    for key, tensor in b.state_dict().items():
        kept = int(key.split(".")[1]) <= last
        assert (key in report.transfer.loaded) == kept and (kept or torch.equal(tensor, before[key])), key
    assert {int(key.split(".")[1]) for key in report.transfer.unused} >= {20, 23, 24}


def test_another_activation_is_no_copy() -> None:
    """All tensors fit, but the function is another one."""
    other = build_model({**load_yaml(find_cfg("yolov5n")), "activation": "nn.ReLU()"})
    report = start(network("yolov5n"), other)
    assert report.kind == "transfer" and not report.exact and not report.transfer.missing
    assert any("activations: ReLU" in line and "SiLU" in line for line in report.lines)


def test_by_name_only_rows_of_one_type() -> None:
    """Of a row that is another kind of layer nothing is taken, although names and shapes of tensors agree."""
    cfg = load_yaml(find_cfg("yolov5n"))
    cfg["backbone"][2][2] = "C3x"
    a, b = network("yolov5n"), network("yolov5n", backbone=cfg["backbone"])
    fresh = b.model[2].cv1.conv.weight.clone()
    report = start(a, b)
    assert torch.equal(b.model[2].cv1.conv.weight, fresh) and "model.2.cv1.conv.weight" in report.transfer.unused
    assert "preserved exactly: rows 0-1 of the source in rows 0-1" in report.lines
    assert torch.equal(b.model[3].conv.weight, a.model[3].conv.weight)
    assert any(line.startswith("copied by name and shape, as far as they fit: rows 3, 4") for line in report)
    assert "started new: rows 2" in report.lines


def test_without_correspondence_the_rest_is_named() -> None:
    """Another width: a partial transfer with reasons, and no half conversion."""
    a = network("yolov5n")
    wide = network("yolov5-spd-n", width_multiple=0.25)
    untouched = {k: v.clone() for k, v in wide.state_dict().items()}
    report = start(a, wide)
    assert report.kind == "transfer" and "does not fit" in report.lines[0]
    assert all(torch.equal(untouched[name], wide.state_dict()[name]) for name in report.transfer.mismatched)
    assert any("of another shape, left new" in line for line in report)


def test_other_activations_are_not_converted() -> None:
    report = start(network("yolov5n"), network("yolov5-spd-n", activation="nn.ReLU()"))
    assert report.kind == "transfer" and "activation" in report.lines[0]


def test_official_weights_convert_exactly(shared_data: Path) -> None:
    """The official yolov5n and its conversion: decoded outputs on a real picture agree to 2e-3 pixels."""
    import cv2

    path = shared_data / "weights" / "yolov5n.pt"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    loaded = load_model(path)
    target = build_model("yolov5-spd-n").eval()
    report = convert_to_spd(loaded.model.state_dict(), loaded.model.cfg, target)
    assert report.exact
    picture = cv2.resize(cv2.imread(str(shared_data / "images" / "bus.jpg")), (320, 320))[..., ::-1].copy()
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        assert (loaded.model.predict(x) - target.predict(x)).abs().max() < 2e-3


def test_convert_writes_whole_networks_only(tmp_path: Path) -> None:
    """A conversion and a copy are written; an architecture of which most would stay random is refused in one line."""
    weights = tmp_path / "n.pt"
    save_checkpoint(weights, pack_model(build_model("yolov5n", nc=2), ["a", "b"], 640))
    for cfg in ("yolov5n", "yolov5-spdconv-n"):
        assert convert.run(weights=weights, cfg=cfg, output=tmp_path / f"{cfg}.pt").path.is_file()
    for cfg in ("yolov5-spd-s", "yolov5s"):
        with pytest.raises(UserError, match=r"transferred \d+ of 348 tensors") as error:
            convert.run(weights=weights, cfg=cfg, output=tmp_path / "no.pt")
        assert "\n" not in str(error.value) and not (tmp_path / "no.pt").exists()


def test_conversion_leaves_the_source_alone() -> None:
    a = network("yolov5n")
    before = {k: v.clone() for k, v in a.state_dict().items()}
    start(a, network("yolov5-spd-n"))
    assert all(torch.equal(before[k], v) for k, v in a.state_dict().items())
    x = image()
    assert all(torch.equal(p, q) for p, q in zip(a(x), functional_call(a, before, (x,)), strict=True))


def test_exact_is_measured_not_presumed() -> None:
    """The same tensors in a graph that computes something else with them."""
    source = network("yolov5n")
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.mul_(0.3)  # else the deep features of a random network hardly vary
    cfg = load_yaml(find_cfg("yolov5n"))
    other = [[row[0], row[1], row[2], [1024, 9]] if row[2] == "SPPF" else row for row in cfg["backbone"]]
    copied = start(source, network("yolov5n", backbone=other))
    assert not copied.exact and copied.kind == "transfer" and "not the same function" in copied.lines[-1]
    spd = load_yaml(find_cfg("yolov5-spd-n"))
    without = [[*row[:3], [*row[3], False]] if row[2] == "C3" else row for row in spd["backbone"]]
    converted = start(source, network("yolov5-spd-n", backbone=without))
    assert not converted.exact and any("not the same function" in line for line in converted)


def test_a_classifier_keeps_the_normalization_of_its_weights(tmp_path: Path) -> None:
    source = build_model({**load_yaml(find_cfg("resnet18")), "width_multiple": 0.125}, nc=3).eval()
    source.set_normalization([0.4] * 3, [0.2] * 3)
    save_checkpoint(tmp_path / "a.pt", pack_model(source, ["a", "b", "c"], 32))
    bare = {**load_yaml(find_cfg("resnet18")), "width_multiple": 0.125}
    for own, exact in (({}, True), ({"mean": [0.5] * 3, "std": [0.3] * 3}, False)):
        dump_yaml(tmp_path / "net.yaml", {**bare, **own})
        cfg = str(tmp_path / "net.yaml")
        report = convert.run(weights=tmp_path / "a.pt", cfg=cfg, output=tmp_path / "b.pt", exist_ok=True)
        assert report.exact == exact and any("normalization: the" in line for line in report.lines)
        x = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(load_model(tmp_path / "b.pt").model.eval()(x), source(x)) == exact
