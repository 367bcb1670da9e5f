"""NMS inside graphs equals the project's NMS, in torch operations and in ONNX operators."""

import numpy as np
import pytest
import torch

from models.backends.base import Metadata, rows_from_padded
from models.backends.graph import GraphNms, NmsSettings
from models.backends.tensorrt import profile_shapes
from utils.core.errors import UserError
from utils.ops.nms import non_max_suppression

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

SETTINGS = [
    NmsSettings(),
    NmsSettings(conf_thres=0.05, iou_thres=0.6, max_det=20),
    NmsSettings(conf_thres=0.3, agnostic=True, count="dynamic"),
    NmsSettings(conf_thres=0.999),  # nothing is left
    NmsSettings(conf_thres=0.999, count="dynamic"),
]


def predictions(batch=3, n=400, nc=4, size=120.0):
    """Crowded random boxes whose scores are all different."""
    p = torch.rand(batch, n, 5 + nc)
    p[..., :2] *= size
    p[..., 2:4] = 4 + 30 * p[..., 2:4]
    p[..., 4] = torch.linspace(0.01, 0.95, n)[torch.randperm(n)]
    return p


def oracle(p, s):
    return non_max_suppression(
        p, conf_thres=s.conf_thres, iou_thres=s.iou_thres, max_det=s.max_det, agnostic=s.agnostic
    )


def same(given, expected):
    assert [len(g) for g in given] == [len(e) for e in expected]
    for g, e in zip(given, expected, strict=True):
        torch.testing.assert_close(g, e, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", [(3, 400, 4), (1, 7, 1), (2, 3500, 2)])
def test_torch_graph_equals_nms(settings, shape):
    p = predictions(*shape)
    boxes, scores, labels = GraphNms(settings, shape[2])(p)
    same(rows_from_padded(boxes, scores, labels), oracle(p, settings))
    longest = max(map(len, oracle(p, settings)))
    assert boxes.shape == (shape[0], settings.max_det if settings.count == "fixed" else longest, 4)
    assert labels.dtype == torch.int64 and not boxes[labels < 0].any() and not scores[labels < 0].any()


def onnx_nms(settings, nc, batch, n, padded):
    from models.backends.onnx_graph import append_nms

    shape = f"{batch}, {n}, {5 + nc}"
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]> raw (float[{shape}] images) => (float[{shape}] output0)'
        "{ output0 = Identity (images) }"
    )
    merged = append_nms(model, settings, nc, padded)
    onnx.checker.check_model(merged, full_check=True)
    return merged


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("free", [False, True])
def test_onnx_graph_equals_nms(settings, free):
    model = onnx_nms(settings, 4, "batch" if free else 3, "anchors" if free else 400, padded=free)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == ["boxes", "scores", "labels"]
    for n, batch in ((400, 3), (9, 1), (5000, 2)) if free else ((400, 3),):
        p = predictions(batch, n)
        out = [torch.from_numpy(o) for o in session.run(None, {"images": p.numpy()})]
        same(rows_from_padded(*out), oracle(p, settings))
        if settings.count == "fixed":
            assert out[0].shape == (batch, settings.max_det, 4)


def test_more_detections_than_rows_of_a_small_image():
    model = onnx_nms(NmsSettings(conf_thres=0.0), 2, 1, 5, padded=False)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"images": predictions(1, 5, 2).numpy()})[0].shape == (1, 300, 4)


def test_settings_are_checked():
    for wrong in ({"conf_thres": 2}, {"iou_thres": -1}, {"max_det": 0}, {"max_det": 10**6}, {"count": "some"}):
        with pytest.raises(UserError):
            NmsSettings(**wrong)


def test_int8_leaves_the_last_convolutions_and_what_follows_in_float():
    from models.backends.onnx_graph import last_convolutions

    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        net (float[1, 1, 4, 4] images) => (float[1, 1, 4, 4] output0) <float[1, 1, 1, 1] w = {1.0}> {
          [first] a = Conv (images, w)
          [act] b = Sigmoid (a)
          [second] c = Conv (b, w)
          [third] d = Conv (b, w)
          [join] e = Add (c, d)
          [end] output0 = Sigmoid (e)
        }"""
    )
    assert set(last_convolutions(model.graph)) == {"second", "third", "join", "end"}


def test_profile_of_a_dynamic_engine():
    facts = Metadata(names=("a",), imgsz=(640, 480), batch=2, dynamic="all", max_stride=32)
    low, best, high = profile_shapes(facts)
    assert low == (1, 3, 320, 256) and best == (2, 3, 640, 480) and high == (16, 3, 960, 704)
    assert all(np.mod(s[2:], 32).max() == 0 for s in (low, best, high))
    fixed = profile_shapes(Metadata(names=("a",), imgsz=(640, 480), batch=2, dynamic="batch"))
    assert fixed == ((1, 3, 640, 480), (2, 3, 640, 480), (16, 3, 640, 480))
