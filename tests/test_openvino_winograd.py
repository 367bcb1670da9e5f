"""Winograd's convolution in OpenVINO graphs: the outputs of the plain graph, and which convolutions are replaced."""

from typing import Any

import numpy as np
import pytest

ov = pytest.importorskip("openvino")
ops = pytest.importorskip("openvino.opset13")

from models.backends.openvino_winograd import use_winograd  # noqa: E402

SIZE = (1, 128, 16, 16)


def graph(
    size: tuple[int, ...] = SIZE,
    *,
    out: int = 128,
    activation: str = "swish",
    bias: bool = True,
    kernel: int = 3,
    stride: int = 1,
    stored: Any = np.float32,
    shortcut: bool = False,
) -> Any:
    """A convolution with what stands behind it in networks."""
    rng = np.random.default_rng(0)
    x = ops.parameter(list(size), np.float32)
    values = rng.normal(0, 0.03, (out, size[1], kernel, kernel)).astype(stored)
    weight = ops.constant(values) if stored is np.float32 else ops.convert(ops.constant(values), "f32")
    around = [kernel // 2] * 2
    y = ops.convolution(x, weight, [stride] * 2, around, around, [1, 1])
    if bias:
        y = ops.add(y, ops.constant(rng.normal(size=(1, out, 1, 1)).astype(np.float32)))
    y = getattr(ops, activation)(y) if activation else y
    return ov.Model([ops.add(y, x) if shortcut else y], [x])


def run(model: Any, x: np.ndarray) -> np.ndarray:
    return ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (SIZE, {}),
        ((3, 128, 16, 24), {"out": 160, "activation": "relu", "stored": np.float16}),
        (SIZE, {"activation": "", "bias": False}),
        (SIZE, {"activation": "sigmoid", "shortcut": True}),
        (SIZE, {"activation": "", "bias": False, "shortcut": True}),
    ],
)
def test_equals_the_plain_graph(size: tuple[int, ...], options: dict[str, Any]) -> None:
    model = graph(size, **options)
    x = np.random.default_rng(1).normal(size=size).astype(np.float32)
    expected = run(model, x)
    assert use_winograd(model) == 1
    assert "Convolution" not in [node.get_type_name() for node in model.get_ops()]
    assert np.abs(run(model, x) - expected).max() < 5e-5


def test_weights_in_bfloat16_stay_as_they_are() -> None:
    """OpenVINO gives their bits out as another type."""
    x = ops.parameter(list(SIZE), np.float32)
    values = np.random.default_rng(0).normal(0, 0.03, (128, 128, 3, 3)).astype(np.float32)
    weight = ops.convert(ops.constant(values, ov.Type.bf16), "f32")
    model = ov.Model([ops.convolution(x, weight, [1, 1], [1, 1], [1, 1], [1, 1])], [x])
    assert use_winograd(model) == 0


def test_graphs_that_compute_in_16_bits_stay_as_they_are() -> None:
    x = ops.parameter(list(SIZE), np.float16)
    weight = ops.constant(np.zeros((128, 128, 3, 3), np.float16))
    model = ov.Model([ops.convolution(x, weight, [1, 1], [1, 1], [1, 1], [1, 1])], [x])
    assert use_winograd(model) == 0


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((1, 64, 16, 16), {}),
        ((1, 128, 16, 18), {}),
        ((1, 128, 12, 16), {}),
        ((-1, 128, 16, 16), {}),
        ((1, 128, -1, -1), {}),
        (SIZE, {"kernel": 5}),
        (SIZE, {"kernel": 1}),
        (SIZE, {"stride": 2}),
        (SIZE, {"out": 64}),
    ],
)
def test_what_does_not_gain_stays(size: tuple[int, ...], options: dict[str, Any]) -> None:
    model = graph(size, **options)
    assert use_winograd(model) == 0
    assert "Convolution" in [node.get_type_name() for node in model.get_ops()]
