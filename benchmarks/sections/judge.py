"""What a call to a judge costs beside the judge."""

from __future__ import annotations

from typing import Any


def section(result: dict[str, Any]) -> str:
    """What a call to a judge costs beside the judge."""

    def each(key: str) -> str:
        return ", ".join(f"{value:.2f}" for value in result[key])

    return "\n".join(
        [
            f"## {result['name']}",
            "",
            f"`JudgeClient` against a server on loopback in a process of its own, "
            f"{result['concurrency']} calls at a time, a cap in USD, every answer and every "
            "reservation synced to disk; three repeats.",
            "",
            "| | measured |",
            "|---|--:|",
            f"| own time per call, a server that answers at once (2,048 calls) | "
            f"{each('overhead_ms')} ms |",
            f"| the same calls again, from the cache | {each('cached_ms')} ms |",
            f"| 256 calls of 200 ms, over the ideal 0.8 s | {each('latency_over_ideal')} |",
            "",
            f"Measured {result['date']} with `{result['command']}` on {result['num_cpus']} cores "
            f"(load average {result['load']}), Python {result['python']}.",
            "",
        ]
    )
