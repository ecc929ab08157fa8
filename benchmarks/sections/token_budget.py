"""Micro-batches by a budget of tokens against fixed ones."""

from __future__ import annotations

from typing import Any

from sections.common import measured, spread


def section(result: dict[str, Any]) -> str:
    """What it is, what came out, on which machine."""
    rows = {
        "fixed": f"{result['micro_batch_size']} responses each",
        "budget": f"at most {result['micro_batch_tokens']:,} tokens each",
    }
    ratios = result["ratios"]
    lines = [
        f"## {result['name']}",
        "",
        f"W1's shape, {result['batch_size']} responses of {result['lengths'][0]} to "
        f"{result['lengths'][1]} tokens, one epoch; {len(ratios['update_cpu_s'])} interleaved "
        f"pairs in one process, {result['num_threads']} thread, processor time. Both arms hold as "
        f"many tokens at once; {result['real_tokens']:,} tokens are real.",
        "",
        "| micro-batches | how many | tokens with padding | forward phase, s | update, s |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, told in rows.items():
        arm = result["arms"][name]
        lines.append(
            f"| {told} | {arm['num_micro_batches']} | {arm['padded_tokens']:,} | "
            f"{arm['forward_cpu_s']:.2f} | {arm['update_cpu_s']:.2f} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"Fixed / budget: forward phase {spread(ratios['forward_cpu_s'])}, update "
            f"{spread(ratios['update_cpu_s'])}. Losses differ by at most "
            f"{result['largest_loss_difference']:.0e}. The LM "
            "head, most of W1's work, runs on real tokens alone in either arm, so that padding "
            "costs the trunk only.",
            "",
            measured(result),
            "",
        ]
    )
