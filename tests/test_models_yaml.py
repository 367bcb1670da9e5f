"""YAML rows to networks: published sizes, the zoo's rules, users' own files, and errors that name the row."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import build_model, find_cfg
from models.blocks import BN_EPS, BN_MOMENTUM, Conv
from models.graph import parse_activation, read_argument
from models.registry import LAYERS
from models.spd import SPD, Focus
from models.summary import count_parameters, gflops
from utils.core.errors import UserError
from utils.core.yamls import load_yaml, parse_yaml

# 80 classes. Plain: the published tables of YOLOv5; spd: Table 4 of the paper to its digits; spdconv: counted by hand.
PARAMETERS = {
    "yolov5n": 1_872_157, "yolov5s": 7_235_389, "yolov5m": 21_190_557, "yolov5l": 46_563_709, "yolov5x": 86_749_405,
    "yolov5-spd-n": 2_256_157, "yolov5-spd-s": 8_771_389, "yolov5-spd-m": 24_646_557, "yolov5-spd-l": 52_707_709,
    "yolov5-spd-x": 96_349_405, "yolov5-spdconv-n": 3_743_517, "yolov5-spdconv-s": 14_720_829,
    "yolov5-spdconv-m": 38_032_797, "yolov5-spdconv-l": 76_505_469,
}  # fmt: skip
GFLOPS = {
    "yolov5n": 4.5, "yolov5s": 16.4, "yolov5m": 48.9, "yolov5-spd-n": 8.8, "yolov5-spd-s": 33.7, "yolov5-spd-m": 87.8,
}  # fmt: skip
HEAVY = ("yolov5l", "yolov5x", "yolov5-spd-l", "yolov5-spd-x", "yolov5-spdconv-m", "yolov5-spdconv-l")

TINY = """
nc: 80
depth_multiple: 1.0
width_multiple: 1.0
anchors:
  - [10,14, 23,27, 37,58]
  - [81,82, 135,169, 344,319]
backbone:
  [[-1, 1, Conv, [16, 3, 1]],
   [-1, 1, nn.MaxPool2d, [2, 2, 0]],
   [-1, 1, Conv, [32, 3, 1]],
   [-1, 1, nn.MaxPool2d, [2, 2, 0]],
   [-1, 1, Conv, [64, 3, 1]],
   [-1, 1, nn.MaxPool2d, [2, 2, 0]],
   [-1, 1, Conv, [128, 3, 1]],
   [-1, 1, nn.MaxPool2d, [2, 2, 0]],
   [-1, 1, Conv, [256, 3, 1]],
   [-1, 1, nn.MaxPool2d, [2, 2, 0]],
   [-1, 1, Conv, [512, 3, 1]],
   [-1, 1, nn.ZeroPad2d, [[0, 1, 0, 1]]],
   [-1, 1, nn.MaxPool2d, [2, 1, 0]]]
head:
  [[-1, 1, Conv, [1024, 3, 1]],
   [-1, 1, Conv, [256, 1, 1]],
   [-1, 1, Conv, [512, 3, 1]],
   [-2, 1, Conv, [128, 1, 1]],
   [-1, 1, nn.Upsample, [None, 2, 'nearest']],
   [[-1, 8], 1, Concat, [1]],
   [-1, 1, Conv, [256, 3, 1]],
   [[19, 15], 1, Detect, [nc, anchors]]]
"""

YOLOV3 = """
nc: 80
depth_multiple: 1.0
width_multiple: 1.0
anchors:
  - [10,13, 16,30, 33,23]
  - [30,61, 62,45, 59,119]
  - [116,90, 156,198, 373,326]
backbone:
  [[-1, 1, Conv, [32, 3, 1]],
   [-1, 1, Conv, [64, 3, 2]],
   [-1, 1, Bottleneck, [64]],
   [-1, 1, Conv, [128, 3, 2]],
   [-1, 2, Bottleneck, [128]],
   [-1, 1, Conv, [256, 3, 2]],
   [-1, 8, Bottleneck, [256]],
   [-1, 1, Conv, [512, 3, 2]],
   [-1, 8, Bottleneck, [512]],
   [-1, 1, Conv, [1024, 3, 2]],
   [-1, 4, Bottleneck, [1024]]]
