"""What judging while sampling saves."""

from __future__ import annotations

from typing import Any


def section(result: dict[str, Any]) -> str:
    """What judging while sampling saves."""
    table = [
        f"| {name} | {case['delay_s']:.2f} s | {case['sampled_ratio']:.2f} | "
        f"{case['step_ratio']:.2f} |"
        for name, case in result["cases"].items()
    ]
    num_pairs = len(next(iter(result["cases"].values()))["pairs"])
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            f"A judge behind a server, {result['concurrency']} answers at a time, "
            f"{result['batch_size']} responses of a small GPT-2 a step; an answer takes so long "
            "that scoring takes about as long as sampling. The time with every response judged as "
            "soon as it is finished, over the time with all judged when the last one is: medians "
            f"of {num_pairs} interleaved pairs. A whole step is sampling, forward passes, scores "
            "and one epoch of learning.",
            "",
            "| responses | an answer takes | sampling and scoring | whole step |",
            "|---|--:|--:|--:|",
            *table,
            "",
            "Responses that all end at the same moment leave only the forward passes to overlap "
            "with; a smaller `rollout.generation_batch_size` lets the judge begin earlier.",
            "",
            f"Measured {result['date']} with `{result['command']}` on {result['num_cpus']} cores "
            f"(load average {result['load']}), Python {result['python']}, PyTorch "
            f"{result['torch']}.",
            "",
        ]
    )
