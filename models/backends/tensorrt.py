"""TensorRT 10 and 11: an engine built from the ONNX graph, strongly typed, run through the tensor-name API.

Strong typing means that the graph's own types are the engine's: `--half` and `--int8` shape the ONNX graph, and no
builder flag exists for them in TensorRT 11. An engine runs only on the kind of GPU and the TensorRT version that built
it.
"""

import importlib
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.backends import onnx as onnx_backend
from models.backends.base import Metadata, Predictor, given_metadata, rows_from_padded
from models.backends.graph import ExportJob
from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.core.log import LOGGER

MAGIC = b"YOLOV5-SPD-TRT1\0"
LENGTH = struct.Struct("<Q")
MAX_BATCH = 16
SCALE_RANGE = (0.5, 1.5)  # smallest and largest image of a --dynamic hw engine, relative to --imgsz


def export(job: ExportJob) -> Path:
    """Writes the checked ONNX file beside the engine, then builds the engine from it."""
    if job.nms is not None and job.nms.count == "dynamic":
        raise UserError("--nms dynamic with an engine; TensorRT gives a fixed count here: use --nms fixed")
    source = job.path.with_name(f"{job.path.stem}_engine.onnx")  # not the .onnx of --include onnx, whose int8 differs
    onnx_backend.export(replace(job, path=source), symmetric=True)
    LOGGER.info(f"TensorRT: {source} is built and checked")
    trt = _tensorrt(f"the engine can be built from {source} on a machine with a GPU and TensorRT")
    if not torch.cuda.is_available():
        raise UserError(
            f"building an engine needs an NVIDIA GPU, and torch sees none; {source} is ready to be built elsewhere"
        )
    engine = build_engine(trt, source.read_bytes(), job)
    text = job.metadata.to_json().encode()
    with atomic_write(job.path) as file:
        for part in (MAGIC, LENGTH.pack(len(text)), text, engine):
            file.write(part)
    return job.path


def _tensorrt(then: str) -> Any:
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as e:
        raise UserError(f"TensorRT is not installed (pip install tensorrt); {then}") from e
    if int(trt.__version__.split(".")[0]) < 10:
        raise UserError(
            f"TensorRT {trt.__version__} is installed; expected 10 or later, whose tensor-name API this uses"
        )
    return trt


def build_engine(trt: Any, graph: bytes, job: ExportJob) -> bytes:
    """A serialized engine of a strongly typed network."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only kind in TensorRT 11
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise UserError(f"TensorRT {trt.__version__} does not take the ONNX graph: {reasons}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(job.workspace_gb * 2**30))
    if job.metadata.dynamic is not None:
        profile = builder.create_optimization_profile()
        profile.set_shape("images", *profile_shapes(job.metadata))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"TensorRT {trt.__version__} could not build the engine; its messages above say why")
    return bytes(engine)


def profile_shapes(metadata: Metadata) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Smallest, best and largest input shape of a dynamic engine."""
    stride = metadata.max_stride
    low, high = (
        tuple(max(round(v * s / stride) * stride, stride) if metadata.dynamic_hw else v for v in metadata.imgsz)
        for s in SCALE_RANGE
    )
    batches = (1, metadata.batch, max(MAX_BATCH, metadata.batch)) if metadata.dynamic_batch else (metadata.batch,) * 3
    channels = metadata.channels
    return (batches[0], channels, *low), (batches[1], channels, *metadata.imgsz), (batches[2], channels, *high)


class TensorRtPredictor(Predictor):
    """Runs an engine: shapes and addresses by tensor name, on torch's current stream."""

    def __init__(self, engine: Any, trt: Any, metadata: Metadata, device: torch.device):
        super().__init__(metadata, device)
        self.context = engine.create_execution_context()
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self.inputs = [n for n in names if modes[n] == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if modes[n] == trt.TensorIOMode.OUTPUT]
        types = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.INT32: torch.int32,
            trt.DataType.INT64: torch.int64,
        }
        self.types = {name: types[engine.get_tensor_dtype(name)] for name in names}

    def infer(self, images: Tensor) -> Any:
        name = self.inputs[0]
        images = images.to(self.device, self.types[name]).contiguous()
        if not self.context.set_input_shape(name, tuple(images.shape)):
            raise UserError(
                f"the engine does not take images of shape {tuple(images.shape)}; export it for this size or batch"
            )
        self.context.set_tensor_address(name, images.data_ptr())
        outputs = {
            n: torch.empty(tuple(self.context.get_tensor_shape(n)), dtype=self.types[n], device=self.device)
            for n in self.outputs
        }
        for n, tensor in outputs.items():
            self.context.set_tensor_address(n, tensor.data_ptr())
        stream = torch.cuda.current_stream(self.device)
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("TensorRT could not run the engine; its messages above say why")
        stream.synchronize()
        if self.end2end:
            return rows_from_padded(*(outputs[n] for n in ("boxes", "scores", "labels")))
        return outputs[self.outputs[0]].float()


def split_file(data: bytes, source: str) -> tuple[str | None, bytes]:
    """The metadata (None where the file has none) and the engine of an .engine file."""
    if not data.startswith(MAGIC):
        return None, data
    start = len(MAGIC) + LENGTH.size
    (length,) = LENGTH.unpack(data[len(MAGIC) : start])
    if start + length > len(data):
        raise UserError(f"{source}: cut off inside its metadata; export it again")
    return data[start : start + length].decode(), data[start + length :]


def load(
    path: Path,
    *,
    device: torch.device,
    names: Sequence[str] | None = None,
    imgsz: int | Sequence[int] | None = None,
    **_: Any,
) -> TensorRtPredictor:
    text, data = split_file(path.read_bytes(), str(path))
    metadata = Metadata.from_json(text, str(path)) if text else given_metadata(str(path), names, imgsz)
    trt = _tensorrt(f"{path} runs where TensorRT is")
    if device.type != "cuda":
        raise UserError(f"{path}: an engine runs on an NVIDIA GPU; use --device 0")
    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(data)
    if engine is None:
        raise UserError(
            f"{path}: built for another GPU or TensorRT than {trt.__version__} here; export it again on this machine"
        )
    return TensorRtPredictor(engine, trt, metadata, device)
