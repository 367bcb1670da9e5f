"""Winograd's convolution in an OpenVINO graph: the CPU plugin has none of its own.

A graph is rewritten when it is loaded, so that the file keeps plain convolutions. Each tile is gathered, transformed,
multiplied and transformed back by matrix products; the bias and the activation behind the convolution are applied
while channels still come last, the order that the plugin convolves in.
"""

from typing import Any

import numpy as np

from models.winograd import CHANNELS, INPUT, MIN_TILES, OUTPUT, STEP, TILE, transformed

ACTIVATIONS = ("Swish", "Relu")
STORED = ("f32", "f16")  # bfloat16 comes out of OpenVINO as if its bits were float16
PLAIN = {"strides": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1], "dilations": [1, 1]}


def use_winograd(model: Any) -> int:
    """Replace, in place, every convolution of an `openvino.Model` that is faster so on a CPU; returns how many.

    Only maps of a fixed size that tiles of 4x4 divide are worth it: others keep their convolution.
    """
    places = [(node, weight) for node in model.get_ordered_ops() if (weight := _weight(node)) is not None]
    for convolution, weight in places:
        _replace(convolution, weight)
    model.validate_nodes_and_infer_types()
    return len(places)


def _weight(node: Any) -> np.ndarray | None:
    """The kernel (out, C, 3, 3) of a convolution that gains, None for every other node."""
    if node.get_type_name() != "Convolution" or node.get_element_type().get_type_name() != "f32":
        return None
    if node.input_value(0).get_partial_shape().is_dynamic:
        return None
    attributes = node.get_attributes()
    if any(list(attributes[key]) != value for key, value in PLAIN.items()) or attributes["auto_pad"] != "explicit":
        return None
    weight = _constant(node.input_value(1).get_node())
    height, width = list(node.input_value(0).get_shape())[2:]
    if weight is None or weight.shape[2:] != (3, 3) or min(weight.shape[:2]) < CHANNELS:
        return None
    fits = height % STEP == 0 and width % STEP == 0 and height * width >= MIN_TILES * STEP**2
    return weight if fits else None


def _constant(node: Any) -> np.ndarray | None:
    """The value of a float constant, also of one that is stored in float16 and converted."""
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant" or node.get_element_type().get_type_name() not in STORED:
        return None
    return np.array(node.get_data(), dtype=np.float64)


def _replace(convolution: Any, weight: np.ndarray) -> None:
    import openvino.opset13 as ops

    def constant(value: Any, dtype: Any = np.int64) -> Any:
        return ops.constant(np.asarray(value, dtype=dtype))

    def reshape(x: Any, *shape: int) -> Any:
        return ops.reshape(x, constant(shape), False)

    def transpose(x: Any, *order: int) -> Any:
        return ops.transpose(x, constant(order))

    images, channels, height, width = convolution.input_value(0).get_shape()
    out, rows, columns = len(weight), height // STEP, width // STEP
    padded = ops.pad(convolution.input_value(0), [0, 0, 1, 1], [0, 0, 1, 1], "constant", constant(0, np.float32))
    pixels = reshape(transpose(padded, 0, 2, 3, 1), images * (height + 2) * (width + 2), channels)
    tiles = ops.gather(pixels, constant(_pixels_of_tiles(images, height, width)), constant(0))
    at_points = ops.matmul(constant(np.kron(INPUT, INPUT), np.float32), reshape(tiles, TILE**2, -1), False, False)
    kernel = constant(transformed(weight), np.float32)
    products = ops.matmul(reshape(at_points, TILE**2, -1, channels), kernel, False, False)
    y = ops.matmul(constant(np.kron(OUTPUT, OUTPUT), np.float32), reshape(products, TILE**2, -1), False, False)
    y = reshape(y, STEP, STEP, images * rows, columns, out)
    last: Any = convolution
    reader = _only_reader(last)
    if (bias := _bias(reader, out)) is not None:
        last, y = reader, ops.add(y, constant(bias, np.float32))
    reader = _only_reader(last)
    if reader is not None and reader.get_type_name() in ACTIVATIONS and reader.get_input_size() == 1:
        last, y = reader, ops.swish(y) if reader.get_type_name() == "Swish" else ops.relu(y)
    y = reshape(transpose(y, 2, 0, 3, 1, 4), images, height, width, out)
    last.output(0).replace(transpose(y, 0, 3, 1, 2).output(0))


def _pixels_of_tiles(images: int, height: int, width: int) -> np.ndarray:
    """Which of the padded pixels, in one row, stands where: (36, images * tiles)."""
    padded = np.arange(images * (height + 2) * (width + 2)).reshape(images, height + 2, width + 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (TILE, TILE), axis=(1, 2))[:, ::STEP, ::STEP]
    return windows.transpose(3, 4, 0, 1, 2).reshape(TILE**2, -1)


def _only_reader(node: Any) -> Any | None:
    readers = list(node.output(0).get_target_inputs())
    return readers[0].get_node() if len(readers) == 1 else None


def _bias(reader: Any | None, out: int) -> np.ndarray | None:
    """What the reader of a convolution adds to its channels, None where it does something else."""
    if reader is None or reader.get_type_name() != "Add":
        return None
    values = (_constant(reader.input_value(i).get_node()) for i in (0, 1))
    value = next((v for v in values if v is not None), None)
    return value.reshape(-1) if value is not None and value.shape == (1, out, 1, 1) else None