head:
  [[-1, 1, Bottleneck, [1024, False]],
   [-1, 1, Conv, [512, 1, 1]],
   [-1, 1, Conv, [1024, 3, 1]],
   [-1, 1, Conv, [512, 1, 1]],
   [-1, 1, Conv, [1024, 3, 1]],
   [-2, 1, Conv, [256, 1, 1]],
   [-1, 1, nn.Upsample, [None, 2, 'nearest']],
   [[-1, 8], 1, Concat, [1]],
   [-1, 1, Bottleneck, [512, False]],
   [-1, 1, Bottleneck, [512, False]],
   [-1, 1, Conv, [256, 1, 1]],
   [-1, 1, Conv, [512, 3, 1]],
   [-2, 1, Conv, [128, 1, 1]],
   [-1, 1, nn.Upsample, [None, 2, 'nearest']],
   [[-1, 6], 1, Concat, [1]],
   [-1, 1, Bottleneck, [256, False]],
   [-1, 2, Bottleneck, [256, False]],
   [[27, 22, 15], 1, Detect, [nc, anchors]]]
"""


def rows(*layers: list[Any], **keys: Any) -> dict[str, Any]:
    """A small configuration: the given rows, then Detect on the last of them."""
    last = len(layers) - 1
    base = {"nc": 2, "anchors": [[8, 8, 16, 16]], "depth_multiple": 1.0, "width_multiple": 1.0}
    return {**base, "backbone": list(layers), "head": [[[last], 1, "Detect", ["nc", "anchors"]]], **keys}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in PARAMETERS])
def test_parameters_are_the_published_ones(name: str) -> None:
    model = build_model(name)
    assert count_parameters(model) == PARAMETERS[name]
    assert model.strides == [8, 16, 32] and model.max_stride == 32


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n.endswith("m") else n for n in GFLOPS])
def test_gflops_are_the_published_ones(name: str) -> None:
    assert gflops(build_model(name)) == pytest.approx(GFLOPS[name], abs=0.06)


@pytest.mark.parametrize(
    ("name", "millions", "strides"),
    [("yolov5n6", 3.2, [8, 16, 32, 64]), ("yolov5s6", 12.6, [8, 16, 32, 64]), ("yolov5n-p2", 1.9, [4, 8, 16, 32])],
)
def test_further_heads(name: str, millions: float, strides: list[int]) -> None:
    """The sizes of n6 and s6 are those of YOLOv5's table of models."""
    model = build_model(name)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.05)
    assert model.strides == strides


def test_other_families_build_with_their_published_size() -> None:
    """8,852,366 parameters: what YOLOv5's repository prints for yolov3-tiny with 80 classes."""
    tiny = build_model(parse_yaml(TINY))
    assert (count_parameters(tiny), tiny.strides) == (8_852_366, [16, 32])
    assert tiny.anchors[0, 0].tolist() == [10, 14]


@pytest.mark.slow
def test_yolov3_has_its_published_size() -> None:
    """61,949,149 parameters: what YOLOv5's repository prints for yolov3 with 80 classes."""
    assert count_parameters(build_model(parse_yaml(YOLOV3))) == 61_949_149


@pytest.mark.parametrize("size", "ns")
def test_matched_control_has_the_compute_of_spd(size: str) -> None:
    ratio = gflops(build_model(f"yolov5{size}-matched")) / gflops(build_model(f"yolov5-spd-{size}"))
    assert 0.97 < ratio < 1.03


def test_every_yaml_that_comes_along_is_strict_and_describes_rows(root: Any) -> None:
    paths = [*(root / "models").glob("*.yaml"), *(root / "models" / "hub").glob("*.yaml")]
    assert len(paths) > 30
    for path in paths:
        cfg = load_yaml(path)
        names = {row[2] for row in cfg["backbone"] + cfg["head"]}
        if cfg.get("task") != "classify":
            assert names <= set(LAYERS), path.name


def test_spd_has_seven_sites() -> None:
    model = build_model("yolov5-spd-n")
    sites = [m for m in model.modules() if isinstance(m, SPD)]
    assert len(sites) == 7 and isinstance(model.model[0], Focus)
    assert not [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1]


