"""Micro-batches by a budget of tokens."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any


def section(result: Mapping[str, Any]) -> str:
    """Micro-batches of so many responses against those of so many tokens."""
    rows = {
        "fixed": f"{result['micro_batch_size']} responses each",
        "budget": f"at most {result['micro_batch_tokens']:,} tokens each",
    }
    ratios = {key: sorted(values) for key, values in result["ratios"].items()}
    forward, update = (statistics.median(ratios[key]) for key in ("forward_cpu_s", "update_cpu_s"))
    lines = [
        "## Micro-batches by tokens",
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
    spread = ", ".join(f"{ratio:.2f}" for ratio in result["ratios"]["update_cpu_s"])
    versions = result["versions"]
    return "\n".join(
        [
            *lines,
            "",
            f"Fixed / budget: forward phase **{forward:.2f}**, update **{update:.2f}** ({spread}). "
            f"Losses differ by at most {result['largest_loss_difference']:.0e}. The LM head, "
            "most of W1's work, runs on real tokens alone in either arm, so that padding costs the "
            "trunk only.",
            "",
            f"Measured {result['date']} with `{result['command']}` on {result['machine']['cores']} "
            f"{result['machine']['architecture']} cores (load average {result['load_average']}), "
            f"PyTorch {versions['torch']}, transformers {versions['transformers']}.",
            "",
        ]
    )
