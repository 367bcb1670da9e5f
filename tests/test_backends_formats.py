"""Every format gives PyTorch's boxes: fixed and dynamic, half, int8, with NMS inside; metadata come back."""

import importlib
import io
import warnings
import zipfile
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch

from models import build_model
from models.backends import FORMATS, load_predictor
from models.backends.graph import NmsSettings
from models.backends.verify import TOLERANCES, Difference, compare, compare_detections, compare_raw
from models.fusion import fuse
from tests.backend_models import HW, NAMES, job_of, pictures, tiny_detector
from utils.core.errors import UserError
from utils.ops.nms import non_max_suppression

RUNNABLE = [n for n, f in FORMATS.items() if f.exports and n != "engine"]
NMS = NmsSettings(conf_thres=0.4, iou_thres=0.5, max_det=300)
SLOW_TO_EXPORT = ("torch_export", "openvino")


def slow_if(condition):
    return [pytest.mark.slow] if condition else []


@pytest.fixture(scope="module")
def model():
    return tiny_detector()


@pytest.fixture(scope="module")
def fixed(model, tmp_path_factory):
    """The plain file of a format, written once."""
    made = {}

    def of(fmt):
        if fmt not in made:
            made[fmt] = export(fmt, model, tmp_path_factory.mktemp(fmt), batch=2)
        return made[fmt]

    return of


def export(fmt, model, tmp_path, **options):
    """The file of a format as predictor."""
    for package in FORMATS[fmt].requires:
        pytest.importorskip(package)
    job = job_of(model, tmp_path / f"best{FORMATS[fmt].suffix.rstrip('/')}", **options)
    assert importlib.import_module(f"models.backends.{FORMATS[fmt].module}").export(job) == job.path
    predictor = load_predictor(job.path)
    predictor.path = job.path
    assert predictor.metadata == job.metadata and predictor.names == list(NAMES)
    return predictor


def difference(model, predictor, images):
    """PyTorch's unfused network against a file."""
    with torch.no_grad():
        total = compare(model.predict, predictor, [images])
    assert total.detections >= 3, "the test model finds too little to compare"
    return total


@pytest.mark.parametrize("fmt", RUNNABLE)
def test_fixed_file_gives_the_boxes_of_pytorch(fmt, model, fixed):
    predictor = fixed(fmt)
    assert (predictor.batch, predictor.imgsz) == (2, HW)
    found = difference(model, predictor, pictures(3))
    assert not found.failures(TOLERANCES["fp32"]), found
    with pytest.raises(UserError, match="--imgsz 64 96"):
        predictor(pictures(2, (64, 64)))


@pytest.mark.parametrize("fmt", [pytest.param(f, marks=slow_if(f in SLOW_TO_EXPORT)) for f in RUNNABLE])
def test_dynamic_half_file_with_nms_gives_the_boxes_of_pytorch(fmt, model, tmp_path):
    predictor = export(fmt, model, tmp_path, dynamic="all", precision="fp16", nms=NMS)
    assert predictor.end2end and (predictor.batch, predictor.imgsz) == (None, None)
    for images in (pictures(1), pictures(3, (96, 128))):
        found = difference(model, predictor, images)
        assert not found.failures(TOLERANCES["fp16"]), found