def test_authors_names_and_dead_argument() -> None:
    assert find_cfg("space_depth_n.yaml").stem == "yolov5-spd-n"
    cfg = load_yaml(find_cfg("yolov5-spd-n"))
    theirs = {key: [[f, n, "space_to_depth", [1]] if m == "SPD" else [f, n, m, a] for f, n, m, a in cfg[key]]
              for key in ("backbone", "head")}  # fmt: skip
    ours, other = build_model(cfg).eval(), build_model({**cfg, **theirs}).eval()
    other.load_state_dict(ours.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(ours.predict(x), other.predict(x))


def test_constants_of_the_family() -> None:
    norms = [m for m in build_model("yolov5-spd-n").modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all((m.eps, m.momentum) == (BN_EPS, BN_MOMENTUM) == (1e-3, 0.03) for m in norms)


def test_state_names_are_those_of_yolov5() -> None:
    names = set(build_model("yolov5n").state_dict())
    assert {
        "model.0.conv.weight", "model.0.bn.running_mean", "model.2.cv1.conv.weight", "model.2.m.0.cv2.bn.bias",
        "model.9.cv2.conv.weight", "model.24.m.0.weight", "model.24.m.2.bias", "model.24.anchors",
    } <= names  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        [-1, 1, "DWConv", [16, 3]], [-1, 2, "Bottleneck", [16]], [-1, 2, "BottleneckCSP", [16]], [-1, 2, "C3", [16]],
        [-1, 2, "C3x", [16]], [-1, 1, "C3TR", [16]], [-1, 1, "C3SPP", [16, [3, 5]]], [-1, 2, "C3Ghost", [16]],
        [-1, 1, "GhostConv", [16, 3, 2]], [-1, 1, "GhostBottleneck", [16, 3, 2]], [-1, 1, "CrossConv", [16]],
        [-1, 1, "SPP", [16, [3, 5]]], [-1, 1, "SPPF", [16]], [-1, 1, "Focus", [16, 3]], [-1, 1, "SPDConv", [16]],
        [-1, 1, "Contract", [2]], [-1, 1, "Expand", [2]], [-1, 1, "SPD", []], [-1, 1, "SPD", [3]],
        [-1, 1, "nn.BatchNorm2d", []], [-1, 1, "nn.ConvTranspose2d", [16, 2, 2]], [-1, 1, "nn.LeakyReLU", [0.1]],
        [-1, 1, "nn.MaxPool2d", [2]], [-1, 1, "DWConvTranspose2d", [16, 2, 2]], [[-1, -1], 1, "Concat", [1]],
    ],
    ids=lambda row: row[2] + str(row[3]),
)  # fmt: skip
def test_channel_rules_hold(row: list[Any]) -> None:
    """The width that the rule gives is the width that comes out, and gradients reach every parameter."""
    model = build_model(rows([-1, 1, "Conv", [16, 3, 2]], row))
    size = 2 * model.max_stride
    sources = [torch.rand(2, 16, size, size, requires_grad=True) for _ in model.rows[1].sources]
    out = model.model[1](sources if model.rows[1].many else sources[0])
    assert out.shape[1] == model.rows[1].channels
    assert all(torch.isfinite(raw).all() for raw in model(torch.rand(2, 3, size, size)))


def test_width_and_depth_scale_as_in_yolov5() -> None:
    """Channels go up to a multiple of 8, repeats are rounded and at least 1, a row of Detect's width is left alone."""
    model = build_model(
        rows([-1, 1, "Conv", [20, 3, 2]], [-1, 9, "C3", [64]], [-1, 1, "Conv", [14, 1]], width_multiple=0.33,
             depth_multiple=0.33)
    )  # fmt: skip
    assert [row.channels for row in model.rows[:3]] == [8, 24, 14]
    assert len(model.model[1].m) == 3


def test_symbols_and_literals_in_rows() -> None:
    symbols = {"nc": 7, "anchors": [[1, 2]]}
    assert read_argument(["None", "nc", "nearest", "anchors", "3", "True"], symbols) == [
        None, 7, "nearest", [[1, 2]], 3, True,
    ]  # fmt: skip


def test_activation_is_read_from_literals_only() -> None:
    leaky = parse_activation("nn.LeakyReLU(0.1)")
    assert isinstance(leaky, nn.LeakyReLU) and leaky.negative_slope == 0.1
    for bad in ("nn.LeakyReLU(__import__('os').getpid())", "nn.Linear(3, 3)", "lambda: 1", "print('x')", "nn.ReLU("):
        with pytest.raises(UserError):
            parse_activation(bad)


