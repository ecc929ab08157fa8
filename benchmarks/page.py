"""docs/benchmarks.md from benchmarks/results/*.json: no figure on that page is typed by hand.

    python benchmarks/page.py

A result's `kind` names the module of `sections` that writes it. A new table is a script that writes
a result of a new kind, and a module with a function `section`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sections import (
    engines,
    ensemble,
    ensemble_step,
    growth,
    judge,
    judge_overlap,
    large_model,
    lean_passes,
    lean_update,
    memory,
    ppo,
    scaling,
    token_budget,
    update_floor,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

INTRODUCTION = """# Benchmarks

Written by `benchmarks/page.py` from the files in `benchmarks/results/`; the figures are not typed \
by hand.

TRL removed PPO in 1.13; 1.12.0 is its last release with it. The arms run in turn, each in a \
process of its own, on the same prompts with the same models' sizes, response lengths, epochs, \
minibatches, optimizer steps and threads, and a KL penalty from a frozen reference. Machines are \
shared and noisy, so seconds depend on what else was running, and the ratio within a round is what \
counts. The first update of each process is left out of medians: memory is still being laid out \
then.
"""

SECTIONS: Mapping[str, Callable[[dict[str, Any]], str]] = {
    "ppo": ppo.section,
    "large_model": large_model.section,
    "growth": growth.section,
    "scaling": scaling.section,
    "update_floor": update_floor.section,
    "lean_update": lean_update.section,
    "lean_passes": lean_passes.section,
    "token_budget": token_budget.section,
    "ensemble": ensemble.section,
    "ensemble_step": ensemble_step.section,
    "judge": judge.section,
    "judge_overlap": judge_overlap.section,
    "memory": memory.section,
    "engines": engines.section,
}
"""Kind of a result -> its section, in the order of the page."""


def write_page() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(load_results()), encoding="utf-8")


def load_results() -> list[dict[str, Any]]:
    """All results in the order of the page; those of one kind by the names of their files."""
    results = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    return sorted(results, key=lambda result: list(SECTIONS).index(result["kind"]))


def render(results: Sequence[dict[str, Any]]) -> str:
    return "\n".join([INTRODUCTION, *(section(result) for result in results)])


def section(result: dict[str, Any]) -> str:
    """One result file's part of the page."""
    return SECTIONS[result["kind"]](result)


if __name__ == "__main__":
    write_page()
