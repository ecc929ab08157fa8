"""The update phase against the matrix products that it cannot do without."""

from __future__ import annotations

from typing import Any

from sections.common import measured, spread


def section(result: dict[str, Any]) -> str:
    """The update phase against the matrix products that it cannot do without."""
    table = [
        f"| {case['name']} | {case['gflop']:.0f} | {case['gflops_per_s']:.1f} "
        f"| {case['floor_s']:.2f} | {case['update_cpu_s']:.2f} | {spread(case['ratios'])} "
        f"| {spread(case['wall_ratios'])} |"
        for case in result["cases"]
    ]
    parts = [
        f"- {case['name']}: "
        + ", ".join(f"{name} {share:.0%}" for name, share in case["profile"].items())
        for case in result["cases"]
    ]
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            "One epoch of the update (full fine-tuning, 1 minibatch, critic on the trunk) over its "
            "floor: the floating-point operations of the model's matrix products, forward and "
            "backward, at the rate of products of the model's own shapes, measured around each "
            f"update in the same process. {result['num_rounds']} rounds, {result['num_threads']} "
            "thread; processor seconds unless it says otherwise. Attention's own products "
            "(queries with keys) are in the floor, everything that is no matrix product is not.",
            "",
            "| | GFLOP | GFLOP/s | floor, s | update, s | update / floor | the same in wall time |",
            "|---|--:|--:|--:|--:|--:|--:|",
            *table,
            "",
            "Where the processor time of an epoch goes (`torch.profiler`, time of the operation "
            "itself):",
            "",
            *parts,
            "",
            measured(result),
            "",
        ]
    )
