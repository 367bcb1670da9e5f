"""OpenVINO: a folder `*_openvino_model/` with the graph as .xml and the weights as .bin; int8 through NNCF.

The runtime computes in float32 unless asked for 16 bits: left to itself, OpenVINO takes bfloat16 where the processor
has it, and boxes move by pixels.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backends.base import METADATA_KEY, Metadata, Predictor, foreign_metadata, need, rows_from_padded
from models.backends.graph import ExportJob
from models.backends.onnx_graph import build_graph
from models.backends.openvino_winograd import use_winograd
from utils.core.errors import UserError

PROFILE = "PERFORMANCE_HINT"
LAST = ("Convolution", "GroupConvolution", "MatMul")


def export(job: ExportJob) -> Path:
    """Converts the ONNX graph of the job; `half` stores float16 weights, int8 quantizes all but the head and NMS."""
    need("openvino", what="OpenVINO export")
    import openvino as ov

    graph = build_graph(replace(job, metadata=replace(job.metadata, precision="fp32")))
    with TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        source.write_bytes(graph.SerializeToString())
        model = ov.convert_model(source)
    if job.int8:
        model = _quantized(model, job)
    model.set_rt_info(job.metadata.to_json(), [METADATA_KEY])
    job.path.mkdir(parents=True, exist_ok=True)
    ov.save_model(model, job.path / _stem(job.path), compress_to_fp16=job.half)
    return job.path


def _stem(folder: Path) -> str:
    return folder.name.removesuffix("_openvino_model") + ".xml"


def _quantized(model: Any, job: ExportJob) -> Any:
    need("nncf", what="int8 OpenVINO export")
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    assert job.calibration is not None
    return nncf.quantize(
        model,
        nncf.Dataset(job.calibration, lambda batch: batch.numpy()),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(job.calibration),
        ignored_scope=nncf.IgnoredScope(names=_head_nodes(model)),
    )


def _head_nodes(model: Any) -> list[str]:
    """Names of the operations from the last convolutions to the outputs: what int8 leaves in float."""
    seen: dict[str, None] = {}
    stack = [result.input_value(0).get_node() for result in model.get_results()]
    while stack:
        node = stack.pop()
        name, kind = node.get_friendly_name(), node.get_type_name()
        if name in seen or kind in ("Constant", "Parameter"):
            continue
        seen[name] = None
        if kind not in LAST:
            stack.extend(node.input_value(i).get_node() for i in range(node.get_input_size()))
    return list(seen)


class OpenVinoPredictor(Predictor):
    """Runs a compiled OpenVINO model, one request at a time."""

    def __init__(self, compiled: Any, metadata: Metadata, device: torch.device):
        super().__init__(metadata, device)
        self.request = compiled.create_infer_request()

    def infer(self, images: Tensor) -> Any:
        array = np.ascontiguousarray(images.detach().cpu().numpy(), dtype=np.float32)
        results = self.request.infer([array], share_inputs=True)
        outputs = [torch.from_numpy(results[i]).to(self.device) for i in range(len(results))]  # copies, not views
        return rows_from_padded(*outputs) if self.end2end else outputs[0].float()


def load(
    path: Path,
    *,
    device: torch.device,
    half: bool = False,
    names: Sequence[str] | None = None,
    imgsz: int | Sequence[int] | None = None,
    **_: Any,
) -> OpenVinoPredictor:
    need("openvino", what="running OpenVINO models")
    import openvino as ov

    files = sorted(path.glob("*.xml"))
    if len(files) != 1:
        raise UserError(f"{path}: holds {len(files)} .xml files; expected the folder of one OpenVINO model")
    core = ov.Core()
    try:
        model = core.read_model(files[0])
    except RuntimeError as e:
        raise UserError(f"{path}: OpenVINO {ov.__version__} cannot read it ({_reason(e)})") from e
    if model.has_rt_info([METADATA_KEY]):
        metadata = Metadata.from_json(str(model.get_rt_info([METADATA_KEY]).astype(str)), str(path))
    else:
        outputs = {f"output{i}": _sizes(output) for i, output in enumerate(model.outputs)}
        metadata = foreign_metadata(str(path), names, imgsz, _sizes(model.inputs[0]), outputs)
    use_winograd(model)
    config = {
        "INFERENCE_PRECISION_HINT": _precision(core, half),
        PROFILE: "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    return OpenVinoPredictor(core.compile_model(model, "CPU", config), metadata, device)


def _sizes(port: Any) -> list[int | None]:
    """The shape of an input or output, None where any size will do."""
    return [None if size.is_dynamic else size.get_length() for size in port.get_partial_shape()]


def _reason(error: RuntimeError) -> str:
    """The last line of OpenVINO's report, which is the one that says what is wrong."""
    return str(error).strip().splitlines()[-1][:200]


def _precision(core: Any, half: bool) -> str:
    """The float type to compute in: bfloat16 or float16 where `half` is asked for and the processor has it."""
    if not half:
        return "f32"
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for name, hint in (("FP16", "f16"), ("BF16", "bf16")):
        if name in able:
            return hint
    raise UserError(f"--half with OpenVINO: this processor computes in {', '.join(able)} only; leave --half out")
