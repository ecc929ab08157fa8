"""Llama 3 8B's shape with LoRA: time, memory, and the share of the device's rate."""

from __future__ import annotations

import statistics
from typing import Any

from sections import ppo


def section(result: dict[str, Any]) -> str:
    on_gpu = result["workload"]["device"] == "cuda"
    rates = [done["trunk"]["matmul_gflops"] / 1000 for done in result["rounds"]]
    gpu = f" on a {result['machine']['gpu']}" if on_gpu else ""
    memory = "in tensors on the GPU, after the models were built" if on_gpu else "resident"
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            ppo.description(result),
            "",
            *_not_measured(result),
            ppo.comparison_table(result),
            "",
            ppo.phase_table(result),
            "",
            f"Memory is the peak {memory}. The last column is the update's utilisation: model "
            "FLOPs (two products for a frozen weight and three for one that trains, a critic of "
            "its own included, nothing that is computed twice) over the update's time, at the rate "
            f"of products of the model's own shapes in {result['workload']['dtype']}, measured in "
            f"the same process: {statistics.median(rates):.2f} TFLOP/s{gpu}.",
            "",
            *ppo.remarks(result),
            ppo.measured_on(result),
            "",
        ]
    )


def _not_measured(result: dict[str, Any]) -> list[str]:
    if result["workload"]["device"] == "cuda":
        return []
    return [
        "Reduced, on the CPU: these figures show that both arms run with the code and the settings "
        "of W3, and say nothing about a GPU. **Not measured: Llama 3 8B's size, the GPU's time, "
        "memory and utilisation.**",
        "",
    ]
