"""The batch size that fits: a few training steps of growing size are measured, and the memory is extrapolated."""

import copy

import numpy as np
import torch
from torch import nn

from utils.core.errors import UserError
from utils.core.log import LOGGER

TRIALS = (1, 2, 4, 8, 16)
SHARE = 0.85  # of the memory that is free at the start


def fit_batch_size(sizes: list[int], used: list[float], room: float) -> int:
    """The largest batch whose memory, by the line through (sizes, used), stays within `room`; at least 1."""
    slope, base = np.polyfit(sizes, used, 1)
    if slope <= 0:
        return max(sizes)
    best = int((room - base) / slope)
    return max(best // 8 * 8 if best >= 8 else best, 1)


def measure_batch_size(model: nn.Module, imgsz: int, device: torch.device, amp: torch.dtype | None) -> int:
    """Images per process that fill 85 % of the free memory of a CUDA device in forward and backward."""
    if device.type != "cuda":
        raise UserError(f"--batch-size -1 measures memory on a CUDA device, not on {device.type}; give a number")
    trial = copy.deepcopy(model).to(device).to(memory_format=torch.channels_last).train()
    free = torch.cuda.mem_get_info(device)[0]
    sizes, used = [], []
    for size in TRIALS:
        torch.cuda.reset_peak_memory_stats(device)
        try:
            images = torch.rand(size, 3, imgsz, imgsz, device=device).to(memory_format=torch.channels_last)
            with torch.autocast("cuda", dtype=amp or torch.float16, enabled=amp is not None):
                outputs = trial(images)
            outputs = outputs if isinstance(outputs, list) else [outputs]
            sum(o.float().square().mean() for o in outputs).backward()  # type: ignore[union-attr]
        except torch.OutOfMemoryError:
            break
        sizes.append(size)
        used.append(float(torch.cuda.max_memory_allocated(device)))
        trial.zero_grad(set_to_none=True)
    del trial
    torch.cuda.empty_cache()
    if len(sizes) < 2:
        raise UserError(f"not even 2 images of {imgsz} px fit into {free / 2**30:.1f} GiB; use a smaller --imgsz")
    best = fit_batch_size(sizes, used, free * SHARE)
    LOGGER.info(f"batch size {best} per process fits {SHARE:.0%} of {free / 2**30:.1f} GiB at {imgsz} px")
    return best
