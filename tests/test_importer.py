"""Foreign checkpoints become this project's networks with the same outputs, or are refused by name."""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import legacy_files
import numpy as np
import pytest
import torch
from torch import nn

from models import build_model, find_cfg
from models.importer import import_legacy
from models.weights import load_model
from utils.core.errors import UserError
from utils.core.yamls import load_yaml

MINI = {
    "nc": 3, "depth_multiple": 1.0, "width_multiple": 0.125, "anchors": load_yaml(find_cfg("yolov5n"))["anchors"],
    "backbone": [
        [-1, 1, "Conv", [64, 6, 2, 2]], [-1, 1, "Conv", [64, 3, 2]], [-1, 1, "C3", [64]], [-1, 1, "Conv", [128, 3, 2]],
        [-1, 1, "SPPF", [128, 5]], [-1, 1, "Conv", [128, 3, 2]], [-1, 1, "Conv", [128, 3, 2]],
    ],
    "head": [[[4, 5, 6], 1, "Detect", ["nc", "anchors"]]],
}  # fmt: skip


def small(cfg: str, nc: int = 3, **changes: Any) -> nn.Module:
    """A narrow network of a model YAML, or of the few rows of MINI, with BatchNorm statistics that are not trivial."""
    rows = copy.deepcopy(MINI) if cfg == "mini" else load_yaml(find_cfg(cfg))
    model = build_model({**rows, "width_multiple": 0.125, **changes}, nc=nc)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def outputs(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return model(torch.linspace(0, 1, 2 * 3 * 64 * 96).sin().abs().view(2, 3, 64, 96))


VARIANTS: dict[str, dict[str, Any]] = {
    "zip, half": {},
    "stream": {"stream": True},
    "float, pip package": {"half": False, "prefix": "yolov5."},
    "names as map": {"names": {0: "a", 1: "b", 2: "c"}},
    "a training checkpoint": {
        "best_fitness": np.array([0.5]),
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"params": [0], "lr": 0.1}]},
        "opt": argparse.Namespace(imgsz=512, data="x.yaml", project="runs/yolov5-spd"),
        "date": "2024-05-06T07:08:09",
        "license": "AGPL-3.0",
        "fitness": np.float64(0.25),
        "folder": Path("a/b"),
    },
}


@pytest.mark.parametrize(
    ("cfg", "variant"), [*(("mini", variant) for variant in VARIANTS), ("yolov5-spd-n", "zip, half")]
)
def test_round_trip(cfg: str, variant: str, tmp_path: Path) -> None:
    """A network saved as YOLOv5 (or SPD-Conv's authors) would save it has equal outputs after its import."""
    model = small(cfg)
    model.half().float()  # what survives in a file of halves
    expected = outputs(model)
    options = VARIANTS[variant]
    path = legacy_files.save_foreign(model, tmp_path / "x.pt", **options)
    loaded = load_model(path)
    assert not loaded.model.training and next(loaded.model.parameters()).dtype == torch.float32
    for found, wanted in zip(outputs(loaded.model), expected, strict=True):
        assert torch.equal(found, wanted)
    assert loaded.names == (["a", "b", "c"] if "map" in variant else ["n0", "n1", "n2"])
    if "opt" in options:
        assert loaded.meta["licence"] == "AGPL-3.0" and loaded.meta["imgsz"] == 512
    else:
        assert loaded.meta["licence"] == "unknown"


@pytest.mark.parametrize("cfg", ["yolov5n", "yolov5-spdconv-n", "release 5.0", "authors", "leaky"])
def test_architectures(cfg: str, tmp_path: Path) -> None:
    """Other heads, release 5.0's rows (Focus, SPP), the authors' layer name and other activations come through."""
    if cfg == "release 5.0":
        model = small("yolov5n", backbone=RELEASE_5)
    elif cfg == "authors":
        rows = load_yaml(find_cfg("yolov5-spd-n"))
        rename = {
            part: [[f, n, *(("space_to_depth", [1]) if m == "SPD" else (m, a))] for f, n, m, a in rows[part]]
            for part in ("backbone", "head")
        }
        model = small("yolov5-spd-n", **rename)
    elif cfg == "leaky":
        model = small("mini", activation="nn.LeakyReLU(0.1)")
    else:
        model = small(cfg)
    model.half().float()
    expected = outputs(model)
    path = legacy_files.save_foreign(model, tmp_path / "x.pt")
    found = load_model(path).model
    assert type(found) is type(model)
    for a, b in zip(outputs(found), expected, strict=True):
        assert torch.equal(a, b)


