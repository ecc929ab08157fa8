"""What keeping the frozen blocks' output saves."""

from __future__ import annotations

from typing import Any

from sections.common import measured, spread


def section(result: dict[str, Any]) -> str:
    """What keeping the frozen blocks' output saves, and that nothing else changes."""
    table = []
    for case in result["cases"]:
        of = {key: spread(case["ratios"][key]) for key in case["ratios"]}
        table.append(
            f"| {case['name']} | {of['update_cpu_s']} | {of['update_s']} | {of['forward_s']} "
            f"| {case['largest_gradient_difference']:.0e} | {case['largest_loss_difference']:.0e} "
            f"| {case['kept_mb']:.1f} |"
        )
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            "The same PPO step (4 epochs, response 32) with the last 2 layers trained, every block "
            "in every pass over frozen blocks run once per rollout batch: ratios of "
            f"{result['num_pairs']} interleaved pairs in one process with {result['num_threads']} "
            "thread, median first. Differences are the largest of any gradient of the first "
            "optimizer step, and of the losses.",
            "",
            "| | update, processor time | update, wall time | forward phase | gradients differ by "
            "| losses differ by | kept, MB |",
            "|---|--:|--:|--:|--:|--:|--:|",
            *table,
            "",
            "W1 has 4 layers of width 256 under a vocabulary of 49,152: nearly all its work is in "
            "the LM head, which reuse does not touch.",
            "",
            measured(result),
            "",
        ]
    )
