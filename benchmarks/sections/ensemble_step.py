"""A whole PPO step with five reward models against one."""

from __future__ import annotations

from typing import Any

from sections.common import measured, spread

PHASES = ("generate", "forward", "score", "update")


def section(result: dict[str, Any]) -> str:
    """What it is, what came out, on which machine."""
    lines = [
        f"## {result['name']}",
        "",
        f"A whole PPO step with an ensemble of 5 of the demo's reward models, and with one "
        f"of them: processor seconds, {result['num_threads']} thread, steps of both in turn in "
        "one process. The ratio is that of pairs of steps, median first.",
        "",
        "| | one: generate, forward, score, update, s | five: the same | whole step, five / one |",
        "|---|---|---|---|",
    ]
    for case in result["cases"]:
        one, five = (
            ", ".join(f"{case['seconds'][arm][phase]:.2f}" for phase in PHASES)
            for arm in ("one", "five")
        )
        lines.append(f"| {case['name']} | {one} | {five} | {spread(case['ratios'])} |")
    return "\n".join([*lines, "", measured(result), ""])
