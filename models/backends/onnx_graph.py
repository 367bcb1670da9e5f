"""ONNX graphs: traced from a network, cleaned, and with NMS as standard operators behind the decoded boxes.

OpenVINO and TensorRT start from the same graph as ONNX Runtime, so that what is true of one file is true of all.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from models.backends.base import METADATA_KEY, Metadata
from models.backends.graph import MAX_CANDIDATES, ExportJob, NmsSettings
from utils.core.errors import UserError

MIN_OPSET = 18

NMS_GRAPH = """
<ir_version: 9, opset_import: ["" : 18]>
nms (float[b, n, values] decoded) => (float[b, count, 4] boxes, float[b, count] scores, int64[b, count] labels)
<int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}}, int64[1] last = {{-1}},
 int64[1] empty = {{-1}}, float half = {{0.5}}, float none = {{0.0}}, float yes = {{1.0}},
 int64[1] most = {{{candidates}}}, int64[1] max_det = {{{max_det}}}, int64[4] parts = {{2, 2, 1, {nc}}},
 float iou_thres = {{{iou_thres}}}, float conf_thres = {{{conf_thres}}},
 int64[{groups}, 1] classes = {{{class_ids}}}, int64[6] padding = {{0, 0, 0, 0, {padding}, 0}}>
{{
  padded = Pad (decoded, padding)
  center, size, objectness, probability = Split <axis = -1> (padded, parts)
  half_size = Mul (size, half)
  low = Sub (center, half_size)
  high = Add (center, half_size)
  every_box = Concat <axis = -1> (low, high)
  every_score = Mul (objectness, probability)
  best = ReduceMax <keepdims = 0> (every_score, last)
  best_class = ArgMax <axis = -1, keepdims = 0, select_last_index = 0> (every_score)
  best_shape = Shape (best)
  rows = Slice (best_shape, one, two)
  candidates = Min (rows, most)
  conf, order = TopK <axis = 1, largest = 1, sorted = 1> (best, candidates)
  order_index = Unsqueeze (order, last)
  box = GatherND <batch_dims = 1> (every_box, order_index)
  label = GatherElements <axis = 1> (best_class, order)
  conf_row = Unsqueeze (conf, one)
  {group_scores}
  kept = NonMaxSuppression (box, group_conf, max_det, iou_thres, conf_thres)
  kept_batch = Slice (kept, zero, one, one)
  kept_row = Slice (kept, two, three, one)
  kept_index = Concat <axis = 1> (kept_batch, kept_row)
  kept_shape = Shape (kept_row)
  kept_count = Slice (kept_shape, zero, one)
  ones = Expand (yes, kept_count)
  conf_shape = Shape (conf)
  nothing = Expand (none, conf_shape)
  is_kept = ScatterND (nothing, kept_index, ones)
  kept_conf = Mul (conf, is_kept)
  top_conf, top = TopK <axis = 1, largest = 1, sorted = 1> (kept_conf, max_det)
  top_index = Unsqueeze (top, last)
  top_box = GatherND <batch_dims = 1> (box, top_index)
  top_label = GatherElements <axis = 1> (label, top)
  filled = Greater (top_conf, none)
  filled_column = Unsqueeze (filled, last)
  {outputs}
}}
"""
CLASS_SCORES = """label_row = Unsqueeze (label, one)
  in_group = Equal (label_row, classes)
  group_conf = Where (in_group, conf_row, none)"""
FIXED_COUNT = """boxes = Where (filled_column, top_box, none)
  scores = Identity (top_conf)
  labels = Where (filled, top_label, empty)"""
DYNAMIC_COUNT = """filled_number = Cast <to = 7> (filled)
  image_counts = ReduceSum <keepdims = 0> (filled_number, one)
  longest = ReduceMax <keepdims = 1> (image_counts, zero)
  all_boxes = Where (filled_column, top_box, none)
  all_labels = Where (filled, top_label, empty)
  boxes = Slice (all_boxes, zero, longest, one)
  scores = Slice (top_conf, zero, longest, one)
  labels = Slice (all_labels, zero, longest, one)"""


def build_graph(job: ExportJob, with_nms: bool = True) -> Any:
    """The ONNX ModelProto of a job in float32 or float16: `images` -> `output0`, `logits`, or boxes, scores, labels."""
    import onnx

    model = trace(job)
    if job.nms is not None and with_nms:
        model = append_nms(model, job.nms, job.model.nc, padded=job.metadata.dynamic_hw)
    set_metadata(model, job.metadata)
    onnx.checker.check_model(model, full_check=True)
    return model


def trace(job: ExportJob) -> Any:
    """Traces the network without NMS through torch.export and strips what names this machine's folders."""
    if job.opset < MIN_OPSET:
        raise UserError(f"--opset {job.opset}; this exporter writes opset {MIN_OPSET} and later; leave --opset out")
    output = "output0" if job.metadata.task == "detect" else "logits"
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            job.module(with_nms=False),
            (job.example(),),
            dynamo=True,
            input_names=["images"],
            output_names=[output],
            dynamic_shapes=job.dynamic_shapes(),
            opset_version=job.opset,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    written = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if written != job.opset:
        raise UserError(f"--opset {job.opset}; this exporter wrote opset {written} instead; leave --opset out")
    _strip(model.graph)
    _name_axes(model.graph.output[0], job.metadata)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress goes to nowhere; its errors stay."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _strip(graph: Any) -> None:
    """Removes stack traces and tracer notes from every part of a graph."""
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    del graph.value_info[:]
    graph.name = "yolov5-spd"


