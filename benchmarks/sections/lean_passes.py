"""What it saves to run models and LM head once."""

from __future__ import annotations

from typing import Any

from sections.common import measured, spread


def section(result: dict[str, Any]) -> str:
    """What it saves to run models and LM head once."""
    table = [
        f"| {case['name']} | {spread(case['ratios'])} | {case['largest_difference']:.0e} |"
        for case in result["cases"]
    ]
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            "W1, processor time of the work done twice over that of the work done once; "
            f"{result['num_pairs']} interleaved pairs in one process with {result['num_threads']} "
            "thread, median first. Evaluation ran both trunks and both LM heads for the log-probs "
            "and again for the exact KL. The update computed logits for the log-probs, and again "
            "for the gradients; now a chunk's gradients are formed while its logits are there. The "
            "last column is the largest difference of a log-ratio or KL, and of a gradient.",
            "",
            "| | twice / once | differ by |",
            "|---|--:|--:|",
            *table,
            "",
            measured(result),
            "",
        ]
    )
