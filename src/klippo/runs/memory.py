"""How much memory the process has needed."""

import resource
import sys

import torch


def peak_memory_gib(device: torch.device) -> float:
    """Peak in GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