def _name_axes(output: Any, metadata: Metadata) -> None:
    """Dynamic axes of the output get plain names instead of the tracer's formulas."""
    names = ("batch", "anchors", "values")
    for name, dim in zip(names, output.type.tensor_type.shape.dim, strict=False):
        if not dim.HasField("dim_value"):
            dim.dim_param = name


def append_nms(model: Any, nms: NmsSettings, nc: int, padded: bool) -> Any:
    """`model` with output0 replaced by boxes [b, m, 4], scores [b, m], labels [b, m] int64 (-1 where empty)."""
    import onnx
    from onnx import compose, parser, version_converter

    groups = 1 if nms.agnostic else nc
    text = NMS_GRAPH.format(
        candidates=MAX_CANDIDATES,
        max_det=nms.max_det,
        nc=nc,
        iou_thres=float(nms.iou_thres),
        conf_thres=float(nms.conf_thres),
        groups=groups,
        class_ids=", ".join(map(str, range(groups))),
        padding=nms.max_det if padded else _missing_rows(model, nms.max_det),
        group_scores=("group_conf = Identity (conf_row)" if nms.agnostic else CLASS_SCORES),
        outputs=DYNAMIC_COUNT if nms.count == "dynamic" else FIXED_COUNT,
    )
    tail = parser.parse_model(text)
    tail.ir_version = model.ir_version
    opset = model.opset_import[0].version
    if opset != tail.opset_import[0].version:
        tail = version_converter.convert_version(tail, opset)
    tail = compose.add_prefix(tail, "nms/", rename_inputs=False, rename_outputs=False)
    merged = compose.merge_models(model, tail, io_map=[("output0", "decoded")])
    versions = {entry.domain: entry for entry in merged.opset_import}
    del merged.opset_import[:]
    merged.opset_import.extend(versions.values())
    for output in merged.graph.output:
        dims = output.type.tensor_type.shape.dim
        source = model.graph.output[0].type.tensor_type.shape.dim[0]
        dims[0].CopyFrom(source)
        if nms.count == "fixed":
            dims[1].dim_value = nms.max_det
    return onnx.shape_inference.infer_shapes(merged)


def _missing_rows(model: Any, wanted: int) -> int:
    """How many empty rows a small image needs so that `wanted` detections always exist."""
    return max(wanted - model.graph.output[0].type.tensor_type.shape.dim[1].dim_value, 0)


def set_metadata(model: Any, metadata: Metadata) -> None:
    """Writes the project's metadata as one JSON property."""
    import onnx

    onnx.helper.set_model_props(model, {METADATA_KEY: metadata.to_json()})
    model.producer_name = "yolov5-spd"
    model.producer_version = metadata.version


def last_convolutions(graph: Any) -> list[str]:
    """Names of the nodes from the last convolutions (or matrix products) to the outputs: what int8 leaves in float."""
    makers = {name: node for node in graph.node for name in node.output}
    seen: dict[str, None] = {}
    stack = [output.name for output in graph.output]
    while stack:
        node = makers.get(stack.pop())
        if node is None or node.name in seen:
            continue
        seen[node.name] = None
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            stack.extend(node.input)
    return list(seen)
