"""docs/growth.png from benchmarks/results/growth.json.

python benchmarks/growth_plot.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from page import RESULTS, ROOT
from sections.growth import NAMES, PHASES, medians

PICTURE = ROOT / "docs" / "growth.png"
SIZE = (9.6, 4.4)  # inches


def draw(result: dict[str, Any], path: Path = PICTURE) -> None:
    """A column per quantity: seconds per update by phase above, peak memory below."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from klippo.report.style import DOTS_PER_INCH, GREY, PALETTE, STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots(
            2, len(NAMES), sharey="row", sharex="col", height_ratios=(1.6, 1), squeeze=False
        )
        for column, (quantity, label) in enumerate(NAMES.items()):
            bars = bars_of(result, quantity)
            above, below = axes[0][column], axes[1][column]
            bottom = [0.0] * len(bars)
            for colour, phase in zip(PALETTE, PHASES, strict=False):
                heights = [of[phase] for _, of in bars]
                above.bar(range(len(bars)), heights, 0.7, bottom, color=colour, label=phase)
                bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
            below.bar(range(len(bars)), [of["memory"] for _, of in bars], 0.7, color=GREY)
            below.set_xticks(range(len(bars)), [f"{value:,}" for value, _ in bars])
            below.set_xlabel(label)
        axes[0][0].set_ylabel("seconds per update")
        axes[1][0].set_ylabel("peak memory, GB")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(PHASES))
        figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})


def bars_of(result: dict[str, Any], quantity: str) -> list[tuple[int, dict[str, float]]]:
    """(value, medians) of one quantity, the base's value first."""
    base = result["base"] | {"vocabulary": result["base"]["shape"]["vocabulary"]}
    first = (base | {"num_processes": 1})[quantity]
    others = result["values"][quantity]
    return [
        (first, medians(result, "base")),
        *((value, medians(result, f"{quantity}={value}")) for value in others),
    ]


if __name__ == "__main__":
    draw(json.loads((RESULTS / "growth.json").read_text()))
