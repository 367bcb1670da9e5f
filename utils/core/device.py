"""Devices: what `--device` means, and whether the installed torch can use the GPU that is there."""

import ctypes
import os
import platform
import re
from collections.abc import Sequence

import torch

from utils.core.errors import UserError
from utils.core.log import LOGGER
from utils.core.machine import available_cores

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST_INT = 2**31 - 1


def parse_device(spec: str) -> list[int] | str:
    """`''` -> best available, `cpu`, `mps`, `0`, `cuda:1`, `0,1` -> list of GPU numbers or a device type."""
    text = str(spec).strip().lower().replace("cuda:", "").replace("none", "")
    if text == "":
        return [0] if torch.cuda.is_available() else "cpu"
    if text == "cuda":
        return [0]
    if text in ("cpu", "mps"):
        return text
    if not re.fullmatch(r"\d+(,\s*\d+)*", text):
        raise UserError(f"--device {spec!r}; expected cpu, mps, or GPU numbers such as 0 or 0,1")
    return [int(part) for part in text.split(",")]


def select_device(spec: str = "") -> torch.device:
    """One torch.device for `spec`; a GPU that does not exist or that this torch build cannot run is a UserError."""
    parsed = parse_device(spec)
    if parsed == "cpu":
        keep_freed_memory()
        return torch.device("cpu")
    if parsed == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps, but this machine or torch build has no MPS; use --device cpu")
        return torch.device("mps")
    assert isinstance(parsed, list)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if len(parsed) > 1 and len(parsed) != ranks:
        raise UserError(
            f"--device {spec} names {len(parsed)} GPUs for {ranks} process(es) on this machine; "
            f"start with torchrun --nproc-per-node {len(parsed)}, or name one GPU"
        )
    index = parsed[int(os.environ.get("LOCAL_RANK", 0)) if len(parsed) > 1 else 0]
    check_gpus(spec, parsed)
    check_architecture(index)
    return torch.device("cuda", index)


def warn_of_emulated_bfloat16(flag: str) -> None:
    """Say that this processor only emulates bfloat16 where oneDNN, which runs torch's CPU convolutions, knows so."""
    if torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        LOGGER.warning(f"{flag}: this processor has no 16-bit arithmetic; float32 is several times faster here")


def keep_freed_memory() -> None:
    """Make glibc, where it is the C library, reuse the memory of freed tensors instead of returning it to the system.

    By default every large tensor is mapped anew and pays for the first touch of each of its pages, which is a fifth of
    the time of a small network on the CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_INT)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_INT)


def check_gpus(spec: str, numbers: Sequence[int]) -> None:
    """Refuse GPUs that torch does not see."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if max(numbers) >= count:
        usable = f"--device cpu or a number below {count}" if count else "--device cpu"
        raise UserError(f"--device {spec}, but torch sees {count} CUDA devices; use {usable}")


def check_architecture(index: int) -> None:
    """Refuse a GPU whose architecture is not compiled into the installed torch (V100 with a CUDA 13 build)."""
    major, minor = torch.cuda.get_device_capability(index)
    built = torch.cuda.get_arch_list()
    numbers = [int(a.split("_")[1].rstrip("af")) for a in built if re.match(r"(sm|compute)_\d+", a)]
    if numbers and major * 10 + minor < min(numbers):
        name = torch.cuda.get_device_name(index)
        raise UserError(
            f"{name} is sm_{major}{minor}, but torch {torch.__version__} is built for {' '.join(built)}; "
            "install a torch built for it (Volta: torch 2.10 with CUDA 12.6, see docs/install.md)"
        )


def loader_workers(asked: int, batch_size: int) -> int:
    """Loader processes of this rank: no more than asked, than its share of the cores, or than its images of a batch."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(asked, max(available_cores() // ranks, 1), max(batch_size // ranks, 1))


def describe(device: torch.device) -> str:
    """One line for the start of a run: torch, device, memory."""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        return f"torch {torch.__version__}, CUDA:{device.index} {p.name}, {p.total_memory / 2**20:.0f} MiB"
    return f"torch {torch.__version__}, {device.type.upper()}, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def explain_memory_error(error: RuntimeError, batch_size: int, imgsz: int) -> UserError | None:
    """A UserError that names the remedy if `error` is out-of-memory, else None."""
    text = str(error).lower()
    if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in text and "can't allocate" not in text:
        return None
    LOGGER.debug("memory error", exc_info=error)
    return UserError(
        f"out of memory with --batch-size {batch_size} at --imgsz {imgsz}; try --batch-size {max(batch_size // 2, 1)} "
        "(the nominal batch is kept by accumulation), a smaller --imgsz, or --batch-size -1 on a GPU"
    )
