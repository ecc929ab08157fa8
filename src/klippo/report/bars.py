"""Plots that count: histograms of samples, and where the time goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from klippo.evaluation.history import Floats
from klippo.report.reading import RunData
from klippo.report.style import (
    GREY,
    LOOKS,
    PALETTE,
    Picture,
    draw,
    plot_label,
    run_look,
    whole_numbers,
)
from klippo.report.tables import SCORES
from klippo.report.text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def histogram(runs: Sequence[RunData], key: str) -> Picture | None:
    """Single samples before (grey) and after."""
    ends = {
        run.label: (i, values)
        for i, run in enumerate(runs)
        if (values := [float(row[key]) for row in run.after if row.get(key) is not None])
    }
    first = next((run for run in runs if run.label in ends), runs[0])
    start = [float(row[key]) for row in first.before if row.get(key) is not None]
    if not ends or not start:
        return None
    title = SCORES.get(key, "response length (tokens)")
    alone = len(runs) == 1
    is_whole = key == "length"
    everything = start + [value for _, values in ends.values() for value in values]
    edges = _edges(min(everything), max(everything), is_whole).tolist()

    def paint(ax: Axes) -> None:
        label = "before" if alone else f"before: {plot_label(first.label)}"
        ax.hist(start, edges, weights=_shares(start), color=GREY, alpha=0.45, label=label)
        for name, (i, values) in ends.items():
            look = LOOKS.get(key, LOOKS["proxy"]) if alone else run_look(i)
            ax.hist(
                values,
                edges,
                weights=_shares(values),
                histtype="step",
                lw=1.8,
                color=look["color"],
                ls=look.get("ls", "-"),
                label="after" if alone else plot_label(name),
            )
        ax.margins(y=0.05 + 0.07 * len(runs))  # room for the legend
        if is_whole:
            ax.xaxis.set_major_locator(whole_numbers())
        ax.legend(loc="best")

    means = (f"{name}: mean {number(float(np.mean(v)))}" for name, (_, v) in ends.items())
    return draw(
        f"histogram_{SCORES.get(key, key)}",
        paint,
        title="share of samples",
        x=title,
        caption=f"{title[0].upper()}{title[1:]} of single samples, before and after.",
        alt=f"Histogram of {title}. Before: mean {number(float(np.mean(start)))}. "
        f"After: {'; '.join(means)}.",
    )


def _edges(low: float, high: float, is_whole: bool) -> Floats:
    if is_whole:
        width = max(math.ceil((high - low + 1) / 30), 1)
        return np.arange(low - 0.5, high + width + 0.5, width)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, 26)


def _shares(values: Sequence[float]) -> Floats:
    return np.full(len(values), 1 / len(values))


def time_per_phase(seconds: Mapping[str, Mapping[str, float]]) -> Picture | None:
    """Where a step's time goes, run by run."""
    seconds = {label: phases for label, phases in seconds.items() if phases}
    if not seconds:
        return None
    several = len(seconds) > 1

    def paint(ax: Axes) -> None:
        rows = range(len(seconds))
        left = np.zeros(len(seconds))
        names = list(dict.fromkeys(name for phases in seconds.values() for name in phases))
        for i, name in enumerate(names):
            width = np.array([phases.get(name, 0.0) for phases in seconds.values()])
            colour = PALETTE[i % len(PALETTE)]
            ax.barh(rows, width, left=left, color=colour, height=0.55, label=name)
            left += width
        ax.set_yticks(rows, [plot_label(label) if several else "" for label in seconds])
        ax.tick_params(axis="y", length=0)
        left_edge = 0.3 if several else 0.105
        ax.set_position((left_edge, 0.5 / height, 0.975 - left_edge, 1 - 0.8 / height))
        ax.set_ylim(len(seconds) - 0.5, -0.5)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(names), handlelength=1)
        ax.set_title("")

    height = max(1.7, 1.2 + 0.4 * len(seconds))
    means = "; ".join(
        f"{label}: " + ", ".join(f"{name} {number(s)} s" for name, s in phases.items())
        for label, phases in seconds.items()
    )
    return draw(
        "phases",
        paint,
        title="",
        x="mean seconds per PPO step",
        caption="Where the time of a PPO step goes, on average.",
        alt=f"Stacked bars of seconds per phase. {means}.",
        size=(5.2, height),
    )