RELEASE_5 = [
    [-1, 1, "Focus", [64, 3]],
    [-1, 1, "Conv", [128, 3, 2]],
    [-1, 3, "C3", [128]],
    [-1, 1, "Conv", [256, 3, 2]],
    [-1, 9, "C3", [256]],
    [-1, 1, "Conv", [512, 3, 2]],
    [-1, 9, "C3", [512]],
    [-1, 1, "Conv", [1024, 3, 2]],
    [-1, 1, "SPP", [1024, [5, 9, 13]]],
    [-1, 3, "C3", [1024, False]],
]


def test_anchors_come_from_the_tensors(tmp_path: Path) -> None:
    """Auto-anchor changes the buffer and not the YAML of a file; the buffer counts."""
    model = small("mini")
    sizes = torch.arange(18.0).view(3, 3, 2) * 4 + 8
    stale = model.cfg["anchors"]
    model.set_anchors(sizes)
    model.cfg["anchors"] = stale
    cfg, state, _, _ = import_legacy(legacy_files.save_foreign(model, tmp_path / "x.pt"))
    assert torch.tensor(cfg["anchors"]).view(3, 3, 2).equal(sizes)
    assert state["model.7.anchors"].dtype == torch.float32


def edit_stride(root: Any) -> None:
    root._modules["model"]._modules["1"]._modules["conv"].stride = (1, 1)


def edit_eps(root: Any) -> None:
    root._modules["model"]._modules["1"]._modules["bn"].eps = 1e-5


def edit_act(root: Any) -> None:
    root._modules["model"]._modules["1"]._modules["act"] = nn.ReLU()


def edit_block(root: Any) -> None:
    root.yaml["backbone"][2][2] = "CBAM"


def edit_repeats(root: Any) -> None:
    root.yaml["backbone"][2][1] = 10**9


def edit_width(root: Any) -> None:
    root.yaml["backbone"][2][3] = [10**6]


def edit_head(root: Any) -> None:
    root._modules["model"]._modules["7"] = nn.Identity()


def edit_loop(root: Any) -> None:
    root._modules["model"]._modules["1"]._modules["self"] = root


def edit_yaml_loop(root: Any) -> None:
    root.yaml["backbone"][0].append(root.yaml["backbone"])


def edit_yaml_key(root: Any) -> None:
    root.yaml["backbone"][2][3] = [{b"x" * 2000: 1}]


def edit_yaml_text(root: Any) -> None:
    root.yaml["backbone"][2][3] = ["x" * 1001]


def edit_module_name(root: Any) -> None:
    root._modules["model"]._modules["x" * 101] = nn.Identity()


def doubled() -> list[Any]:
    """A list of two to the power of 40 numbers, in 40 small lists."""
    value: list[Any] = [3]
    for _ in range(40):
        value = [value, value]
    return value


def edit_nested_constant(root: Any) -> None:
    root._modules["model"]._modules["1"]._modules["conv"].kernel_size = doubled()


def edit_nested_slope(root: Any) -> None:
    root._modules["model"]._modules["1"]._modules["act"] = act = nn.LeakyReLU()
    act.negative_slope = doubled()  # type: ignore[assignment]


def edit_strides(root: Any) -> None:
    root._modules["model"]._modules["7"].stride = torch.tensor([16.0, 32.0, 64.0])


def edit_root_strides(root: Any) -> None:
    root.stride = torch.tensor([4.0, 8.0, 16.0])


def edit_negative_repeats(root: Any) -> None:
    root.yaml["backbone"][2][1] = 10**9
    root.yaml["backbone"][3][1] = -(10**9)


def edit_channels(root: Any) -> None:
    root.yaml["ch"] = 10**10


def edit_missing(root: Any) -> None:
    del root._modules["model"]._modules["1"]._modules["bn"]._buffers["running_mean"]


def edit_extra(root: Any) -> None:
    root._modules["model"]._modules["1"]._modules["extra"] = nn.Conv2d(1, 1, 1)


def edit_shape(root: Any) -> None:
    root._modules["model"]._modules["1"]._modules["conv"]._parameters["weight"] = nn.Parameter(torch.zeros(2, 2, 3, 3))


def edit_yaml(root: Any) -> None:
    del root.yaml


def edit_nc(root: Any) -> None:
    root._modules["model"]._modules["7"].nc = [1]


