"""The detector as an object: raw maps and boxes, anchors, priors, configuration, weights in and out."""

import copy
import math
from pathlib import Path

import pytest
import torch

from models import build_model
from models.heads import Detect
from models.weights import load_model, pack_model, transfer, unpack_model
from utils.core.checkpoint import save_checkpoint
from utils.core.errors import UserError


def small(nc: int = 4) -> torch.nn.Module:
    return build_model("yolov5-spd-n", nc=nc)


def test_forward_does_not_depend_on_the_mode() -> None:
    model = small()
    x = torch.rand(2, 3, 64, 96)
    for mode in (True, False):
        maps = model.train(mode)(x)
        assert [tuple(m.shape) for m in maps] == [(2, 3, 8, 12, 9), (2, 3, 4, 6, 9), (2, 3, 2, 3, 9)]
    assert model.predict(x).shape == (2, 3 * (96 + 24 + 6), 9)


def test_decode_against_a_loop() -> None:
    """xy = (2s - 0.5 + cell) * stride, wh = (2s)^2 * anchor; order: level, row, column, anchor."""
    model = small(nc=2).eval()
    maps = [torch.randn(1, 3, h, w, 7, dtype=torch.float64) for h, w in ((4, 6), (2, 3), (1, 2))]
    expected = []
    for raw, stride, anchors in zip(maps, model.strides, model.anchors.tolist(), strict=True):
        _, na, h, w, _ = raw.shape
        for y in range(h):
            for x in range(w):
                for a in range(na):
                    s = [1 / (1 + math.exp(-v)) for v in raw[0, a, y, x].tolist()]
                    box = [(2 * s[0] - 0.5 + x) * stride, (2 * s[1] - 0.5 + y) * stride]
                    box += [(2 * s[2]) ** 2 * anchors[a][0], (2 * s[3]) ** 2 * anchors[a][1]]
                    expected.append(box + s[4:])
    assert torch.allclose(model.double().decode(maps)[0], torch.tensor(expected, dtype=torch.float64), atol=1e-9)


def test_half_precision_maps_are_decoded_in_float32() -> None:
    assert small().decode([torch.randn(1, 3, s, s, 9).half() for s in (8, 4, 2)]).dtype == torch.float32


@pytest.mark.parametrize("nc", [1, 2, 80])
def test_bias_priors(nc: int) -> None:
    """8 objects in a 640-pixel image, and a class probability of 0.6 / (nc - 1)."""
    head = small(nc).head
    for conv, stride in zip(head.m, head.strides, strict=True):
        bias = conv.bias.view(3, -1)
        assert torch.allclose(bias[:, 4].exp(), torch.tensor(8 / (640 / stride) ** 2))
        if nc > 1:
            assert torch.allclose(bias[:, 5:].exp(), torch.tensor(0.6 / (nc - 1)))
        assert torch.isfinite(bias).all()


def test_anchors_are_stored_in_cells_and_given_in_pixels() -> None:
    model = small()
    assert model.anchors[2].tolist() == [[116, 90], [156, 198], [373, 326]]
    assert torch.equal(model.state_dict()["model.30.anchors"][2] * 32, model.anchors[2])
    pixels = model.anchors * 2
    model.set_anchors(pixels)
    assert torch.equal(model.anchors, pixels) and model.cfg["anchors"] == pixels.flatten(1).tolist()
    with pytest.raises(ValueError, match="shape"):
        model.set_anchors(torch.ones(2, 3, 2))


def test_anchors_in_the_order_of_the_strides() -> None:
    model = build_model("yolov5n", anchors=[[116, 90, 156, 198], [30, 61, 62, 45], [10, 13, 16, 30]])
    assert model.anchors[0].tolist() == [[10, 13], [16, 30]]


def test_anchors_as_a_count() -> None:
    model = build_model("yolov5n", anchors=4)
    assert model.anchors.shape == (3, 4, 2) and model.cfg["anchors_from_data"]
    assert bool((model.anchors[1] == 2 * model.anchors[0]).all())
    model.set_anchors(model.anchors)
    assert not model.cfg["anchors_from_data"]


def test_configuration_rebuilds_the_same_network() -> None:
    model = small(nc=7)
    model.set_anchors(model.anchors + 1)
    again = build_model(copy.deepcopy(model.cfg))
    again.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert again.cfg == model.cfg and torch.equal(again.eval().predict(x), model.eval().predict(x))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_checkpoint_round_trip(tmp_path: Path, suffix: str) -> None:
    model = small()
    path = tmp_path / f"model{suffix}"
    save_checkpoint(path, pack_model(model, list("abcd"), 320, licence="Apache-2.0"))
    loaded = load_model(path)
    assert loaded.names == list("abcd") and not loaded.model.training
    assert loaded.meta["imgsz"] == 320 and loaded.meta["licence"] == "Apache-2.0" and loaded.meta["task"] == "detect"
    assert loaded.model.cfg == model.cfg
    own = model.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in loaded.model.state_dict().items())


def test_half_precision_checkpoint_loads_as_float32() -> None:
    data = pack_model(small(), list("abcd"), 320)
    data["state"] = {k: v.half() if v.is_floating_point() else v for k, v in data["state"].items()}
    loaded = unpack_model(data, "half")
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())


def test_packed_state_is_a_copy() -> None:
    model = small()
    data = pack_model(model, list("abcd"), 320)
    before = data["state"]["model.0.conv.bn.bias"].clone()
    model.state_dict()["model.0.conv.bn.bias"] += 1
    assert torch.equal(data["state"]["model.0.conv.bn.bias"], before)


