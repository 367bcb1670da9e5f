"""export.py: files beside the checkpoint, verified; whatever goes wrong ends with a non-zero exit code and one line."""

import types
from dataclasses import replace

import numpy as np
import pytest
import torch

import export
from models import build_model, find_cfg
from models.backends import tensorrt, torchscript
from models.backends.base import Metadata
from models.backends.pictures import choose, network_image
from models.weights import pack_model
from tests.backend_models import HW, NAMES, job_of, tiny_detector
from utils.core.checkpoint import save_checkpoint
from utils.core.errors import UserError
from utils.core.yamls import load_yaml
from utils.data.scenes import write_dataset

SIZE = ["--imgsz", "64", "96"]


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "best.pt"
    save_checkpoint(path, pack_model(tiny_detector(), NAMES, 96))
    return path


def test_exports_are_written_beside_the_checkpoint_and_verified_on_drawn_scenes(weights, capsys):
    assert export.main(["--weights", str(weights), "--include", "torchscript", *SIZE, "--images", "2"]) == 0
    out = capsys.readouterr().out
    assert weights.with_suffix(".torchscript").is_file()
    assert "verified on bundled drawn scenes at [1, 3, 64, 96]: largest difference" in out and "SPD into" in out


def test_dynamic_files_are_verified_at_another_shape_too(weights, monkeypatch, capsys):
    argv = ["--weights", str(weights), "--include", "torchscript", *SIZE, "--images", "2", "--dynamic"]
    assert export.main(argv) == 0
    out = capsys.readouterr().out
    assert "scenes at [1, 3, 64, 96]:" in out and "scenes at [2, 3, 48, 96]:" in out
    honest = torchscript.export

    def of_one_shape(job):
        return honest(replace(job, metadata=replace(job.metadata, dynamic=None)))

    monkeypatch.setattr(torchscript, "export", of_one_shape)
    assert export.main(argv) == 1
    assert "images of 48x96 given to a file exported for 64x96" in capsys.readouterr().err


def test_a_classifier_is_exported_for_squares(tmp_path, capsys):
    """In every format that this machine has, verified at two sizes."""
    formats = [name for name in export.exportable() if name != "engine"]
    cfg = {**load_yaml(find_cfg("resnet18-spd")), "width_multiple": 0.125}
    path = tmp_path / "c.pt"
    save_checkpoint(path, pack_model(build_model(cfg, nc=3), NAMES, 64))
    argv = ["--weights", str(path), "--include", *formats, "--images", "2", "--dynamic", "--imgsz", "64"]
    assert export.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("scenes at [1, 3, 64, 64]:") == out.count("scenes at [2, 3, 48, 48]:") == len(formats) == 4
    with pytest.raises(UserError, match="a classifier sees squares"):
        export.main([*argv, "96"])


def test_a_classifier_of_one_class_is_verified_too(tmp_path, capsys):
    cfg = {**load_yaml(find_cfg("resnet18-spd")), "width_multiple": 0.125}
    save_checkpoint(tmp_path / "c.pt", pack_model(build_model(cfg, nc=1), ["thing"], 64))
    argv = ["--weights", str(tmp_path / "c.pt"), "--include", "onnx", "--images", "1", "--imgsz", "64"]
    assert export.main(argv) == 0
    assert "1 of 1 classes found again" in capsys.readouterr().out


def test_data_of_other_classes_is_refused(weights, tmp_path):
    data = write_dataset(tmp_path / "set", train=1, val=1, size=64)
    with pytest.raises(UserError, match="the model has 3 classes"):
        export.run(weights=weights, include=["torchscript"], imgsz=64, data=data)


def test_python_call_with_data_prints_both_aps(weights, tmp_path, capsys):
    data = write_dataset(tmp_path / "set", train=2, val=2, size=64)
    rows = export.run(weights=weights, include=["torchscript"], imgsz=64, data=with_three_classes(data))
    out = capsys.readouterr().out
    assert rows[0].metrics.keys() == {"AP", "AP50", "AP_S"} and "PyTorch" in out and "2 images of val of" in out


def with_three_classes(data):
    """The drawn images with one labeled box each, under as many class names as the test model has."""
    for label in data.parent.glob("labels/*/*.txt"):
        label.write_text("0 0.5 0.5 0.4 0.4\n", encoding="utf-8")
    path = data.with_name("three.yaml")
    path.write_text("path: .\ntrain: images/train\nval: images/val\nnames: [a, b, c]\n", encoding="utf-8")
    return path


