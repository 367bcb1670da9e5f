"""Checkpoints: tensors and plain values only, read without running anything, written so that a crash loses nothing."""

import json
import zipfile
from pathlib import Path
from pickle import UnpicklingError  # the exception that torch.load raises; nothing here unpickles
from typing import Any

import torch
from torch import Tensor

from utils.core.errors import UserError
from utils.core.files import atomic_write

_PLAIN = (str, int, float, bool, type(None))


def _check_plain(value: Any, where: str) -> None:
    """Refuse anything that a weights_only load could not give back."""
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return
    if type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
        return
    if type(value) is dict:
        for key, item in value.items():
            assert type(key) in (str, int), f"{where} has a key {key!r} of type {type(key).__name__}"
            _check_plain(item, f"{where}.{key}")
        return
    raise AssertionError(f"{where} is a {type(value).__name__}: a checkpoint holds tensors and plain values only")


def save_checkpoint(path: str | Path, data: dict[str, Any]) -> None:
    """Write `data` (tensors, plain values, lists, dicts) to a .pt or .safetensors file, atomically.

    A .safetensors file takes the tensors of `data["state"]`; everything else becomes its JSON metadata.
    """
    path = Path(path)
    _check_plain(data, path.name)
    try:
        with atomic_write(path) as file:
            if path.suffix == ".safetensors":
                file.write(_to_safetensors(data))
            else:
                torch.save(data, file)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot write checkpoint '{path}': {error}; the file that was there before is untouched"
        ) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint written by `save_checkpoint`. Nothing in the file is executed."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint '{path}' not found (working directory: {Path.cwd()})")
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, UnpicklingError) as error:
        raise UserError(f"'{path}' is not a checkpoint of tensors and plain values: {_first_line(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"'{path}' holds a {type(data).__name__}; expected a checkpoint dictionary")
    return data


def is_native(path: str | Path) -> bool:
    """Whether `path` was written by this project: safetensors, or a torch archive with this project's mark."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return True
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl"]
        return len(names) == 1 and b"yolov5-spd" in archive.read(names[0])


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def _to_safetensors(data: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    state = {name: tensor.contiguous().cpu().clone() for name, tensor in data["state"].items()}
    rest = {key: value for key, value in data.items() if key not in ("state", "train")}
    return save(state, {"yolov5-spd": json.dumps(rest)})


def _from_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = (file.metadata() or {}).get("yolov5-spd")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UserError(f"'{path}' is not a readable safetensors file: {_first_line(error)}") from error
    if metadata is None:
        raise UserError(f"'{path}' holds tensors but no model description; write it with convert.py of this project")
    return {**json.loads(metadata), "state": state}