def test_activation_of_the_model() -> None:
    model = build_model(rows([-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 1, 1]], activation="nn.ReLU()"))
    acts = [m.act for m in model.modules() if isinstance(m, Conv)]
    assert all(isinstance(a, nn.ReLU) for a in acts) and acts[0] is not acts[1]


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (rows([-1, 1, "Cnov", [16]]), "did you mean 'Conv'"),
        (rows([-1, 1, "Conv", []]), "row 0"),
        (rows([-1, 1, "Conv", [16, 3, 2, 1, 1, 1, True, 9, 9]]), "row 0"),
        (rows([-1, 0, "Conv", [16]]), "repeats"),
        (rows([3, 1, "Conv", [16]]), "no earlier row"),
        (rows([-1, 1, "Conv"]), "expected"),
        (rows([-1, 1, "Conv", [16, 3, 2]], [[-1, 0], 1, "Conv", [16]]), "one input"),
        (rows([-1, 1, "Conv", [16, 3, 2]], [[-1, -2], 1, "Concat", [1]]), "row 1"),
        (rows([-1, 1, "Conv", [16]], nc=0), "number of classes"),
        (rows([-1, 1, "Conv", [16]], anchors=[[1, 2, 3]]), "w,h pairs"),
        (rows([-1, 1, "Conv", [16]], anchors="many"), "anchors"),
        (rows([-1, 1, "SPD", [1]]), "scale"),
        (rows([-1, 1, "Expand", [0]]), "row 0"),
        (rows([-1, 1, "nn.Upsample", [None, 300, "nearest"]]), "enlarge less"),
        (rows([-1, 1, "nn.Upsample", [None, 1e300, "nearest"]]), "cannot take inputs"),
        (rows([-1, 1, "nn.ZeroPad2d", [100_000]]), "enlarge less"),
        (rows([-1, 1, "Conv", [16, 1, 1, 10**5]]), "enlarge less"),
        (rows(*[[[-1, -1], 1, "Concat", [1]]] * 14), "enlarge less"),
        (rows([-1, 1, "Detect", ["nc", [[1, 2]]]]), "put it last"),
        (rows([-1, 1, "Conv", ["-" * 200_000]]), "200000 characters"),
        (rows([-1, 1, "Conv", [16]], activation="-" * 200_000), "not understood"),
        (rows([-1, 1, "Conv", [16]], activation="nn.PReLU(-1)"), "not understood"),
        (rows([-1, 1, "Conv", [16]], ch=0), "ch is 0"),
        (rows([-1, 1, "Conv", [16]], anchors=[[1, -2]]), "above 0"),
        ({"nc": 2, "anchors": 3, "backbone": []}, "backbone"),
        ({"nc": 2, "anchors": 3, "backbone": [[-1, 1, "Conv", [8]]], "head": [[-1, 1, "Conv", [8]]]}, "Detect"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_cause_in_one_line(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_model(cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_text_that_overflows_the_parser_stays_text(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(*_: Any) -> None:
        raise error

    monkeypatch.setattr("ast.literal_eval", overflow)
    assert read_argument("-" * 200, {}) == "-" * 200


def test_unknown_file_suggests_a_name() -> None:
    with pytest.raises(UserError, match="did you mean 'yolov5-spd-n'"):
        find_cfg("yolov5-sdp-n.yaml")


def test_building_does_not_change_the_configuration() -> None:
    cfg = load_yaml(find_cfg("yolov5-spd-n"))
    before = repr(cfg)
    build_model(cfg, nc=3)
    assert repr(cfg) == before


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("yolov5n", "depth_multiple", "abc"),
        ("yolov5n", "depth_multiple", -1),
        ("yolov5n", "width_multiple", None),
        ("yolov5n", "anchors", [10, 13, 16, 30]),
        ("yolov5n", "anchors", [["a", "b"]] * 3),
        ("yolov5n", "head", 5),
        ("resnet18", "width_multiple", 0),
        ("resnet18", "depth_multiple", "abc"),
        ("resnet18", "backbone", 5),
    ],
)
def test_values_that_give_no_network_are_one_line(name: str, key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.yaml"
    path.write_text(json.dumps({**load_yaml(find_cfg(name)), key: value}))
    with pytest.raises(UserError) as error:
        build_model(path)
    assert "\n" not in str(error.value)
