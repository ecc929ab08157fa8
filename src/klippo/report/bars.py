"""Plots of a report that count: histograms of samples, and where the time goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from klippo.evaluation.history import Floats
from klippo.report.reading import RunData
from klippo.report.style import (
    BLUE,
    COLOURS,
    GREY,
    PALETTE,
    Picture,
    draw,
    plot_label,
    run_style,
    whole_numbers,
)
from klippo.report.text import number


def histogram(runs: Sequence[RunData], key: str, title: str) -> Picture | None:
    """Single samples before (grey) and after."""
    ends = {
        run.label: [float(row[key]) for row in run.after if row.get(key) is not None]
        for run in runs
    }
    first = next((run for run in runs if ends.get(run.label)), runs[0])
    start = [float(row[key]) for row in first.before if row.get(key) is not None]
    ends = {label: values for label, values in ends.items() if values}
    if not ends or not start:
        return None
    everything = [value for values in (start, *ends.values()) for value in values]
    whole = key == "length"
    edges = _edges(min(everything), max(everything), whole)

    def paint(ax: Any) -> None:
        label = "before" if len(runs) == 1 else f"before: {plot_label(first.label)}"
        ax.hist(start, edges, weights=_shares(start), color=GREY, alpha=0.45, label=label)
        for i, run in enumerate(runs):
            values = ends.get(run.label)
            if values:
                style = run_style(i, len(runs))
                colour = COLOURS.get(key, BLUE) if len(runs) == 1 else style["color"]
                ax.hist(
                    values,
                    edges,
                    weights=_shares(values),
                    histtype="step",
                    lw=1.8,
                    color=colour,
                    ls=style.get("ls", "-"),
                    label="after" if len(runs) == 1 else plot_label(run.label),
                )
        ax.margins(y=0.05 + 0.07 * len(runs))  # room for the legend
        if whole:
            ax.xaxis.set_major_locator(whole_numbers())
        ax.legend(loc="best")

    means = "; ".join(f"{label}: mean {number(float(np.mean(v)))}" for label, v in ends.items())
    return draw(
        f"histogram_{key}",
        paint,
        title="share of samples",
        x=title,
        caption=f"{title[0].upper()}{title[1:]} of single samples, before and after.",
        alt=f"Histogram of {title}. Before: mean {number(float(np.mean(start)))}. After: {means}.",
    )


def _edges(low: float, high: float, whole: bool) -> Floats:
    if whole:
        width = max(math.ceil((high - low + 1) / 30), 1)
        return np.arange(low - 0.5, high + width + 0.5, width)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, 26)


def _shares(values: Sequence[float]) -> Floats:
    return np.full(len(values), 1 / len(values))


def phases(runs: Sequence[RunData], seconds: Mapping[str, Mapping[str, float]]) -> Picture | None:
    """Where a step's time goes; `seconds` maps a run to its phases' means."""
    labels = [run.label for run in runs if seconds.get(run.label)]
    if not labels:
        return None
    names = list(dict.fromkeys(name for label in labels for name in seconds[label]))

    def paint(ax: Any) -> None:
        left = np.zeros(len(labels))
        for i, name in enumerate(names):
            width = np.array([seconds[label].get(name, 0.0) for label in labels])
            colour = PALETTE[i % len(PALETTE)]
            ax.barh(range(len(labels)), width, left=left, color=colour, height=0.55, label=name)
            left += width
        shown = [plot_label(label) if len(labels) > 1 else "" for label in labels]
        ax.set_yticks(range(len(labels)), shown)
        ax.tick_params(axis="y", length=0)
        height = ax.figure.get_figheight()
        left_edge = 0.3 if len(labels) > 1 else 0.105
        ax.set_position((left_edge, 0.5 / height, 0.975 - left_edge, 1 - 0.8 / height))
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(names), handlelength=1)
        ax.set_title("")

    told = "; ".join(
        f"{label}: " + ", ".join(f"{name} {number(s)} s" for name, s in seconds[label].items())
        for label in labels
    )
    return draw(
        "phases",
        paint,
        title="",
        x="mean seconds per PPO step",
        caption="Where the time of a PPO step goes, on average.",
        alt=f"Stacked bars of seconds per phase. {told}.",
        size=(5.2, max(1.7, 1.2 + 0.4 * len(labels))),
    )
