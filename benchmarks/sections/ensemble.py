"""Members of an ensemble scored together against separate calls."""

from __future__ import annotations

from typing import Any


def section(result: dict[str, Any]) -> str:
    """Members together against separate calls: what it is, what came out, on which machine."""
    lines = [
        f"## {result['name']}",
        "",
        f"`EnsembleReward.score` of {result['num_members']} random GPT-2 reward models against "
        f"{result['num_members']} times `ClassifierReward.score`, on the same texts of 4 to 40 "
        f"tokens; medians over {result['num_pairs']} interleaved pairs, {result['num_threads']} "
        "threads, no GPU. An ensemble puts the texts together and tokenizes them once; where calls "
        'and not arithmetic take the time ("stacked") the weights of all members also run as one '
        "batched forward, elsewhere one after the other.",
        "",
        "| width x layers | texts | separate, ms | together, ms | ratio | | largest difference |",
        "|---|--:|--:|--:|--:|---|--:|",
    ]
    lines += [
        f"| {c['width']} x {c['layers']} | {c['batch']} | {c['separate_ms']:.1f} "
        f"| {c['ensemble_ms']:.1f} | **{c['ratio']:.2f}** | {'stacked' if c['stacked'] else ''} "
        f"| {c['largest_difference']:.0e} |"
        for c in result["cases"]
    ]
    machine, versions = result["machine"], result["versions"]
    return "\n".join(
        [
            *lines,
            "",
            "The demo's proxies have the shape 64 x 3. What this does not show: a GPU, where calls "
            "weigh more and members always run stacked.",
            "",
            f"Measured {result['date']} with `{result['command']}` on {machine['cores']} "
            f"{machine['architecture']} cores (load average {result['load_average']:.1f}), PyTorch "
            f"{versions['torch']}, transformers {versions['transformers']}.",
            "",
        ]
    )