def test_nms_is_verified_also_where_no_box_reaches_the_confidence(weights, capsys):
    args = ["--weights", str(weights), "--include", "torchscript", *SIZE, "--images", "2", "--nms", "--conf-thres", "1"]
    assert export.main(args) == 0
    out = capsys.readouterr().out
    assert "reaches --conf-thres 1: compared at" in out and "over 0 boxes" not in out and "boxes;" in out
    assert export.load_predictor(weights.with_suffix(".torchscript")).metadata.nms["conf_thres"] == 1


def test_a_mismatch_ends_with_an_error(weights, monkeypatch, capsys):
    honest = torchscript.export

    def wrong(job):
        job.model.head.m[0].bias.data.add_(0.05)
        return honest(job)

    monkeypatch.setattr(torchscript, "export", wrong)
    assert export.main(["--weights", str(weights), "--include", "torchscript", *SIZE, "--images", "1"]) == 1
    assert "differ by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "told"),
    [(UserError("no"), "no"), (RuntimeError("of torch\nat line 5"), "RuntimeError: of torch at line 5")],
)
def test_one_format_that_fails_does_not_stop_the_others(failure, told, weights, monkeypatch, capsys):
    def broken(job):
        raise failure

    monkeypatch.setattr(torchscript, "export", broken)
    monkeypatch.setattr(tensorrt, "export", honest_copy)
    argv = ["--weights", str(weights), "--include", "torchscript", "engine", *SIZE, "--no-verify"]
    assert export.main(argv) == 1
    assert capsys.readouterr().err.strip() == f"error: TorchScript: {told}"
    assert weights.with_suffix(".engine").exists()


def honest_copy(job):
    job.path.write_bytes(b"x")
    return job.path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--int8"], "add --data"),
        (["--int8", "--half"], "choose one precision"),
        (["--include", "torchscript", "--int8"], "does for onnx, openvino, engine"),
        (["--imgsz", "90"], "the model's largest stride 8; nearest usable sizes are 88 and 96"),
        (["--imgsz", "0"], "nearest usable size is 8"),
        (["--include", "torchscript", "--output", __file__], "choose another --output"),
        (["--batch-size", "0"], "expected 1 or more"),
        (["--source", "nowhere"], "no such file or folder"),
        (["--nms", "--conf", "2"], "expected thresholds within 0..1"),
        (["--max-det", "5"], "--max-det is about the NMS inside the file; add --nms"),
        (["--agnostic-nms"], "add --nms"),
        (["--include", "torchscript", "--opset", "20"], "--opset does nothing with --include torchscript"),
        (["--include", "onnx", "--workspace", "2"], "--workspace does nothing with --include onnx"),
        (["--calibration-images", "9"], "--calibration-images is about --int8"),
        (["--opset", "99", "--imgsz", "64"], "--opset 99; this exporter wrote opset"),
        (["--include", "onix"], "invalid choice"),
        (["--dynamic", "width"], "invalid choice"),
        (["--simplify"], "always simplified"),
        (["--keras"], "use onnx or openvino"),
        (["--device", "7"], "--device"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(weights, options, words, capsys):
    try:
        assert export.main(["--weights", str(weights), *options]) == 1
        text = capsys.readouterr().err
    except UserError as error:
        text = str(error)
    assert words in text and "\n" not in text.strip()


def test_weights_are_needed(tmp_path):
    with pytest.raises(UserError, match="no --weights given"):
        export.main([])
    with pytest.raises(UserError, match="not found"):
        export.main(["--weights", str(tmp_path / "none.pt")])


def test_flags_that_people_type():
    cfg = export.parse_config(
        export.ExportConfig, ["--img", "320", "--batch", "2", "--dynamic", "--nms", "--include", "onnx", "engine"], "x"
    )
    assert (cfg.imgsz, cfg.batch_size, cfg.dynamic, cfg.nms, cfg.include) == (
        [320],
        2,
        "all",
        "fixed",
        ["onnx", "engine"],
    )


def test_benchmark_keeps_to_the_formats_that_are_asked_for(weights, capsys):
    rows = export.run(weights=weights, benchmark=True, include=["torchscript"], imgsz=[64, 96], images=1)
    assert [r.format.name for r in rows] == ["pytorch", "torchscript"] and "ms/image" in capsys.readouterr().out


@pytest.mark.slow
def test_benchmark_lists_every_format(weights, capsys):
    rows = export.run(weights=weights, benchmark=True, imgsz=[64, 96], images=1)
    assert {r.format.name for r in rows} >= {"pytorch", "torch_export", "torchscript", "onnx", "openvino", "engine"}
    assert all(np.isfinite(r.ms) for r in rows if not r.skipped) and "ms/image" in capsys.readouterr().out


def test_pictures_fill_batches_and_repeat():
    facts = Metadata(names=NAMES, imgsz=HW)
    chosen = choose(facts, count=3, batch=2)
    first, second = list(chosen), list(chosen)
    assert [b.shape for b in first] == [(2, 3, *HW)] * 2 and len(chosen) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].min() >= 0 and first[0].max() <= 1