@pytest.mark.slow
@pytest.mark.parametrize("fmt", RUNNABLE)
@pytest.mark.parametrize("dynamic", [None, "batch", "hw"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("count", [None, "fixed", "dynamic"])
def test_all_combinations_give_the_boxes_of_pytorch(fmt, dynamic, precision, count, model, tmp_path):
    nms = None if count is None else replace(NMS, count=count)
    predictor = export(fmt, model, tmp_path, dynamic=dynamic, precision=precision, nms=nms)
    images = pictures(2, (96, 128) if dynamic == "hw" else HW)
    found = difference(model, predictor, images)
    assert not found.failures(TOLERANCES[precision]), found


@pytest.mark.parametrize("dynamic", [None, pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fmt", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_int8_keeps_the_head_in_float_and_finds_the_same(fmt, dynamic, model, tmp_path):
    if fmt == "openvino":
        pytest.importorskip("nncf")
    calibration = [pictures(1), pictures(3)[1:2]]
    predictor = export(fmt, model, tmp_path, precision="int8", calibration=calibration, nms=NMS, dynamic=dynamic)
    found = difference(model, predictor, pictures(3))
    if fmt == "onnx":  # without it the sums saturate on x86 without VNNI, where alone the boxes show it
        entry = predictor.session.get_session_options().get_session_config_entry("session.x64quantprecision")
        assert entry == "1"
    tolerance = replace(TOLERANCES["int8"], found=0.6)  # a random network has more close calls than a trained one
    assert not found.failures(tolerance), found


@pytest.mark.parametrize("fmt", RUNNABLE)
def test_unreadable_files_are_refused_in_one_line(fmt, tmp_path):
    for package in FORMATS[fmt].requires:
        pytest.importorskip(package)
    path = tmp_path / f"best{FORMATS[fmt].suffix.rstrip('/')}"
    if FORMATS[fmt].suffix.endswith("/"):
        path.mkdir()
    else:
        path.write_bytes(b"this is no model")
    with pytest.raises(UserError, match="best"):
        load_predictor(path)


def without_metadata(fmt, job, folder):
    """A copy of an exported file as another tool would have written it."""
    path = folder / f"best{FORMATS[fmt].suffix.rstrip('/')}"
    if fmt == "onnx":
        onnx = pytest.importorskip("onnx")
        graph = onnx.load(job.path)
        del graph.metadata_props[:]
        onnx.save(graph, path)
    elif fmt == "torch_export":
        torch.export.save(torch.export.load(job.path), path)
    else:
        ov = pytest.importorskip("openvino")
        path.mkdir()
        ov.save_model(ov.Core().read_model(next(job.path.glob("*.xml"))), path / "best.xml", compress_to_fp16=False)
        text = (path / "best.xml").read_text(encoding="utf-8")
        (path / "best.xml").write_text(text.replace("<yolov5_spd ", "<other "), encoding="utf-8")
    return path


class OfOneSize(torch.nn.Module):
    """Something of a detector's output, from images of one size."""

    def forward(self, images):
        return (images + torch.ones(1, 3, *HW)).flatten(2)[..., : 5 + len(NAMES)]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_trace_of_another_tool(tmp_path):
    """A trace does not say what it takes: it is tried."""
    path, fixed = tmp_path / "best.torchscript", torch.rand(1, 3, *HW)
    torch.jit.save(torch.jit.trace(OfOneSize(), fixed), path)
    with pytest.raises(UserError, match="--data DATA.yaml and --imgsz"):
        load_predictor(path)
    with pytest.raises(UserError, match="does not run on images of 640x640"):
        load_predictor(path, names=NAMES, imgsz=640)
    with pytest.raises(UserError, match="give the --data that it was trained on"):
        load_predictor(path, names=["one"], imgsz=HW)
    assert load_predictor(path, names=NAMES, imgsz=HW)(fixed).shape == (1, 3, 8)


@pytest.mark.parametrize("fmt", ["torch_export", "onnx", "openvino"])
def test_a_file_of_another_tool(fmt, model, fixed, tmp_path):
    path = without_metadata(fmt, fixed(fmt), tmp_path)
    with pytest.raises(UserError, match="--data DATA.yaml and --imgsz"):
        load_predictor(path)
    with pytest.raises(UserError, match="--imgsz 64 96"):
        load_predictor(path, names=NAMES, imgsz=640)
    with pytest.raises(UserError, match=r"expected one of \[batch, anchors, 6\]"):
        load_predictor(path, names=["one"], imgsz=HW)
    predictor = load_predictor(path, names=NAMES, imgsz=HW)
    assert not difference(model, predictor, pictures(1)).failures(TOLERANCES["fp32"])


def test_onnx_holds_no_spd_and_names_no_folder(fixed, root):
    onnx = pytest.importorskip("onnx")
    raw = fixed("onnx").path.read_bytes()
    graph = onnx.load_from_string(raw).graph
    assert not layout_operations(graph)
    assert b".py" not in raw and str(root).encode() not in raw
    assert [i.name for i in graph.input] == ["images"] and [o.name for o in graph.output] == ["output0"]


@pytest.mark.slow
def test_the_check_for_spd_finds_it_where_it_is(model, tmp_path):
    pytest.importorskip("onnxscript")
    from models.backends.onnx_graph import build_graph

    assert layout_operations(build_graph(job_of(model, tmp_path / "x.onnx", fused=False)).graph)


def layout_operations(graph):
    """Nodes before the head that move values about in space: what is left of SPD."""
    from models.backends.onnx_graph import last_convolutions

    head = set(last_convolutions(graph))
    values = {i.name: i for i in graph.initializer}
    return [n.op_type for n in graph.node if n.name not in head and moves_in_space(n, values)]


def moves_in_space(node, values):
    if node.op_type in ("SpaceToDepth", "DepthToSpace", "Transpose", "Reshape"):
        return True
    if node.op_type != "Slice":
        return False
    import onnx

    return onnx.numpy_helper.to_array(values[node.input[3]]).tolist() != [1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"yolov5-spd-{s}" for s in "nsmlx"] + [f"yolov5-spdconv-{s}" for s in "nsml"])
def test_onnx_of_every_spd_model_is_plain_convolutions(name, tmp_path):
    pytest.importorskip("onnxscript")
    from models.backends.onnx_graph import build_graph

    deployed = fuse(build_model(name).eval())
    graph = build_graph(job_of(deployed, tmp_path / "x.onnx", fused=False)).graph
    assert not layout_operations(graph)


def repacked(path, target, change):
    """A copy of an archive in which `change` has edited one entry, or added one."""
    name, edit = change
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        folder = old.namelist()[0].split("/")[0]
        for entry in old.namelist():
            data = old.read(entry)
            new.writestr(entry, edit(data) if entry == f"{folder}/{name}" else data)
        if f"{folder}/{name}" not in old.namelist():
            new.writestr(f"{folder}/{name}", edit(b""))


@pytest.mark.parametrize(
    "change",
    [
        ("models/model.json", lambda d: d.replace(b'"guards_code": [', b'"guards_code": ["print(1)", ')),
        ("models/model.json", lambda d: d.replace(b'"guards_code": [', b'"guards_code": ["torch.hub.load(1)", ')),
        ("models/model.json", lambda d: d.replace(b"torch.ops.aten.sigmoid.default", b"torch.hub.load")),
        ("data/weights/model_weights_config.json", lambda d: d.replace(b'"use_pickle": false', b'"use_pickle": true')),
        ("data/weights/model_weights_config.json", lambda d: b"[]"),
        ("data/constants/opaque_obj_0", lambda d: b"cos\nsystem\n(S'true'\ntR."),
        ("data/aotinductor/model/wrapper.so", lambda d: b"\x7fELF"),
        ("data/sample_inputs/model.pt", lambda d: b"cos\nsystem\n(S'true'\ntR."),
        ("models/model.json", lambda d: d.replace(b"builtins.tuple", b"collections.defaultdict")),
    ],
)
def test_an_exported_program_that_could_run_code_is_refused(change, model, tmp_path, program):
    target = tmp_path / "evil.pt2"
    repacked(program, target, change)
    with pytest.raises(UserError, match=r"evil\.pt2"):
        load_predictor(target)


def test_what_torch_reads_is_what_was_checked(program, tmp_path, monkeypatch):
    """An archive with an entry twice, which readers resolve differently, is refused; torch gets a copy of our own."""
    target = tmp_path / "evil.pt2"
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(target, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the name that is there twice
        for entry in old.namelist():
            for data in (
                (b"cos\nsystem\n(S'true'\ntR.", old.read(entry)) if "sample_inputs" in entry else (old.read(entry),)
            ):
                new.writestr(entry, data)
    with pytest.raises(UserError, match=r"evil\.pt2: holds entries twice"):
        load_predictor(target)
    read = []
    monkeypatch.setattr(torch.export, "load", lambda file, **_: read.append(file) or 1 / 0)
    with pytest.raises(UserError, match="cannot read this program"):
        load_predictor(program)
    assert isinstance(read[0], io.BytesIO)


@pytest.mark.parametrize(
    ("name", "shape", "kind", "words"),
    [
        ("flat", [2, 3], "FLOAT", r"input of shape \[2, 3\]"),
        ("last", [1, 64, 64, 3], "FLOAT", r"expected images \[batch, 3, height, width\]"),
        ("bytes", [1, 3, 64, 64], "UINT8", r"tensor\(uint8\); expected one tensor of images"),
    ],
)
def test_a_graph_that_takes_no_images_is_refused(name, shape, kind, words, tmp_path):
    onnx = pytest.importorskip("onnx")
    ends = [onnx.helper.make_tensor_value_info(x, getattr(onnx.TensorProto, kind), shape) for x in ("a", "b")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["a"], ["b"])], "x", ends[:1], ends[1:])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / f"{name}.onnx")
    with pytest.raises(UserError, match=words):
        load_predictor(tmp_path / f"{name}.onnx", names=NAMES, imgsz=64)


@pytest.mark.parametrize("name", ["best.pt2", "best.torchscript", "best.onnx", "best.pt"])
def test_a_folder_is_no_file(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="is a file, this is none"):
        load_predictor(tmp_path / name)


@pytest.fixture(scope="module")
def program(model, tmp_path_factory):
    """An honest .pt2 file with a guard to edit."""
    folder = tmp_path_factory.mktemp("program")
    predictor = export("torch_export", model, folder, dynamic="batch")
    assert predictor.metadata.dynamic == "batch"
    return folder / "best.pt2"


def test_differences_are_judged():
    fine = Difference(px=0.01, score=1e-4, detections=4, found=4)
    assert not fine.failures(TOLERANCES["fp32"])
    for wrong in ({"px": 0.06}, {"score": 0.01}, {"found": 3}, {"problem": "no"}):
        assert len(replace(fine, **wrong).failures(TOLERANCES["fp32"])) == 1
    shape, broken = (
        compare_raw(torch.rand(9, 8), given) for given in (torch.rand(8, 8), torch.full((9, 8), torch.nan))
    )
    assert shape.failures(TOLERANCES["int8"]) == ["the output has shape [8, 8], expected [9, 8]"]
    assert broken.failures(TOLERANCES["int8"]) == ["the output holds NaN or infinity"]
    (told,) = compare_raw(torch.full((9, 8), torch.nan), torch.rand(9, 8)).failures(TOLERANCES["fp32"])
    assert told == "PyTorch's own output holds NaN or infinity: the weights are damaged"
    total = Difference()
    for one in (fine, broken, shape):
        total.add(one)
    assert total.failures(TOLERANCES["fp32"]) == ["the output holds NaN or infinity"] and total.images == 3


def raw_and_rows(seed: int = 0, count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Crowded predictions [N, 5 + 3] of an image, and what NMS leaves of them."""
    rng = torch.Generator().manual_seed(seed)
    boxes = torch.cat((torch.rand(count, 2, generator=rng) * 90, torch.rand(count, 2, generator=rng) * 30 + 10), 1)
    raw = torch.cat((boxes, torch.rand(count, 4, generator=rng) * 0.8 + 0.1), 1)
    return raw, non_max_suppression(raw[None], conf_thres=NMS.conf_thres, iou_thres=NMS.iou_thres)[0]


def test_nms_inside_a_file_is_judged():
    raw, rows = raw_and_rows()
    assert not compare_detections(raw, rows, NMS).failures(TOLERANCES["fp32"])
    nothing_suppressed = non_max_suppression(raw[None], conf_thres=NMS.conf_thres, iou_thres=1.0)[0]
    (told,) = compare_detections(raw, nothing_suppressed, NMS).failures(TOLERANCES["fp32"])
    assert "overlap by more than the IoU" in told
    (told,) = compare_detections(raw, rows[:1], NMS).failures(TOLERANCES["fp32"])
    assert told.startswith("1 of ") and "found again" in told
    few = replace(NMS, max_det=3)
    assert not compare_detections(raw, rows[:3], few).failures(TOLERANCES["fp32"]), "a full list may be cut"
    assert compare_detections(raw, rows[:1], few).failures(TOLERANCES["fp32"]), "one that is not full may not"
    moved = rows + torch.tensor([0.2, 0, 0, 0, 0, 0])
    assert "boxes differ" in compare_detections(raw, moved, NMS).failures(TOLERANCES["fp32"])[0]


def test_a_class_that_flips_in_rounding_is_no_difference():
    raw = torch.tensor([[50.0, 50, 20, 20, 0.9, 0.500, 0.501, 0.1]])
    flipped = torch.tensor([[40.0, 40, 60, 60, 0.9 * 0.501, 0]])
    assert not compare_detections(raw, flipped, NMS, tie=0.04).failures(TOLERANCES["fp16"])
    wrong = torch.tensor([[40.0, 40, 60, 60, 0.9 * 0.1, 2]])
    assert compare_detections(raw, wrong, NMS, tie=0.04).failures(TOLERANCES["fp16"])


@pytest.mark.parametrize(("task", "what"), [("classify", "classes"), ("detect", "detections")])
def test_differences_name_what_they_count(task, what):
    """One image of which PyTorch is sure, against a file that says the same, and one that says something else."""
    expected = torch.tensor([[9.0, 0, 0]]) if task == "classify" else torch.tensor([[[8.0, 8, 4, 4, 1, 1, 0]]])
    other = expected.flip(-1) if task == "classify" else expected * torch.tensor([1.0, 1, 1, 1, 0, 1, 1])
    candidate = MagicMock(task=task, end2end=False)
    candidate.metadata.precision = "int8"
    for given, found in ((expected, 1), (other, 0)):
        candidate.return_value = given
        result = compare(MagicMock(return_value=expected), candidate, [torch.zeros(1, 3, 16, 16)])
        assert f"{found} of 1 {what} found again" in str(result)
    assert result.failures(TOLERANCES["int8"]) == [f"0 of 1 {what} found again, expected 70%"]
