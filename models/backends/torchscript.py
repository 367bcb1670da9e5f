"""TorchScript: a trace for libtorch and older PyTorch programs. PyTorch itself now points to torch.export (.pt2)."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from models.backends.base import Metadata, ModulePredictor, given_metadata
from models.backends.graph import ExportJob
from utils.core.errors import UserError
from utils.core.files import atomic_write

METADATA_FILE = "yolov5_spd.json"


def export(job: ExportJob) -> Path:
    """Traces the network; the trace runs on the kind of device it was made on."""
    module = job.module(channels_last=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the deprecation of TorchScript, and constants that a fixed size makes
        traced = torch.jit.trace(module, job.example(), check_trace=False, strict=False)
        traced = torch.jit.freeze(traced)
        with atomic_write(job.path) as file:
            torch.jit.save(traced, file, _extra_files={METADATA_FILE: job.metadata.to_json()})
    return job.path


def load(
    path: Path,
    *,
    device: torch.device,
    names: Sequence[str] | None = None,
    imgsz: int | Sequence[int] | None = None,
    **_: Any,
) -> ModulePredictor:
    extra = {METADATA_FILE: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the deprecation of TorchScript
        try:
            module = torch.jit.load(path, map_location=device, _extra_files=extra)
        except RuntimeError as e:
            raise UserError(f"{path}: not a readable TorchScript file ({str(e).splitlines()[0]})") from e
    text = extra[METADATA_FILE]
    if text:
        return ModulePredictor(module, Metadata.from_json(text, str(path)), device)
    predictor = ModulePredictor(module, given_metadata(str(path), names, imgsz), device)
    try:
        predictor.warm_up()  # a trace does not say which sizes it takes
    except RuntimeError as e:
        height, width = predictor.metadata.imgsz
        reason = str(e).strip().splitlines()[-1][:200]
        raise UserError(f"{path}: does not run on images of {height}x{width} ({reason}); check --imgsz") from e
    return predictor
