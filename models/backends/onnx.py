"""ONNX: the exchange format, run by ONNX Runtime. int8 is static QDQ with the head left in float."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backends.base import METADATA_KEY, Metadata, Predictor, foreign_metadata, need, rows_from_padded
from models.backends.graph import ExportJob
from models.backends.onnx_graph import append_nms, build_graph, last_convolutions, set_metadata
from utils.core.errors import UserError
from utils.core.files import atomic_write


def export(job: ExportJob, symmetric: bool = False) -> Path:
    """Writes one self-contained .onnx file; `symmetric` int8 (no zero points, float bias) is what TensorRT reads."""
    need("onnx", "onnxscript", what="ONNX export")
    if job.int8:
        need("onnxruntime", what="int8 ONNX export")
        model = quantized(job, symmetric)
    else:
        model = build_graph(job)
    with atomic_write(job.path) as file:
        file.write(model.SerializeToString())
    return job.path


def quantized(job: ExportJob, symmetric: bool = False) -> Any:
    """The graph with int8 weights and activations as QDQ pairs, calibrated on the job's images; NMS comes after."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    assert job.calibration is not None
    model = build_graph(job, with_nms=False)
    with TemporaryDirectory() as folder:
        target = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            target,
            _CalibrationReader(job.calibration),  # pyright: ignore[reportArgumentType]
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=last_convolutions(model.graph),
            extra_options={"CalibMovingAverage": True, "ActivationSymmetric": symmetric, "QuantizeBias": not symmetric},
        )
        model = onnx.load(target)
    if job.nms is not None:
        model = append_nms(model, job.nms, job.model.nc, padded=job.metadata.dynamic_hw)
    set_metadata(model, job.metadata)
    onnx.checker.check_model(model, full_check=True)
    return model


class _CalibrationReader:
    """Batches of images in the form that ONNX Runtime's calibration asks for."""

    def __init__(self, batches: Iterable[Tensor]):
        self.batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}


class OnnxPredictor(Predictor):
    """Runs an ONNX file in ONNX Runtime, on the CPU or on CUDA."""

    def __init__(self, session: Any, metadata: Metadata, device: torch.device):
        super().__init__(metadata, device)
        self.session = session
        entry = session.get_inputs()[0]
        self.input_name = entry.name
        self.input_type = np.float16 if "float16" in entry.type else np.float32

    def infer(self, images: Tensor) -> Any:
        array = images.detach().cpu().numpy().astype(self.input_type, copy=False)
        outputs = [
            torch.from_numpy(o).to(self.device)
            for o in self.session.run(None, {self.input_name: np.ascontiguousarray(array)})
        ]
        return rows_from_padded(*outputs) if self.end2end else outputs[0].float()


def load(
    path: Path,
    *,
    device: torch.device,
    names: Sequence[str] | None = None,
    imgsz: int | Sequence[int] | None = None,
    **_: Any,
) -> OnnxPredictor:
    need("onnxruntime", what="running .onnx files")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.x64quantprecision", "1")  # without VNNI, int8 sums would saturate
    session = _session(path, options, _providers(device))
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    metadata = Metadata.from_json(text, str(path)) if text else _foreign(session, path, names, imgsz)
    return OnnxPredictor(session, metadata, device)


def _session(path: Path, options: Any, providers: list[Any]) -> Any:
    import onnxruntime as ort
    import onnxruntime.capi.onnxruntime_pybind11_state as errors

    kinds = ("InvalidProtobuf", "Fail", "InvalidGraph", "NotImplemented", "InvalidArgument")
    try:
        return ort.InferenceSession(path, options, providers=providers)
    except tuple(getattr(errors, kind) for kind in kinds) as e:
        raise UserError(f"{path}: ONNX Runtime {ort.__version__} cannot load it ({str(e).splitlines()[0]})") from e


def _providers(device: torch.device) -> list[Any]:
    import onnxruntime as ort

    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in ort.get_available_providers():
        return [("CUDAExecutionProvider", {"device_id": device.index or 0}), "CPUExecutionProvider"]
    able = ", ".join(ort.get_available_providers())
    raise UserError(f"ONNX Runtime here has {able}; install onnxruntime-gpu, or use --device cpu")


def _foreign(session: Any, path: Path, names: Sequence[str] | None, imgsz: int | Sequence[int] | None) -> Metadata:
    """Metadata for a file of another tool, from what the user gives and what the graph says about its shapes."""

    def sizes(entry: Any) -> list[int | None]:
        return [size if isinstance(size, int) else None for size in entry.shape]

    entries = session.get_inputs()
    if len(entries) != 1 or entries[0].type not in ("tensor(float)", "tensor(float16)"):
        found = ", ".join(f"{entry.name} {entry.type}" for entry in entries)
        raise UserError(f"{path}: takes {found or 'nothing'}; expected one tensor of images in float32 or float16")
    outputs = {output.name: sizes(output) for output in session.get_outputs()}
    return foreign_metadata(str(path), names, imgsz, sizes(entries[0]), outputs)