def test_unfit_checkpoints_are_refused_in_one_line(tmp_path: Path) -> None:
    good = pack_model(small(), list("abcd"), 320)
    broken = dict(good["state"])
    broken["model.0.conv.bn.bias"] = torch.zeros(3)
    cases = [
        ({**good, "version": 99}, "version"),
        ({**good, "format": "other"}, "format"),
        ({k: v for k, v in good.items() if k != "model_cfg"}, "model_cfg"),
        ({**good, "state": broken}, "shape"),
        ({**good, "names": ["a"]}, "names 1 classes"),
        ({**good, "names": [1, 2, 3, 4]}, "a text for each"),
        ({**good, "names": 5}, "its names is a int; expected list"),
        ({**good, "names": "abcd"}, "its names is a str; expected list"),
        ({**good, "meta": [1]}, "its meta is a list; expected dict"),
        ({**good, "meta": {"imgsz": "wide"}}, "its imgsz is a str; expected int"),
        ({**good, "meta": {"licence": [1]}}, "its licence is a list; expected str"),
        ({**good, "version": "1"}, "its version is a str; expected int"),
        ({**good, "model_cfg": [1]}, "its model_cfg is a list; expected dict"),
        ({**good, "model_cfg": "/etc/passwd"}, "its model_cfg is a str; expected dict"),
        ({**good, "state": [1]}, "its state is a list; expected dict"),
    ]
    cases += [
        ({**good, "model_cfg": {**good["model_cfg"], **change}}, message)
        for change, message in (
            ({"width_multiple": 12.0}, "parameters in"),
            ({"depth_multiple": float("nan")}, "repeats layers without end"),
            ({"depth_multiple": "x"}, "its description gives no network"),
            ({"ch": 10**10}, "ch is 10000000000"),
            ({"anchors": 1e10}, "a count up to 100"),
            ({"anchors": [[float("nan")] * 6] * 3}, "above 0"),
            ({"backbone": 5}, "gives no network"),
            ({"activation": "nn.Hardtanh(1, 0)"}, "not understood"),
            ({"backbone": [[-1, 1, "nn.Upsample", [None, 300, "nearest"]]]}, "no earlier row"),
            ({"names": ["x" * 1001]}, "a text of 1001 characters"),
        )
    ]
    key = "model.0.conv.bn.bias"
    bias = good["state"][key]
    cases += [
        ({**good, "state": {**good["state"], key: tensor}}, message)
        for tensor, message in (
            (5, "no dense tensor"),
            (bias.to_sparse(), "no dense tensor"),
            (bias.to("meta"), "no dense tensor"),
            (bias.long(), "holds torch.int64, expected torch.float32"),
            (bias.to(torch.complex64), "holds torch.complex64"),
        )
    ]
    anchors = {"model.30.anchors": good["state"]["model.30.anchors"] * float("nan")}
    cases.append(({**good, "state": {**good["state"], **anchors}}, "anchors that are no sizes"))
    hollow = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in good["state"].items()}
    cases.append(({**good, "state": hollow}, "parameters in"))
    for data, message in cases:
        with pytest.raises(UserError, match=message) as error:
            unpack_model(data, "x.pt")
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    with pytest.raises(UserError, match="not found"):
        load_model(tmp_path / "none.pt")
    with pytest.raises(UserError, match="names"):
        pack_model(small(), ["a"], 320)


def test_transfer_reports_everything_and_keeps_box_outputs() -> None:
    source, target = small(nc=4), small(nc=6)
    target.set_anchors(target.anchors * 2)
    anchors = target.anchors.clone()
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p))
    state = {**source.state_dict(), "extra": torch.zeros(1)}
    del state["model.0.conv.bn.bias"]
    report = transfer(target, state)
    assert report.missing == ("model.0.conv.bn.bias",) and report.unused == ("extra",) and not report.mismatched
    assert report.partial == tuple(f"model.30.m.{i}.{kind}" for i in range(3) for kind in ("weight", "bias"))
    assert torch.equal(target.anchors, anchors)
    assert torch.equal(target.model[1].conv.weight, source.model[1].conv.weight)
    ours, theirs = (m.head.m[0].weight.view(3, -1, m.head.m[0].in_channels) for m in (target, source))
    assert torch.equal(ours[:, :5], theirs[:, :5])
    assert "in part" in str(report)


def test_transfer_refuses_other_shapes() -> None:
    report = transfer(build_model("yolov5n"), small().state_dict())
    assert report.mismatched and not report.partial


@pytest.mark.parametrize("nc", [4, 6])
def test_nothing_is_transferred_behind_new_weights(nc: int) -> None:
    """Twice as wide: BatchNorm's counters and the head's biases would fit, but belong to weights that do not."""
    report = transfer(build_model("yolov5-spd-s", nc=nc), small().state_dict())
    assert not report.loaded and not report.partial and "model.0.conv.bn.num_batches_tracked" in report.mismatched


def test_empty_batch_and_other_channels() -> None:
    assert [m.shape[0] for m in small().eval()(torch.zeros(0, 3, 64, 64))] == [0, 0, 0]
    model = build_model("yolov5n", ch=1)
    assert model(torch.rand(2, 1, 64, 64))[0].shape[0] == 2 and isinstance(model.head, Detect)
