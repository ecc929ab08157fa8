"""How much memory this process has used, uses now, and may use."""

import resource
import sys
from pathlib import Path

import torch

GIB = 2**30
PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def peak_memory_gib(device: torch.device) -> float:
    """Peak in GiB: allocated on the GPU, or resident on the CPU."""
    return peak_memory(device) / GIB


def peak_memory(device: torch.device) -> int:
    """Most bytes at once since `reset_peak`, or since the start of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device: torch.device) -> None:
    """Forget earlier peaks. Without Linux's /proc they stay: peaks are then upper bounds."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        (PROC / "self/clear_refs").write_text("5")
    except OSError:
        return


def used_memory(device: torch.device) -> int:
    """Bytes now; if the system does not say, the most until now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int((PROC / "self/statm").read_text().split()[1])
    except OSError:
        return peak_memory(device)
    return pages * resource.getpagesize()


def cuda_context(device: torch.device) -> int:
    """What CUDA and its libraries take on a GPU before the first tensor; a round figure."""
    return GIB // 2 if device.type == "cuda" else 0


def device_memory(device: torch.device) -> int | None:
    """Bytes that this process may use: a GPU's memory, or on the CPU its own plus what is free.

    On the CPU the container's limit counts too. None if the system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    free = [size for size in (_free_in_system(), _free_in_container()) if size is not None]
    return min(free) + used_memory(device) if free else None


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
