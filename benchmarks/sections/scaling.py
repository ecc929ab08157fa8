"""Rollouts per second of two processes against one."""

from __future__ import annotations

import statistics
from typing import Any

from sections.common import measured, spread


def section(result: dict[str, Any]) -> str:
    """What it is, what came out, on which machine."""
    pairs = result["pairs"]
    ratios = [pair["two"] / pair["one"] for pair in pairs]
    middle = {name: statistics.median(pair[name] for pair in pairs) for name in ("one", "two")}
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            "Rollouts per second of whole PPO steps on the packaged quickstart model, one thread "
            f"per process, {result['batch_size']} rollouts per step over all processes; medians of "
            f"{len(pairs)} pairs of runs, one after the other.",
            "",
            "| processes | rollouts per second | times as many as one process |",
            "|--:|--:|---|",
            f"| 1 | {middle['one']:.1f} | 1 |",
            f"| 2 | {middle['two']:.1f} | {spread(ratios)} |",
            "",
            measured(result),
            "",
        ]
    )
