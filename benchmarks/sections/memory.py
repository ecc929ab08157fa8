"""Estimates of a run's memory beside measured peaks."""

from __future__ import annotations

from typing import Any

MEMORY_AIM = 0.15
"""Largest error of a memory estimate that is meant to be."""


def section(result: dict[str, Any]) -> str:
    """Every case's estimate beside its measured peak."""
    off = [case["estimate_gib"] / case["measured_gib"] - 1 for case in result["cases"]]
    beyond = sum(abs(one) > MEMORY_AIM for one in off)
    machine, versions = result["machine"], result["versions"]
    lines = [
        f"| {case['name']} | {case['measured_gib']:.2f} | {case['estimate_gib']:.2f} "
        f"| {f'**{one:+.0%}**' if abs(one) > MEMORY_AIM else f'{one:+.0%}'} | {case['phase']} |"
        for case, one in zip(result["cases"], off, strict=True)
    ]
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            "Peak resident size of a process that runs two PPO steps on the CPU, against what the "
            "trial step of `klippo train --dry-run` finds in another process. W1's shape with one "
            "epoch, batch 64 and response 32 unless the row says otherwise; SmolLM2-135M with "
            "batch 16. The last column is the phase in which the estimate is largest.",
            "",
            "| | measured, GiB | estimated, GiB | off by | phase |",
            "|---|--:|--:|--:|---|",
            *lines,
            "",
            f"{len(off) - beyond} of {len(off)} are within {MEMORY_AIM:.0%}. Not measured: GPUs, "
            "4-bit weights, several processes.",
            "",
            *([result["note"], ""] if "note" in result else []),
            f"Measured {result['date']} with `{result['command']}` on {machine['cores']} "
            f"{machine['architecture']} cores, PyTorch {versions['torch']}, transformers "
            f"{versions['transformers']}.",
            "",
        ]
    )