def test_network_image_of_other_tasks_and_channels():
    image = np.full((20, 30, 3), 255, np.uint8)
    gray = network_image(image, Metadata(names=("a",), imgsz=(32, 32), channels=1))
    assert gray.shape == (1, 32, 32) and gray.max() == 1 and gray[0, 0, 0] == pytest.approx(114 / 255)
    values = network_image(image, Metadata(names=("a",), imgsz=(8, 8), task="classify"))
    assert values.shape == (3, 8, 8) and torch.all(values == 1)


class FakeTensorRT:
    """As much of TensorRT's Python API as building needs; remembers what was asked of it."""

    def __init__(self, version="10.9.0", parses=True, typed_flag=True):
        self.__version__ = version
        self.calls = []
        fake = self

        class Recorder:
            WARNING, num_errors = 0, 1

            def __init__(self, *_):
                pass

            def __getattr__(self, name):
                def call(*args):
                    fake.calls.append((name, args))
                    if name == "parse":
                        return parses
                    return {"get_error": "bad node", "build_serialized_network": b"engine"}.get(name, Recorder())

                return call

        self.Logger = self.Builder = self.OnnxParser = Recorder
        flags = {"STRONGLY_TYPED": 1} if typed_flag else {}
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(**flags)
        self.MemoryPoolType = types.SimpleNamespace(WORKSPACE="workspace")

    def first(self, name):
        return next(args for called, args in self.calls if called == name)


@pytest.mark.parametrize("typed_flag", [True, False])
def test_engines_are_strongly_typed_and_have_a_profile(tmp_path, typed_flag):
    job = job_of(tiny_detector(), tmp_path / "x.engine", dynamic="batch")
    fake = FakeTensorRT(typed_flag=typed_flag)
    assert tensorrt.build_engine(fake, b"graph", job) == b"engine"
    assert fake.first("create_network") == (2 if typed_flag else 0,)
    assert fake.first("set_memory_pool_limit") == ("workspace", 4 * 2**30)
    assert fake.first("set_shape") == ("images", (1, 3, *HW), (1, 3, *HW), (16, 3, *HW))
    assert not [name for name, _ in fake.calls if name == "set_flag"], "TensorRT 11 has no precision flags"


def test_tensorrt_says_why_it_refuses_a_graph(tmp_path):
    job = job_of(tiny_detector(), tmp_path / "x.engine")
    with pytest.raises(UserError, match="bad node"):
        tensorrt.build_engine(FakeTensorRT(parses=False), b"graph", job)


def test_engine_files_carry_their_metadata():
    text = Metadata(names=NAMES, imgsz=HW).to_json()
    data = tensorrt.MAGIC + tensorrt.LENGTH.pack(len(text.encode())) + text.encode() + b"engine"
    assert tensorrt.split_file(data, "x") == (text, b"engine")
    assert tensorrt.split_file(b"bare engine", "x") == (None, b"bare engine")
    with pytest.raises(UserError, match="cut off"):
        tensorrt.split_file(data[:40], "x")


@pytest.mark.slow
def test_without_tensorrt_the_onnx_is_there_and_the_error_says_so(weights, capsys):
    pytest.importorskip("onnxscript")
    if torch.cuda.is_available():
        pytest.skip("a machine with a GPU may build the engine")
    assert export.main(["--weights", str(weights), "--include", "engine", *SIZE]) == 1
    assert "TensorRT is not installed" in capsys.readouterr().err
    assert weights.with_name("best_engine.onnx").is_file() and not weights.with_suffix(".onnx").exists()
