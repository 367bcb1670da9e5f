"""Checkpoints: tensors and plain values only, read without running anything, written so that a crash loses nothing."""

import json
import struct
import zipfile
from pathlib import Path
from pickle import UnpicklingError  # the exception that torch.load raises; nothing here unpickles
from typing import Any

import torch
from torch import Tensor

from utils.core.errors import UserError
from utils.core.files import atomic_write

FORMAT = "yolov5-spd"  # the value of a checkpoint's first key, "format", and the key of safetensors' metadata
_PLAIN = (str, int, float, bool, type(None))
# How the pickle of a dictionary begins that torch.save writes and whose first entry is format: FORMAT.
_MARK = b"\x80\x02}q\x00(X\x06\x00\x00\x00formatq\x01X\x0a\x00\x00\x00" + FORMAT.encode() + b"q\x02"
_DAMAGE = (zipfile.BadZipFile, RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError,
           AssertionError, struct.error)  # fmt: skip


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
    except RuntimeError as error:  # torch's writer on a full disk
        raise UserError(f"cannot write '{path}' ({_first_line(error)}); what was there before is untouched") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint written by `save_checkpoint`. Nothing in the file is executed."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint '{path}' not found (working directory: {Path.cwd()})")
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    try:
        _verify(path)  # torch does not look at the sums
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, *_DAMAGE) as error:
        # torch's text for an UnpicklingError is advice to load the file unsafely
        reason = "it is damaged, or names classes" if isinstance(error, UnpicklingError) else _first_line(error)
        raise UserError(
            f"'{path}' is not a checkpoint of tensors and plain values: {reason}; "
            "expected a file written by train.py or convert.py"
        ) from error
    if not isinstance(data, dict):
        raise UserError(f"'{path}' holds a {type(data).__name__}; expected a checkpoint dictionary")
    return data


def is_native(path: str | Path) -> bool:
    """Whether `path` was written by this project: safetensors, or a torch archive that begins with this project's mark.

    A damaged archive is a UserError.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return True
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            found = [i for i in archive.infolist() if i.filename.rpartition("/")[2] == "data.pkl"]
            stored = len(found) == 1 and found[0].compress_type == zipfile.ZIP_STORED  # as torch does: no zip bombs
            return stored and archive.read(found[0]).startswith(_MARK)
    except _DAMAGE as error:
        raise UserError(f"'{path}' is damaged ({_first_line(error)}); fetch or save it again") from error


def _verify(path: Path) -> None:
    """Compare the check sums of a torch archive with its content."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()) or archive.testzip():
                raise zipfile.BadZipFile("its content does not match its check sums")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def _to_safetensors(data: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    state = {name: tensor.contiguous().cpu().clone() for name, tensor in data["state"].items()}
    rest = {key: value for key, value in data.items() if key not in ("state", "train")}
    return save(state, {FORMAT: json.dumps(rest)})


def _from_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = (file.metadata() or {}).get(FORMAT)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UserError(f"'{path}' is not a readable safetensors file: {_first_line(error)}") from error
    if metadata is None:
        raise UserError(f"'{path}' holds tensors but no model description; write it with convert.py of this project")
    try:
        rest = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged: its model description is not JSON; fetch or save it again") from error
    if not isinstance(rest, dict):
        raise UserError(f"'{path}' is damaged: its model description is a {type(rest).__name__}; expected an object")
    return {**rest, "state": state}
