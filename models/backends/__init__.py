"""Deployment: one file per format, each with its exporter and its runtime, and the one table from which choices derive.

`FORMATS` gives the choices of `export.py --include`, the suffixes by which a file is recognized, and the documentation.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from models.backends.base import Metadata, Predictor
from utils.core.device import select_device
from utils.core.errors import UserError
from utils.core.files import nearest
from utils.core.log import LOGGER

__all__ = ["FORMATS", "Format", "Metadata", "Predictor", "exportable", "format_of", "load_predictor"]


@dataclass(frozen=True)
class Format:
    """One deployment format: how it is named, recognized and what its exporter can do."""

    name: str  # the choice of --include
    title: str
    suffix: str  # end of the file's or folder's name
    module: str
    exports: bool = True  # False: the native checkpoint, which train.py writes
    int8: bool = False
    requires: tuple[str, ...] = ()  # packages beside torch

    def load_module(self) -> ModuleType:
        return importlib.import_module(f"models.backends.{self.module}")


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("pytorch", "PyTorch", ".pt", "pytorch", exports=False),
        Format("safetensors", "safetensors", ".safetensors", "pytorch", exports=False),
        Format("torch_export", "torch.export", ".pt2", "torch_export"),
        Format("torchscript", "TorchScript", ".torchscript", "torchscript"),
        Format("onnx", "ONNX", ".onnx", "onnx", int8=True, requires=("onnx", "onnxscript", "onnxruntime")),
        Format(
            "openvino",
            "OpenVINO",
            "_openvino_model/",
            "openvino",
            int8=True,
            requires=("onnx", "onnxscript", "openvino"),
        ),
        Format("engine", "TensorRT", ".engine", "tensorrt", int8=True, requires=("onnx", "onnxscript", "tensorrt")),
    )
}


def exportable() -> tuple[str, ...]:
    """The names that --include takes."""
    return tuple(f.name for f in FORMATS.values() if f.exports)


def format_of(path: str | Path) -> Format:
    """The format of a file by the end of its name; unknown ones are refused with the list of those that exist."""
    name = Path(path).name.lower()
    for f in FORMATS.values():
        if name.endswith(f.suffix.rstrip("/")):
            return f
    suffixes = [f.suffix for f in FORMATS.values()]
    hint = nearest(Path(name).suffix, suffixes)
    raise UserError(f"{path}: no known model format; expected a name that ends with {', '.join(suffixes)}{hint}")


def load_predictor(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    half: bool = False,
    names: Sequence[str] | None = None,
    imgsz: int | Sequence[int] | None = None,
    fuse: bool = True,
) -> Predictor:
    """Any deployed file as predictor: images float [B, 3, H, W] in 0..1 -> [B, N, 5 + nc], or rows where `end2end`.

    `names` and `imgsz` stand in for the metadata of a file that has none. `half` asks for the runtime's 16-bit floats.
    """
    path = Path(path)
    fmt = format_of(path)
    folder = fmt.suffix.endswith("/")
    if not path.exists():
        raise UserError(f"{path}: no such file; check --weights")
    if path.is_dir() != folder:
        raise UserError(f"{path}: {fmt.title} is a {'folder' if folder else 'file'}, this is none")
    device = select_device(device) if isinstance(device, str) else device
    predictor = fmt.load_module().load(path, device=device, half=half, names=names, imgsz=imgsz, fuse=fuse)
    if half and fmt.module not in ("pytorch", "openvino") and predictor.metadata.precision == "fp32":
        LOGGER.warning(f"{path}: runs in float32 as it was exported; for 16 bits export it with --half")
    return predictor
