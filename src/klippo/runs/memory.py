"""How much memory the process has needed, holds now, and may have."""

import os
import platform
import resource
import sys
from pathlib import Path

import torch

GIB = 2**30
CUDA_FRAMEWORK = GIB // 2
"""What CUDA's context and its libraries take on a GPU before the first tensor; a round figure."""
CPU_WORKSPACE = 24 * 2**20
"""What PyTorch's CPU libraries take when they first compute (benchmarks/memory_estimate.py)."""
KEPT_BY_GLIBC = 0.5
"""Of a phase's passing memory in blocks below 32 MiB, what glibc keeps back beside what is in use:
such blocks lie in its heap and leave gaps. A round figure between 0.35 and 0.7 that were measured
(benchmarks/memory_estimate.py)."""
MMAP_VARIABLE = "MALLOC_MMAP_THRESHOLD_"
"""With this variable of glibc at 1048576 every larger block goes back to the system at once."""
PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def peak_memory_gib(device: torch.device) -> float:
    """Peak in GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return _peak_resident() / GIB


def framework_bytes(device: torch.device) -> int:
    """What is held before the first model: on the CPU by this process now, on a GPU by CUDA."""
    return CUDA_FRAMEWORK if device.type == "cuda" else _resident() + CPU_WORKSPACE


def kept_share(device: torch.device) -> float:
    """Share of passing memory that is held once more, because the allocator keeps it back."""
    has_heap = device.type == "cpu" and platform.libc_ver()[0] == "glibc"
    return KEPT_BY_GLIBC if has_heap and MMAP_VARIABLE not in os.environ else 0.0


def device_memory(device: torch.device) -> int | None:
    """Bytes that this process may hold: a GPU's memory, or its own and what is free on the CPU.

    On the CPU the container's limit counts too. None where the system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    free = [size for size in (_free_in_system(), _free_in_container()) if size is not None]
    return min(free) + _resident() if free else None


def _peak_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def _resident() -> int:
    """Bytes now; where the system does not say, the most until now."""
    try:
        pages = int((PROC / "self/statm").read_text().split()[1])
    except OSError:
        return _peak_resident()
    return pages * resource.getpagesize()


def _free_in_system() -> int | None:
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in lines)
    return int(sizes["MemAvailable"].split()[0]) * 1024


def _free_in_container() -> int | None:
    """Below the limit of the control group (version 2), page cache counted as used."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(int(limit) - used, 0)
