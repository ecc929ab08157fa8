"""How time and memory of an update grow, and what an ensemble of five costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from sections.common import measured, spread

PHASES = ("generate", "forward", "score", "update")
ENSEMBLE_AIM = 1.3
"""Most times the seconds of a step with one small reward model that five are meant to take."""
NAMES = {
    "batch_size": "batch",
    "response_length": "response length",
    "vocabulary": "vocabulary",
    "num_members": "reward models",
    "num_processes": "processes",
}


def section(result: dict[str, Any]) -> str:
    base, shape = result["base"], result["base"]["shape"]
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            f"GPT-2 shape, {shape['num_layers']} layers, width {shape['width']}, vocabulary "
            f"{shape['vocabulary']:,}, full fine-tuning, critic on the trunk; batch "
            f"{base['batch_size']}, prompt {base['prompt_length']} tokens, response "
            f"{base['response_length']} tokens, {base['num_epochs']} PPO epochs, one reward model "
            f"of the same size, one process of {base['num_threads']} thread; each row changes one "
            f"of these. Medians over {len(result['rounds'])} rounds of all rows in turn, each row "
            "in processes of its own; ratios are those to the first row in the same round. "
            "Memory of several processes is added up.",
            "",
            "![Bars: seconds per update by phase, and peak memory, against batch, response length, "
            "vocabulary, reward models and processes](growth.png)",
            "",
            "| | s/update | times the first row | generate | forward | score | update "
            "| peak memory, GB | times the first row |",
            "|---|--:|---|--:|--:|--:|--:|--:|--:|",
            *rows_of(result),
            "",
            *ensemble_lines(result["ensemble_steps"]),
            "",
            measured(result),
            "",
        ]
    )


def cases(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(row's key, what it says) of every row, the base first."""
    found = [("base", "as above")]
    for quantity, values in result["values"].items():
        found += [(f"{quantity}={value}", f"{NAMES[quantity]} {value:,}") for value in values]
    return found


def medians(result: dict[str, Any], key: str) -> dict[str, float]:
    """Seconds of an update and of its phases, and `memory` in GB, over the rounds of one row."""
    done = [one[key] for one in result["rounds"]]
    found = {
        name: statistics.median(one["phase_medians_s"][name] for one in done) for name in PHASES
    }
    whole = statistics.median(one["median_s"] for one in done)
    memory = statistics.median(one["peak_rss_gb"] for one in done)
    return found | {"whole": whole, "memory": memory}


def ensemble_lines(cases: Sequence[dict[str, Any]]) -> list[str]:
    """Steps with five small reward models against steps with one."""
    met = [case["name"] for case in cases if statistics.median(case["ratios"]) <= ENSEMBLE_AIM]
    lines = [
        f"| {case['name']} | {statistics.median(case['one_s']):.2f} "
        f"| {statistics.median(case['five_s']):.2f} | {spread(case['ratios'])} "
        f"| {statistics.median(case['one_score_s']):.2f} "
        f"| {statistics.median(case['five_score_s']):.2f} |"
        for case in cases
    ]
    verdict = "for " + " and ".join(met) if met else "in no case"
    return [
        "Five small reward models (the demo's, of width 64 and 3 layers, read through their own "
        "tokenizer) against one of them: whole PPO steps in turn in one process, from the same "
        f"weights. At most {ENSEMBLE_AIM} times the seconds is the aim, met {verdict}.",
        "",
        "| policy | one, s/step | five, s/step | five / one | one, scoring | five, scoring |",
        "|---|--:|--:|---|--:|--:|",
        *lines,
    ]


def rows_of(result: dict[str, Any]) -> list[str]:
    """The table's rows, the base first."""
    lines = []
    for key, name in cases(result):
        of = medians(result, key)
        times = spread([one[key]["median_s"] / one["base"]["median_s"] for one in result["rounds"]])
        memory = statistics.median(
            one[key]["peak_rss_gb"] / one["base"]["peak_rss_gb"] for one in result["rounds"]
        )
        phases = " | ".join(f"{of[phase]:.2f}" for phase in PHASES)
        compared = ("1", "1") if key == "base" else (times, f"{memory:.2f}")
        lines.append(
            f"| {name} | {of['whole']:.2f} | {compared[0]} | {phases} | {of['memory']:.2f} "
            f"| {compared[1]} |"
        )
    return lines
