"""What this process may use of the machine: cores and memory, with the limits of containers and schedulers."""

import os
from pathlib import Path


def available_cores() -> int:
    """The cores that this process may use: containers, taskset and slurm often allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Bytes of memory that can be used without swapping, container limits included."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = [line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
        free = int(available[0].split()[1]) * 1024 if available else free
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