def edit_anchors(root: Any) -> None:
    root.yaml["head"][0][3][1] = float("inf")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_anchors, "Detect does not accept these arguments"),
        (edit_stride, "model.1.conv has stride"),
        (edit_eps, "model.1.bn has eps"),
        (edit_act, "mixes activations"),
        (edit_block, "unknown layer 'CBAM'"),
        (edit_repeats, "without end"),
        (edit_width, "parameters in"),
        (edit_head, "expected Detect"),
        (edit_loop, "nested without end"),
        (edit_yaml_loop, "nested without end"),
        (edit_missing, "no tensor 'model.1.bn.running_mean'"),
        (edit_extra, "its architecture lacks"),
        (edit_shape, "its architecture needs"),
        (edit_yaml, "with its yaml"),
        (edit_nc, "number of classes"),
        (edit_yaml_key, "holds a dict"),
        (edit_yaml_text, "a text of 1001 characters"),
        (edit_module_name, "no short names"),
        (edit_nested_constant, "kernel_size is a list; expected a number"),
        (edit_nested_slope, "negative_slope is a list; expected a number"),
        (edit_strides, r"strides \[16.0, 32.0, 64.0\]; its architecture has \[8, 16, 32\]"),
        (edit_root_strides, r"strides \[4.0, 8.0, 16.0\]"),
        (edit_negative_repeats, "without end"),
        (edit_channels, "ch is 10000000000"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(edit: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    """A file whose modules differ from its description is refused with the name of the part, quickly, in one line."""
    with legacy_files.foreign_classes() as make:
        root = legacy_files.as_foreign(small("mini"), make)
        edit(root)
        torch.save({"model": root}, tmp_path / "x.pt", pickle_protocol=3)
    with pytest.raises(UserError, match=message) as caught:
        import_legacy(tmp_path / "x.pt")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


def test_unknown_keys_of_the_yaml_are_not_looked_at(tmp_path: Path) -> None:
    with legacy_files.foreign_classes() as make:
        root = legacy_files.as_foreign(small("mini"), make)
        root.yaml |= {b"x" * 2000: 1, "yaml_file": "y" * 2000, "more": {b"z": 1}}
        torch.save({"model": root}, tmp_path / "x.pt", pickle_protocol=3)
    assert set(import_legacy(tmp_path / "x.pt")[0]) <= {*MINI, "ch", "anchors_from_data"}


def test_text_of_a_file_is_made_printable(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Nothing that a file says moves the cursor, breaks a line or fills the screen."""
    path = legacy_files.save_foreign(
        small("mini"),
        tmp_path / "x.pt",
        names=["a\nb", "\x1b[2Jc", "d" * 10_000],
        license="MIT\n\x1b]0;x\x07" + "e" * 9999,
    )
    loaded = load_model(path)
    assert loaded.names == ["a b", "\\x1b[2Jc", "d" * 200 + "..."]
    assert loaded.meta["licence"].startswith("MIT \\x1b]0;x\\x07eee") and len(loaded.meta["licence"]) < 250
    assert "\x1b" not in (out := capsys.readouterr().out) and len(out) < 1000 and out.count("\n") == 1


def test_files_without_a_model(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds no model"):
        import_legacy(tmp_path / "x.pt")


def test_names_that_do_not_fit_are_replaced_aloud(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = legacy_files.save_foreign(small("mini"), tmp_path / "x.pt", names=["only one"])
    assert load_model(path).names == ["class0", "class1", "class2"]
    assert "no 3 class names" in capsys.readouterr().out


def test_official_weights(shared_data: Path, capsys: pytest.CaptureFixture) -> None:
    """The official yolov5n sees the persons and the bus; one line says that its weights keep their licence."""
    import cv2

    from utils.ops.letterbox import letterbox_geometry, letterbox_image
    from utils.ops.nms import non_max_suppression

    path = shared_data / "weights" / "yolov5n.pt"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    loaded = load_model(path)
    assert "keep their own licence (unknown" in capsys.readouterr().out
    assert sum(p.numel() for p in loaded.model.parameters()) == 1_872_157
    image = cv2.imread(str(shared_data / "images" / "bus.jpg"))
    image = letterbox_image(image, letterbox_geometry(image.shape[:2], (640, 640)))[..., ::-1]
    with torch.no_grad():
        predictions = loaded.model.predict(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255)
    classes = [loaded.names[int(c)] for c in non_max_suppression(predictions)[0][:, 5]]
    assert classes.count("person") >= 3 and classes.count("bus") == 1
