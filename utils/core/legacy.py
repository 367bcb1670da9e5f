"""Foreign checkpoints, read as data: torch archives whose pickle names classes of other projects.

`utils.core.inert` reads the program part without running anything; this file knows the two containers that torch has
used and reads tensors from their raw blocks. There is no looser second attempt.
"""

import functools
import io
import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.core.errors import UserError, printable
from utils.core.inert import Damaged, Machine, Refused, TensorRef, need

MAX_BYTES = 4 << 30
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of torch's format before the zip archive
_DAMAGE = (IndexError, KeyError, TypeError, ValueError, RuntimeError, EOFError, struct.error, zipfile.BadZipFile)


@dataclass
class LegacyFile:
    """What a foreign checkpoint holds: `root` of plain values, `Foreign`, `TensorRef`; `tensor` reads the raw data."""

    path: Path
    root: Any
    _blocks: Callable[[str], bytearray]
    _budget: int

    def tensor(self, ref: TensorRef) -> Tensor:
        """The tensor of `ref`, contiguous, in the dtype of the file."""
        raw = self._blocks(ref.storage.key)
        width, count = ref.storage.dtype.itemsize, math.prod(ref.shape)
        self._budget -= count * width
        if self._budget < 0 or count > ref.storage.size or len(raw) != ref.storage.size * width:
            raise UserError(f"'{self.path}' is damaged: its tensors do not fit the data of the file")
        if not raw:
            return torch.empty(ref.shape, dtype=ref.storage.dtype)
        flat = torch.frombuffer(raw, dtype=ref.storage.dtype)
        return torch.as_strided(flat, ref.shape, ref.stride, ref.offset).clone(memory_format=torch.contiguous_format)


def read_legacy(path: str | Path) -> LegacyFile:
    """Read a torch archive (zip, or the format of torch before 1.6) that may name foreign classes; nothing is run."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights '{path}' not found (working directory: {Path.cwd()})")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"'{path}' has {size} bytes; checkpoints of up to {MAX_BYTES} are read")
    data = path.read_bytes()
    try:
        reader = _read_zip if data[:2] == b"PK" else _read_stream
        return reader(path, data)
    except UserError:
        raise
    except Refused as error:
        raise UserError(
            f"'{path}' asks for {printable(error)}, which no YOLOv5 checkpoint needs; refused, and nothing of the file"
            " was run"
        ) from None
    except (Damaged, *_DAMAGE) as error:
        reason = printable(error if type(error) is Damaged else f"{type(error).__name__}: {error}")
        raise UserError(
            f"'{path}' is not a readable torch checkpoint ({reason}); expected a .pt or "
            ".safetensors file: fetch or save it again"
        ) from None


def _read_zip(path: Path, data: bytes) -> LegacyFile:
    """torch's zip archive: <name>/data.pkl and <name>/data/<key>, stored without compression."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    entries = {info.filename: info for info in archive.infolist()}
    need(len(entries) == len(archive.infolist()), "two entries of one name")
    if any(name.endswith("/constants.pkl") for name in entries):
        raise UserError(f"'{path}' is a TorchScript program, not a checkpoint; rename it to .torchscript to run it")
    need(all(info.compress_type == zipfile.ZIP_STORED for info in entries.values()), "compressed entries")
    need(sum(info.file_size for info in entries.values()) <= len(data), "overlapping entries")
    programs = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    need(len(programs) == 1, "not exactly one data.pkl")
    prefix = programs[0].removesuffix("data.pkl")
    order = entries.get(f"{prefix}byteorder")
    need(order is None or archive.read(order).strip() == b"little", "big-endian data")
    root = Machine(archive.read(programs[0])).run()

    @functools.cache  # many tensors may be views of one storage
    def block(key: str) -> bytearray:
        info = entries.get(f"{prefix}data/{key}")
        if info is None:
            raise UserError(f"'{path}' is damaged: it has no data for storage '{printable(key)}'")
        return bytearray(archive.read(info))

    return LegacyFile(path, root, block, 4 * len(data) + (1 << 20))


def _read_stream(path: Path, data: bytes) -> LegacyFile:
    """torch's format before 1.6: four pickles, the list of storage keys, then the raw storages in its order."""
    parts, at, widths = [], 0, {}
    for number in range(5):
        machine = Machine(data, at)
        parts.append(machine.run())
        at = machine.at
        widths.update({key: storage.dtype.itemsize for key, storage in machine.storages.items()})
        need(number > 0 or parts[0] == _LEGACY_MAGIC, "a bare pickle, not a torch checkpoint")
    _, _, system, root, keys = parts
    need(type(system) is dict and system.get("little_endian") is True, "big-endian data")
    need(type(keys) is list, "no list of storages")
    need(all(type(key) is str for key in keys), "no list of storages")
    spans: dict[str, tuple[int, int]] = {}
    for key in keys:
        need(key in widths and at + 8 <= len(data), "a storage that nothing uses")
        count = int.from_bytes(data[at : at + 8], "little", signed=True)
        end = at + 8 + count * widths[key]
        need(count >= 0 and end <= len(data), "the file ends early")
        spans[key] = (at + 8, end)
        at = end

    @functools.cache
    def block(key: str) -> bytearray:
        if key not in spans:
            raise UserError(f"'{path}' is damaged: it has no data for storage '{printable(key)}'")
        return bytearray(data[slice(*spans[key])])

    return LegacyFile(path, root, block, 4 * len(data) + (1 << 20))
